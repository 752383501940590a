"""Inference speed: against the paper's implementation and what else a user would do, and against the arithmetic.

    python benchmarks/inference.py --output docs/results/inference          # --sections chooses some of them

Every section times all of its variants in turn, so that a change in the machine's speed meets all of them alike, and
reports medians and ratios of that one run. Compilation is not timed. Writes one JSON and one Markdown file a section,
and for `scaling` a plot.
"""
import argparse
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from common import describe_machine, machine, markdown_table, paired_medians, write_json, write_text
from paper import PaperNetwork

from timm_hne import HierarchicalEnsemble, optimize_for_inference
from timm_hne.evaluation.cost import member_macs
from timm_hne.inference.optimize import FoldedConv
from timm_hne.tree import prefixes

Section = tuple[list[str], list[list[object]], dict]


def wait(function: Callable, *args) -> Callable[[], None]:
    """Return a call that ends when its result is there."""
    def call() -> None:
        function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return call


def images(batch_size: int, args: argparse.Namespace) -> torch.Tensor:
    return torch.randn(batch_size, 3, 32, 32, device=args.device)


def headline(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """All members, in every form, against the paper's replicate-and-group network in eager mode.

    The first row of each batch size is the paper's network by itself, before `optimize_for_inference` has told the C
    library to keep freed memory, which holds for the whole process and speeds up all the others.
    """
    paper = PaperNetwork(model).eval()
    alone = {
        batch_size: paired_medians({'': wait(paper, images(batch_size, args))}, args.repeats, warmup=2)['']
        for batch_size in args.batch_sizes
    }
    forms = {
        "the paper's, eager": paper,
        'eager': model,
        'folded': optimize_for_inference(model, compile=False),
        'compiled': optimize_for_inference(model),
        'compiled, bfloat16': optimize_for_inference(model, dtype=torch.bfloat16),
    }
    rows, results = [], {}
    for batch_size in args.batch_sizes:
        x = images(batch_size, args)
        medians = paired_medians({name: wait(form, x) for name, form in forms.items()}, args.repeats, warmup=2)
        medians = results[batch_size] = {"the paper's, eager, memory not kept": alone[batch_size], **medians}
        first, second = list(medians.values())[:2]
        rows += [
            [f'{name}, batch {batch_size}', f'{1000 * s:.1f}', f'{first / s:.2f}', f'{second / s:.2f}']
            for name, s in medians.items()
        ]
    return ['variant', 'ms', 'speed-up over the first row', 'over the second'], rows, results


def dense_rate(dtype: torch.dtype, args: argparse.Namespace) -> float:
    """Return the MACs per second of the fastest dense product at hand, what counts as the machine's peak here."""
    a, b = (torch.randn(2048, 2048, device=args.device, dtype=dtype) for _ in range(2))
    x = torch.randn(128, 512, 16, 16, device=args.device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 1, 1, device=args.device, dtype=dtype).to(memory_format=torch.channels_last)
    # Both do 2^33 multiply-accumulates. By themselves: they would leave the caches cold for what is timed after them.
    calls = {'matmul': wait(torch.matmul, a, b), 'conv2d': wait(torch.nn.functional.conv2d, x, weight)}
    return 2 ** 33 / min(paired_medians(calls, args.repeats, warmup=2).values())


def scaling(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Time of n members over that of one, beside their MACs, and the share of the machine's rate of dense products.

    That rate is the faster of a product of two 2048 x 2048 matrices and a 1x1 convolution of 512 channels.
    """
    macs = member_macs(model)
    rows, results = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        form = optimize_for_inference(model, dtype=dtype)
        name = str(dtype).removeprefix('torch.')
        for batch_size in args.batch_sizes:
            x = images(batch_size, args)
            calls = {n: wait(form, x, n) for n in prefixes(model.ensemble_size)}
            medians = paired_medians(calls, args.repeats, warmup=2)
            peak = dense_rate(dtype, args)
            results[f'{name}, batch {batch_size}'] = {'peak_macs_per_s': peak, 'seconds': medians}
            for n, seconds in medians.items():
                by_time, by_macs = seconds / medians[1], macs[n] / macs[1]
                rate = macs[n] * batch_size / seconds
                rows.append([
                    f'{name}, batch {batch_size}, n = {n}', f'{1000 * seconds:.2f}', f'{by_time:.2f}', f'{by_macs:.2f}',
                    f'{by_time / by_macs - 1:+.0%}', f'{rate / 1e9:.1f}', f'{rate / peak:.0%}',
                ])
    results['macs'] = macs
    return ['', 'ms', 'time / time(1)', 'MACs / MACs(1)', 'difference', 'GMAC/s', 'of dense'], rows, results


def plot_scaling(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    macs = results['macs']
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name, result in results.items():
        if name != 'macs':
            seconds = result['seconds']
            ratios = [s / seconds[1] for s in seconds.values()]
            axes.plot([macs[n] / macs[1] for n in seconds], ratios, 'o-', label=name)
    limit = macs[max(macs)] / macs[1]
    axes.plot([1, limit], [1, limit], 'k:', label='MACs')
    axes.set(xlabel='MACs / MACs(1)', ylabel='time / time(1)', title='Latency follows the arithmetic')
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def limits(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Where the time of all members goes, at batch 32: the layers of a kind by themselves, beside the whole model.

    Folded, not compiled; a layer is a convolution with its activation. The rest is additions, pooling and classifier.
    """
    rows, results = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        form, x = optimize_for_inference(model, compile=False, dtype=dtype), images(32, args)
        form(x)
        inputs: dict[str, list[tuple]] = {}
        macs: dict[str, int] = {}

        def record(layer: FoldedConv, args: tuple, output: torch.Tensor, inputs=inputs, macs=macs) -> None:
            size = f'{layer.kernel_size[0]}x{layer.kernel_size[0]}'
            if layer.groups == layer.in_channels:
                kind = f'{size}, depth-wise'
            else:
                kind = f'{size}, {"one parent" if layer.parents == 1 else "several parents"}'
            inputs.setdefault(kind, []).append((layer, args))
            macs[kind] = macs.get(kind, 0) + output.numel() * layer.weight[0].numel()

        hooks = [m.register_forward_hook(record) for m in form.modules() if isinstance(m, FoldedConv)]
        form(x)
        for hook in hooks:
            hook.remove()
        calls = {
            kind: wait(lambda layers=layers: [layer(*a) for layer, a in layers]) for kind, layers in inputs.items()
        }
        medians = paired_medians({'the model': wait(form, x), **calls}, args.repeats, warmup=2)
        peak = dense_rate(dtype, args)
        whole = medians['the model']
        macs['the model'] = sum(macs.values())
        medians['the rest'] = 2 * whole - sum(medians.values())
        name = str(dtype).removeprefix('torch.')
        results[name] = {'peak_macs_per_s': peak, 'seconds': medians, 'macs': macs}
        for kind, seconds in medians.items():
            rate = macs.get(kind, 0) / seconds
            rows.append([
                f'{name}, {kind}', len(inputs.get(kind, [])) or '', f'{1000 * seconds:.1f}', f'{seconds / whole:.0%}',
                f'{macs.get(kind, 0) / macs["the model"]:.0%}', f'{rate / 1e9:.0f}', f'{rate / peak:.0%}',
            ])
    return ['', 'layers', 'ms', 'of the time', 'of the MACs', 'GMAC/s', 'of dense'], rows, results


def anytime(model: HierarchicalEnsemble, args: argparse.Namespace) -> Section:
    """Going through 1, 2, 4, ..., N members in one evaluation, against evaluating N directly."""
    forms = {'eager': model, 'folded': optimize_for_inference(model, compile=False)}
    forms['compiled'] = optimize_for_inference(model)
    rows, results = [], {}
    for batch_size in args.batch_sizes:
        x = images(batch_size, args)
        for name, form in forms.items():
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
    """N separate networks, in the forms a user would use, at batch 32."""
    x, size = images(32, args), model.ensemble_size
    single = model.extract(1)
    networks = [timm.create_model(args.model, nodes=single.nodes).to(args.device).eval() for _ in range(size)]
    compiled = optimize_for_inference(single)
    params, buffers = torch.func.stack_module_state(networks)

    def one(params, buffers, x):
        return torch.func.functional_call(single, (params, buffers), (x,))

    calls = {
        'ensemble, eager': wait(model, x),
        'ensemble, compiled': wait(optimize_for_inference(model), x),
        # One network N times: kinder to the caches than N networks.
        f'{size} separate networks, eager': wait(lambda: [network(x) for network in networks]),
        f'{size} separate networks, compiled': wait(lambda: [compiled(x) for _ in range(size)]),
        'stack_module_state + vmap': wait(lambda: torch.vmap(one, (0, 0, None))(params, buffers, x).mean(dim=0)),
    }
    if importlib.util.find_spec('torch_uncertainty'):
        from torch_uncertainty.methods import deep_ensembles
        calls['torch-uncertainty deep_ensembles'] = wait(deep_ensembles(networks).eval(), x)
    else:
        print('torch-uncertainty is not installed, its row is left out')
    medians = paired_medians(calls, args.repeats)
    base = medians['ensemble, compiled']
    rows = [[name, f'{1000 * s:.1f}', f'{s / base:.2f}'] for name, s in medians.items()]
    return ['16 members, batch 32', 'ms', 'times ours compiled'], rows, {'seconds': medians}


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
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--output', type=Path, default=Path('output/inference'))
    args = parser.parse_args()
    model = timm.create_model(args.model).to(args.device).eval()
    for section in args.sections:
        with torch.no_grad():
            header, rows, results = SECTIONS[section](model, args)
        table = f'{inspect.getdoc(SECTIONS[section])}\n\n{describe_machine()}\n\n{markdown_table(header, rows)}'
        print(table)
        write_text(args.output / f'{section}.md', table)
        write_json(args.output / f'{section}.json', {'machine': machine(), 'model': args.model, 'results': results})
        if section == 'scaling':
            plot_scaling(results, args.output / 'scaling.png')


if __name__ == '__main__':
    main()
