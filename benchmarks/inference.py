"""Inference speed: every engine against the paper's implementation, what else a user would do, and the arithmetic.

    python benchmarks/inference.py --output docs/results/inference          # --sections chooses some of them
    python benchmarks/inference.py --sections headline alternatives --model hne_mobilenetv2_075_e8.hcd_in1k \\
        --batch-sizes 1 8 --output docs/results/inference/mobilenetv2

Every section times all of its variants in turn, so that a change in the machine's speed meets all of them alike, and
reports medians and ratios of that one run. Making programs is not timed. A row has the name of the engine that really
ran. The 8-bit programs are calibrated with noise, which tells their speed only; `benchmarks/int8.py` measures accuracy.
Writes one JSON and one Markdown file a section, and for `scaling` a plot.
"""
import argparse
import importlib.util
import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import describe_machine, machine, markdown_table, paired_medians, write_json, write_text
from paper import PaperNetwork

from timm_hne import HierarchicalEnsemble, optimize_for_inference, quantize
from timm_hne.evaluation.cost import member_macs
from timm_hne.inference import OptimizedEnsemble
from timm_hne.inference.engines import engines_for
from timm_hne.inference.folding import folded
from timm_hne.inference.programs import ProgramStore, frontier_tensors
from timm_hne.process import keep_freed_memory
from timm_hne.tree import prefixes

Section = tuple[list[str], list[list[object]], dict]


def wait(function: Callable, *args) -> Callable[[], None]:
    """Return a call that ends when its result is there."""
    def call() -> None:
        function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return call


def images(model: HierarchicalEnsemble, batch_size: int, args: argparse.Namespace) -> torch.Tensor:
    height, width = model.pretrained_cfg['input_size'][1:]
    return torch.randn(batch_size, model.in_chans, height, width, device=args.device)


def engines(args: argparse.Namespace) -> list[str]:
    found = engines_for(torch.device(args.device), torch.float32)
    return [name for name in found if not args.engines or name in args.engines]


def forms(model: HierarchicalEnsemble, args: argparse.Namespace) -> dict[str, OptimizedEnsemble]:
    """Return the model in the form of each engine, in bfloat16, and in 8 bits, by the names of what really ran."""
    made = {name: optimize_for_inference(model, engine=name) for name in engines(args)}
    if 'openvino' in made:
        made['openvino, bfloat16'] = optimize_for_inference(model, engine='openvino', dtype=torch.bfloat16)
    calibration = images(model, 32, args)
    for name in ('openvino', 'onnxruntime'):
        if name in made:
            made[f'{name}, int8'] = quantize(model, calibration, engine=name)
    named = {}
    for name, form in made.items():
        try:
            for batch_size in args.batch_sizes:
                form(images(model, batch_size, args))
        except RuntimeError as error:
            print(f'{name} is left out: {error}')
        else:
            named[name if form.mode.startswith(name.partition(',')[0]) else form.mode] = form
    return named


def headline(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """All members, by every engine, against the paper's replicate-and-group network in eager mode.

    The first row of each batch size is the paper's network by itself, as published; in the others freed memory is kept
    (`timm_hne.process.keep_freed_memory`), which holds for the whole process. 'of dense' is the share of the rate of
    the fastest float32 dense product here, so 8 bits may have more than all of it.
    """
    paper = PaperNetwork(model).eval()
    alone = {
        batch_size: paired_medians({'': wait(paper, images(model, batch_size, args))}, args.repeats, warmup=2)['']
        for batch_size in args.batch_sizes
    }
    keep_freed_memory()
    ours = forms(model, args)
    macs, rows, results = member_macs(model)[model.ensemble_size], [], {}
    for batch_size in args.batch_sizes:
        x = images(model, batch_size, args)
        calls = {"the paper's, freed memory kept": paper, 'the model as it is': model, **ours}
        medians = paired_medians({name: wait(form, x) for name, form in calls.items()}, args.repeats, warmup=2)
        medians = {"the paper's, as published": alone[batch_size], **medians}
        peak = dense_rate(args)
        results[batch_size] = {'seconds': medians, 'peak_macs_per_s': peak}
        first, second = list(medians.values())[:2]
        rows += [
            [f'{name}, batch {batch_size}', f'{1000 * s:.1f}', f'{first / s:.1f}', f'{second / s:.1f}',
             f'{macs * batch_size / s / peak:.0%}']
            for name, s in medians.items()
        ]
    return ['', 'ms', 'times faster than the first row', 'than the second', 'of dense'], rows, results


def dense_rate(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> float:
    """Return the MACs per second of the fastest dense product at hand, what counts as the machine's peak here."""
    a, b = (torch.randn(2048, 2048, device=args.device, dtype=dtype) for _ in range(2))
    x = torch.randn(128, 512, 16, 16, device=args.device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 1, 1, device=args.device, dtype=dtype).to(memory_format=torch.channels_last)
    # Both do 2^33 multiply-accumulates.
    calls = {'matmul': wait(torch.matmul, a, b), 'conv2d': wait(torch.nn.functional.conv2d, x, weight)}
    return 2 ** 33 / min(paired_medians(calls, min(args.repeats, 5), warmup=2).values())


def scaling(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Time of n members over that of one, beside their MACs, and the share of the rate of dense float32 products.

    That rate is the faster of a product of two 2048 x 2048 matrices and a 1x1 convolution of 512 channels.
    """
    macs = member_macs(model)
    rows, results = [], {}
    for name, form in forms(model, args).items():
        if name in ('inductor', 'eager'):
            continue  # a program for every n takes the compiler minutes
        for batch_size in args.batch_sizes:
            x = images(model, batch_size, args)
            calls = {n: wait(form, x, n) for n in prefixes(model.ensemble_size)}
            medians = paired_medians(calls, args.repeats, warmup=2)
            peak = dense_rate(args)
            results[f'{name}, batch {batch_size}'] = {'peak_macs_per_s': peak, 'seconds': medians}
            for n, seconds in medians.items():
                by_time, by_macs = seconds / medians[1], macs[n] / macs[1]
                rate = macs[n] * batch_size / seconds
                rows.append([
                    f'{name}, batch {batch_size}, n = {n}', f'{1000 * seconds:.2f}', f'{by_time:.2f}', f'{by_macs:.2f}',
                    f'{rate / 1e9:.1f}', f'{rate / peak:.0%}',
                ])
    results['macs'] = macs
    return ['', 'ms', 'time / time(1)', 'MACs / MACs(1)', 'GMAC/s', 'of dense'], rows, results


def plot_scaling(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    macs = results['macs']
    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for name, result in results.items():
        if name != 'macs':
            seconds = result['seconds']
            ratios = [s / seconds[1] for s in seconds.values()]
            axes.plot([macs[n] / macs[1] for n in seconds], ratios, 'o-', label=name)
    limit = macs[max(macs)] / macs[1]
    axes.plot([1, limit], [1, limit], 'k:', label='MACs')
    axes.set(xlabel='MACs / MACs(1)', ylabel='time / time(1)', title='Latency follows the arithmetic')
    figure.legend(loc='outside right center', fontsize='small')
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def limits(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Where ONNX Runtime spends its time on all members, by its own profiler, one thread, kinds of operators apart."""
    import onnxruntime

    plain = folded(model)
    store, schedule = ProgramStore(plain), prefixes(model.ensemble_size)
    rows, results = [], {}
    for batch_size in args.batch_sizes:
        x = images(model, batch_size, args)
        spent: Counter = Counter()
        for start, stop in zip((0, *schedule), schedule):
            program = store.get(start, stop, tuple(x.shape[2:]))
            features = frontier_tensors(plain, x, start)
            inputs = {name: features[name].contiguous().numpy() for name in program.inputs}
            with tempfile.TemporaryDirectory() as folder:
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 3
                options.intra_op_num_threads = 1
                options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, 'profile'))
                plain_session = onnxruntime.InferenceSession(program.data, providers=['CPUExecutionProvider'])
                for entry in plain_session.get_inputs():
                    for symbol, size in zip(entry.shape[1:], inputs[entry.name].shape[1:]):
                        if isinstance(symbol, str):
                            options.add_free_dimension_override_by_name(symbol, size)
                session = onnxruntime.InferenceSession(program.data, options, providers=['CPUExecutionProvider'])
                for _ in range(args.repeats):
                    session.run(None, inputs)
                for event in json.loads(Path(session.end_profiling()).read_text()):
                    if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
                        spent[event['args']['op_name']] += event['dur'] / 1e6 / args.repeats
        total = sum(spent.values())
        results[batch_size] = dict(spent)
        rows += [
            [f'{kind}, batch {batch_size}', f'{1000 * seconds:.2f}', f'{seconds / total:.0%}']
            for kind, seconds in spent.most_common(6)
        ]
    return ['', 'ms', 'of the time'], rows, results


def anytime(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Going through 1, 2, 4, ..., N members in one evaluation, against evaluating N directly."""
    rows, results = [], {}
    ours = {name: form for name, form in forms(model, args).items() if name not in ('inductor', 'eager')}
    for batch_size in args.batch_sizes:
        x = images(model, batch_size, args)
        for name, form in {'the model as it is': model, **ours}.items():
            calls = {
                'direct': wait(form, x),
                'anytime': wait(lambda form=form, x=x: list(form.anytime(x))),
                'afresh': wait(lambda form=form, x=x: [form(x, n) for n in prefixes(form.ensemble_size)]),
            }
            medians = paired_medians(calls, args.repeats, warmup=2)
            results[f'{name}, batch {batch_size}'] = medians
            direct = medians['direct']
            rows.append([
                f'{name}, batch {batch_size}', f'{1000 * direct:.1f}', f'{1000 * medians["anytime"]:.1f}',
                f'{medians["anytime"] / direct - 1:+.0%}', f'{medians["afresh"] / direct - 1:+.0%}',
            ])
    return ['', 'direct [ms]', 'anytime [ms]', 'anytime - direct', 'each n afresh - direct'], rows, results


def alternatives(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """N separate networks on the same engine, and in the other forms that a user would use.

    One network N times, which is kinder to the caches than N networks.
    """
    size = model.ensemble_size
    single = model.extract(1)
    ours, separate = forms(model, args), forms(single, args)
    rows, results = [], {}
    for batch_size in args.batch_sizes:
        x = images(model, batch_size, args)
        calls = {name: wait(form, x) for name, form in ours.items()}
        calls |= {
            f'{size} separate, {name}': wait(lambda form=form, x=x: [form(x) for _ in range(size)])
            for name, form in separate.items()
        }
        calls[f'{size} separate, as they are'] = wait(lambda x=x: [single(x) for _ in range(size)])
        if model.pretrained_cfg['input_size'][1] <= 64:
            params, buffers = torch.func.stack_module_state([single] * size)

            def one(params, buffers, x):
                return torch.func.functional_call(single, (params, buffers), (x,))

            calls['stack_module_state + vmap'] = wait(
                lambda x=x, one=one, p=params, b=buffers: torch.vmap(one, (0, 0, None))(p, b, x).mean(dim=0))
        if importlib.util.find_spec('torch_uncertainty'):
            from torch_uncertainty.methods import deep_ensembles
            calls['torch-uncertainty deep_ensembles'] = wait(deep_ensembles([single] * size).eval(), x)
        medians = paired_medians(calls, args.repeats)
        results[batch_size] = medians
        for name, seconds in medians.items():
            engine = name.removeprefix(f'{size} separate, ')
            base = medians[engine if engine in ours else min(ours, key=medians.get)]
            rows.append([f'{name}, batch {batch_size}', f'{1000 * seconds:.1f}', f'{seconds / base:.2f}'])
    return [f'{size} members', 'ms', 'times the ensemble on this engine, or on the fastest'], rows, results


SECTIONS = {
    'headline': headline,
    'scaling': scaling,
    'limits': limits,
    'anytime': anytime,
    'alternatives': alternatives,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sections', nargs='+', choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument('--model', default='hne_resnet50_c16')
    parser.add_argument('--engines', nargs='+', help='some of the engines only; all that are installed by default')
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/inference'))
    args = parser.parse_args()
    torch.manual_seed(0)  # the programs of one section serve the next run
    model = timm.create_model(args.model).to(args.device).eval()
    for section in args.sections:
        if section != 'headline':  # whose first row is by itself
            keep_freed_memory()
        with torch.no_grad():
            header, rows, results = SECTIONS[section](model, args)
        table = f'{inspect.getdoc(SECTIONS[section])}\n\n{describe_machine()}\n\n{markdown_table(header, rows)}'
        print(table, flush=True)
        write_text(args.output / f'{section}.md', table)
        write_json(args.output / f'{section}.json', {'machine': machine(), 'model': args.model, 'results': results})
        if section == 'scaling':
            plot_scaling(results, args.output / 'scaling.png')


if __name__ == '__main__':
    main()
