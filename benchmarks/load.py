"""Serving under load: the adaptive runner against fixed n = N and n = 1, through a calm, a surge, and a calm.

    python benchmarks/load.py --data-dir CIFAR10 --output docs/results/load

    timm-hne demo --output output/demo                       # or without a data set, on handwritten digits
    python benchmarks/load.py --checkpoint output/demo/model.safetensors

The requests are images that training never saw, at random times: the rates are set from the throughput measured on this
machine, the surge being more than n = N can serve and less than n = 1 can. Prints the median and the 99th percentile of
the latency, of the answered requests, in the surge and overall; writes a table, a JSON file and a plot.
"""
import argparse
import random
import statistics
import threading
import time
from pathlib import Path

import torch
from common import add_subject, describe_machine, load_subject, machine, markdown_table, write_json, write_text

from timm_hne import AdaptiveRunner, optimize_for_inference
from timm_hne.inference.runner import Overloaded
from timm_hne.process import keep_freed_memory


def arrival_times(rates: list[float], seconds: list[float]) -> list[float]:
    """Return Poisson arrivals, the same for every policy."""
    generator, arrivals, now, end = random.Random(0), [], 0., 0.
    for rate, duration in zip(rates, seconds):
        end += duration
        now += generator.expovariate(rate)
        while now < end:
            arrivals.append(now)
            now += generator.expovariate(rate)
        now = end
    return arrivals


def drive(
        model: torch.nn.Module,
        images: torch.Tensor,
        classes: torch.Tensor,
        arrivals: list[float],
        target: float,
        bounds: dict[str, int],
) -> list[dict]:
    """Send one request at each arrival time; return what became of each."""
    records: list[dict] = []
    futures = []
    with AdaptiveRunner(
            model, target, tuple(images.shape[1:]), max_batch_size=32, max_queue=512, freeze_garbage=True, **bounds,
    ) as runner:
        pending = threading.Semaphore(0)
        start = time.monotonic()
        for i, arrival in enumerate(arrivals):
            time.sleep(max(0., start + arrival - time.monotonic()))
            record = {'arrival': arrival, 'class': classes[i % len(classes)].item()}
            records.append(record)
            try:
                future = runner.submit(images[i % len(images)])
            except Overloaded:
                record['rejected'] = True
                pending.release()
                continue

            # Counted from when the request was due, so that a late sender hides nothing.
            def answered(future, record=record):
                try:
                    answer = future.result()
                    record['latency'] = time.monotonic() - start - record['arrival']
                    record['num_members'] = answer.num_members
                    record['correct'] = answer.logits.argmax().item() == record['class']
                finally:
                    pending.release()

            futures.append(future)
            future.add_done_callback(answered)
        for _ in arrivals:
            pending.acquire()
    for future in futures:
        future.result()  # latencies of a model that fails are worth nothing: raises its exception
    return records


def summary(records: list[dict]) -> dict[str, float | None]:
    """Return the columns of the table; None is what so few answers do not tell."""
    answered = [record for record in records if 'latency' in record]
    latencies = [record['latency'] for record in answered]
    quantiles = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else None
    return {
        'requests': len(records),
        'p50_ms': 1000 * quantiles[49] if quantiles else None,
        'p99_ms': 1000 * quantiles[98] if quantiles else None,
        'rejected': len(records) - len(answered),
        'accuracy': 100 * statistics.mean(record['correct'] for record in answered) if answered else None,
        'members': statistics.mean(record['num_members'] for record in answered) if answered else None,
    }


def plot(results: dict[str, list[dict]], target: float, surge: tuple[float, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout='constrained')
    above, below = figure.subplots(2, sharex=True)
    for name, records in results.items():
        answered = [record for record in records if 'latency' in record]
        times = [record['arrival'] for record in answered]
        above.plot(times, [1000 * record['latency'] for record in answered], '.', markersize=2, label=name)
        if name == 'adaptive':
            below.plot(times, [record['num_members'] for record in answered], '.', markersize=2, color='C0')
    above.axhline(1000 * target, color='k', linestyle=':', label='target')
    above.set(ylabel='latency (ms)', yscale='log', title='Calm, surge, calm')
    above.legend(markerscale=5, loc='upper right')
    below.set(xlabel='time (s)', ylabel='members, adaptive')
    for axes in (above, below):
        axes.axvspan(*surge, color='k', alpha=0.07)
    figure.savefig(path, dpi=150)


def throughput(model: torch.nn.Module, images: torch.Tensor, num_members: int) -> float:
    """Return images per second in batches of 32."""
    times = []
    with torch.no_grad():
        for _ in range(8):
            begin = time.perf_counter()
            model(images[:32], num_members)
            times.append(time.perf_counter() - begin)
    return 32 / statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument('--target-ms', type=float, default=250.)
    parser.add_argument('--seconds', type=float, nargs=3, default=[6., 8., 6.], help='of the calm, the surge, the calm')
    parser.add_argument('--calm', type=float, default=0.3, help='rate in the calm over the throughput of n = N')
    parser.add_argument('--surge', type=float, default=0.25, help='rate in the surge over the throughput of n = 1')
    parser.add_argument('--engine', default='auto', help='see `optimize_for_inference`')
    parser.add_argument('--output', type=Path, default=Path('output/load'))
    args = parser.parse_args()

    keep_freed_memory()
    model, images, classes = load_subject(args)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # an image folder is sorted
    images, classes = images[order], classes[order]
    fast = optimize_for_inference(model, engine=args.engine)
    size = model.ensemble_size
    full, one = throughput(fast, images, size), throughput(fast, images, 1)
    calm, surge = args.calm * full, args.surge * one
    arrivals = arrival_times([calm, surge, calm], args.seconds)
    target = args.target_ms / 1000
    begin, end = args.seconds[0], sum(args.seconds[:2])

    policies = {
        'adaptive': {},
        f'fixed n = {size}': {'min_members': size},
        'fixed n = 1': {'max_members': 1},
    }
    results = {name: drive(fast, images, classes, arrivals, target, bounds) for name, bounds in policies.items()}
    rows, summaries = [], {}
    for name, records in results.items():
        phases = {'overall': records, 'surge': [r for r in records if begin <= r['arrival'] < end]}
        for phase, some in phases.items():
            values = summaries[f'{name}, {phase}'] = summary(some)
            rows.append([f'{name}, {phase}', *('-' if value is None else f'{value:.4g}' for value in values.values())])
    text = (
        f'Requests per second: {calm:.0f}, {surge:.0f}, {calm:.0f} for {args.seconds} s; throughput {full:.0f} at '
        f'n = {size} and {one:.0f} at n = 1; target {args.target_ms:.0f} ms.\n\n{describe_machine()}\n\n'
        + markdown_table(['policy', 'requests', 'p50 ms', 'p99 ms', 'rejected', 'accuracy %', 'members'], rows))
    print(text)
    write_text(args.output / 'load.md', text)
    write_json(args.output / 'load.json', {'machine': machine(), 'target_ms': args.target_ms, 'results': summaries})
    plot(results, target, (begin, end), args.output / 'load.png')


if __name__ == '__main__':
    main()
