"""The service under load: one replica with all members, with one, and adaptive; one that is joined by another; two; and
two of which one is killed.

    python benchmarks/serve_load.py --data-dir CIFAR10 --output docs/results/serve

Each is started by `timm-hne serve` on loopback and meets a calm, a surge of three times what one replica with all
members can answer, as measured before, and a calm, from Locust's clients, which ask at the same times whatever the
service does. They run on the same machine and take their share of it. Writes a table, a JSON file and a plot. A model
without weights is served as it is initialised, and has no accuracy.
"""
import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from common import describe_machine, machine, markdown_table, write_json, write_text
from timm.models import save_for_hf

import timm_hne  # noqa: F401

HERE = Path(__file__).parent


@contextmanager
def service(model: str, target: float, log: Path, *options: str):
    """Run the service; yield its address and process."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, '-m', 'timm_hne', 'serve', model, '--port', str(port), '--latency-target', str(target),
        '--threads', '1', *options]
    with open(log, 'wb') as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            address = f'http://127.0.0.1:{port}'
            while True:
                try:
                    with urllib.request.urlopen(f'{address}/health', timeout=5) as response:
                        if response.status == 200 and 'Ctrl+C' in log.read_text(errors='replace'):
                            break
                except OSError:
                    pass
                if process.poll() is not None:
                    raise RuntimeError(f'the service did not start: {log.read_text()}')
                time.sleep(0.2)
            yield address, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def replicas(root: int) -> list[int]:
    """Return the processes of replicas below a process."""
    parents, found = {}, []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            pid = int(folder.name)
            parents[pid] = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
            if b'ServeReplica:hne' in (folder / 'cmdline').read_bytes():
                found.append(pid)
        except OSError:
            continue

    def below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return [pid for pid in found if below(pid)]


def drive(address: str, images: list, phases: list[tuple[float, int]], period: float = 1.) -> list[dict]:
    """Send the clients; return what became of each request."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, 'requests.jsonl')
        environment = {
            **os.environ, 'LOAD_IMAGES': json.dumps(images), 'LOAD_PHASES': json.dumps(phases),
            'LOAD_OUTPUT': str(output), 'LOAD_PERIOD': str(period)}
        subprocess.run(
            [sys.executable, '-m', 'locust', '--headless', '-f', str(HERE / 'serve_users.py'), '--host', address,
             '--stop-timeout', '60', '--only-summary', '--exit-code-on-error', '0'],
            env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return [json.loads(line) for line in output.read_text().splitlines()]


def counts(address: str) -> dict[str, dict[str, int]]:
    """Return how many requests the service says it has answered, by status, and refused, by reason."""
    with urllib.request.urlopen(f'{address}/metrics') as response:
        text = response.read().decode()
    found = re.findall(r'^hne_(requests|rejected)_total{\w+="(\w+)"} (\S+)$', text, re.M)
    return {
        kind: {label: int(float(count)) for name, label, count in found if name == kind}
        for kind in ('requests', 'rejected')}


def summary(records: list[dict], trained: bool) -> dict[str, float | None]:
    """Return the columns of the table."""
    answered = [record for record in records if record['status'] == 200]
    milliseconds = [1000 * record['seconds'] for record in answered]
    quantiles = statistics.quantiles(milliseconds, n=100) if len(answered) > 1 else None
    return {
        'requests': len(records),
        'answered': len(answered),
        'rejected': sum(record['status'] == 503 for record in records),
        # Locust stops clients in the middle of a request when the surge ends, and at the end.
        'cut': sum(record['status'] is None for record in records),
        'lost': sum(record['status'] not in (200, 503, None) for record in records),
        'p50_ms': quantiles[49] if quantiles else None,
        'p99_ms': quantiles[98] if quantiles else None,
        'members': statistics.mean(record['members'] for record in answered) if answered else None,
        'accuracy': 100 * statistics.mean(record['correct'] for record in answered) if answered and trained else None,
    }


def measure(
        file: Path,
        model: str,
        target: float,
        options: tuple[str, ...],
        images: list,
        phases: list[tuple[float, int]],
        kill: bool,
) -> None:
    """Measure a policy, and write down all requests and what the service counted."""
    with service(model, target, file.with_suffix('.log'), *options) as (address, process):
        if kill:
            # Locust starts within some seconds; the surge is long enough for that not to matter.
            after = phases[0][0] + phases[1][0] / 2
            threading.Timer(after, os.kill, (replicas(process.pid)[0], signal.SIGKILL)).start()
        records = drive(address, images, phases)
        counted = counts(address)
    begin = min(record['sent'] for record in records)
    for record in records:
        record['time'] = record['sent'] - begin
    write_json(file, {'requests': records, 'counted': counted})


def plot(results: dict[str, list[dict]], target: float, surge: tuple[float, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout='constrained')
    above, middle, below = figure.subplots(3, sharex=True)
    for color, (name, records) in enumerate(results.items()):
        seconds: dict[int, list[dict]] = {}
        for record in records:
            seconds.setdefault(int(record['time']), []).append(record)
        answered = {s: [r for r in some if r['status'] == 200] for s, some in sorted(seconds.items())}
        times = [s + .5 for s, some in answered.items() if some]
        line = dict(color=f'C{color}', label=name)
        above.semilogy(times, [
            1000 * max(r['seconds'] for r in some) for some in answered.values() if some], **line)
        middle.plot([s + .5 for s in answered], [
            len(seconds[s]) - len(some) for s, some in answered.items()], **line)
        below.plot(times, [statistics.mean(r['members'] for r in some) for some in answered.values() if some], **line)
    above.axhline(1000 * target, color='k', linestyle=':', linewidth=1)
    above.set(ylabel='slowest answer (ms)')
    figure.legend(*above.get_legend_handles_labels(), fontsize='small', loc='outside upper center', ncols=3)
    middle.set(ylabel='rejected in a second')
    below.set(xlabel='time (s)', ylabel='members')
    for axes in (above, middle, below):
        axes.axvspan(*surge, color='k', alpha=0.07)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True, help='folder of CIFAR-10 with test/CLASS')
    parser.add_argument('--model', default='hne_resnet50_c8')
    parser.add_argument('--target-ms', type=float, default=250.)
    parser.add_argument(
        '--seconds', type=float, nargs=3, default=[6., 10., 8.], help='of the calm, the surge, the calm')
    parser.add_argument('--calm', type=float, default=0.3, help='rate in the calm over the capacity')
    parser.add_argument('--surge', type=float, default=3., help='rate in the surge over the capacity')
    parser.add_argument(
        '--only', nargs='*', metavar='NAME', help='what to measure anew; the rest is taken from OUTPUT/raw, if there')
    parser.add_argument('--output', type=Path, default=Path('output/serve'), help='folder of the results')
    args = parser.parse_args()

    files = sorted((args.data_dir / 'test').glob('*/*.png'))
    images = [(str(path), path.parent.name) for path in random.Random(0).sample(files, 1000)]
    target = args.target_ms / 1000
    model, trained = args.model, timm.is_model_pretrained(args.model)
    torch.manual_seed(0)
    untrained = timm.create_model(args.model)
    everyone = '--min-members', str(untrained.ensemble_size)
    policies = {
        'one, all members': everyone,
        'one, one member': ('--max-members', '1'),
        'one, adaptive': (),
        'one, then two, adaptive': ('--replicas', '1:2'),
        'two, adaptive': ('--replicas', '2'),
        'two, one is killed': ('--replicas', '2'),
    }
    raw = args.output / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    if not trained:
        model = str(raw / 'model')
        save_for_hf(untrained, model, safe_serialization=True)
    known = raw / 'capacity.json'
    if known.exists() and args.only is not None and 'capacity' not in args.only:
        capacity = json.loads(known.read_text())
    else:
        # As many clients as may wait at a time without being refused, none of which waits between requests.
        with service(model, target, raw / 'service.log', *everyone) as (address, _):
            records = drive(address, images, [(3, 8), (6, 8)], period=1e-3)
        begin = min(record['sent'] for record in records) + 3
        late = [record for record in records if record['sent'] > begin and record['status'] == 200]
        capacity = len(late) / (max(record['sent'] for record in late) - begin)
        write_json(known, capacity)
        print(f'capacity {capacity:.0f}/s', flush=True)
    users = [round(args.calm * capacity), round(args.surge * capacity), round(args.calm * capacity)]
    surge = args.seconds[0], sum(args.seconds[:2])
    results, summaries, notes, rows = {}, {}, {}, []
    for number, (name, options) in enumerate(policies.items()):
        file = raw / f'{number}.json'
        if args.only is None or name in args.only:
            measure(file, model, target, options, images, list(zip(args.seconds, users)), 'killed' in name)
        if not file.exists():
            continue
        measured = json.loads(file.read_text())
        results[name] = records = measured['requests']
        notes[name] = measured['counted']
        for phase, some in {
            'overall': records, 'surge': [r for r in records if surge[0] <= r['time'] < surge[1]],
        }.items():
            values = summaries[f'{name}, {phase}'] = summary(some, trained)
            rows.append([f'{name}, {phase}', *('-' if value is None else f'{value:.4g}' for value in values.values())])
            print(rows[-1], flush=True)
    header = [
        'replicas', 'requests', 'answered', 'rejected', 'cut', 'lost', 'p50 ms', 'p99 ms', 'members', 'accuracy %']
    text = (
        f'Requests per second: {users[0]}, {users[1]}, {users[2]} for {args.seconds} s; one replica with all members '
        f'answers {capacity:.0f}; target {args.target_ms:.0f} ms; a thread for each replica; clients on the same '
        'machine. Cut: the client was stopped before it had its answer.\n\n'
        f'{describe_machine()}\n\n' + markdown_table(header, rows))
    print(text)
    write_text(args.output / 'serve.md', text)
    write_json(args.output / 'serve.json', {
        'machine': machine(), 'target_ms': args.target_ms, 'capacity': capacity, 'rates': users, 'results': summaries,
        'counted_by_the_service': notes})
    plot(results, target, surge, args.output / 'serve.png')


if __name__ == '__main__':
    main()
