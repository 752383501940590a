"""Forward passes: a model, its prefixes, the paper's implementation, one member alone and N separate networks.

    python benchmarks/forward.py

All run on the same images, in turn, in eager mode. Each network uses the memory format that is faster for it. On a CPU
there are two parts: with the C library's default handling of freed memory, and with that of `timm_hne.process`.
"""
import argparse
import functools
import shlex
import sys
from pathlib import Path

import timm
import torch
from common import describe_machine, machine, markdown_table, paired_medians, write_json, write_text
from paper import PaperNetwork

from timm_hne.inference.optimize import optimize_for_inference
from timm_hne.process import keep_freed_memory
from timm_hne.tree import prefixes

RESULTS = Path(__file__).parents[1] / 'docs' / 'results'
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


class Separate(torch.nn.Module):
    """N networks that share nothing, one after the other, and the mean of their logits."""

    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, x):
        return torch.stack([network(x) for network in self.networks]).mean(0)


def networks(name: str) -> dict[str, torch.nn.Module]:
    """Create everything that is timed, by name. Prefixes of the model and of the paper's have the same weights."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    single = functools.partial(timm.create_model, name, nodes=(1,) * len(model.nodes))
    return {
        'model': model,
        **{f'paper, {n}': PaperNetwork(model, n) for n in prefixes(model.ensemble_size)},
        'one member alone': PaperNetwork(single().eval()),
        'separate networks': Separate(PaperNetwork(single().eval()) for _ in range(model.ensemble_size)),
    }


def callables(modules: dict[str, torch.nn.Module], x: torch.Tensor) -> dict[str, functools.partial]:
    """Return what to call, by name; the model once for each prefix."""
    model = modules['model']
    calls = {f'model, {n}': functools.partial(model, x, n) for n in prefixes(model.ensemble_size)}
    return calls | {key: functools.partial(module, x) for key, module in modules.items() if module is not model}


def check_outputs(calls: dict[str, functools.partial], points: tuple[int, ...]) -> None:
    """Raise an AssertionError unless the paper's implementation and the model compute the same."""
    for n in points:
        torch.testing.assert_close(calls[f'model, {n}'](), calls[f'paper, {n}'](), rtol=1e-3, atol=1e-4)


def tables(medians: dict[tuple[str, str], float], points: tuple[int, ...]) -> str:
    """Return the medians in milliseconds, and ratios between the faster formats of each side, as Markdown."""
    best = {key: min(medians[key, layout] for layout in FORMATS) for key, _ in medians}
    header = ['members', *(f'{who}, {layout}' for who in ('model', 'paper') for layout in FORMATS), 'paper / model']
    rows = []
    for n in points:
        times = [medians[f'{who}, {n}', layout] for who in ('model', 'paper') for layout in FORMATS]
        ratio = best[f'paper, {n}'] / best[f'model, {n}']
        rows.append([n, *(f'{1000 * time:.0f}' for time in times), f'{ratio:.2f}'])
    full = best[f'model, {points[-1]}']
    others = [
        [key, *(f'{1000 * medians[key, layout]:.0f}' for layout in FORMATS), f'{best[key] / full:.2f}']
        for key in best if ',' not in key
    ]
    heads = ['network', *FORMATS, f'over the model with {points[-1]} members']
    return '\n'.join([markdown_table(header, rows), markdown_table(heads, others)])


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    images = torch.randn(args.batch_size, *timm.get_pretrained_cfg(args.model).input_size)
    calls = {}
    for layout, memory_format in FORMATS.items():
        modules = {key: module.to(memory_format=memory_format) for key, module in networks(args.model).items()}
        points = prefixes(modules['model'].ensemble_size)
        of_layout = callables(modules, images.to(memory_format=memory_format))
        with torch.inference_mode():
            check_outputs(of_layout, points)
        calls |= {(key, layout): call for key, call in of_layout.items()}

    command = f'python benchmarks/forward.py {shlex.join(sys.argv[1:])}'.strip()
    text = [
        '# Forward passes',
        '',
        f'Machine: {describe_machine()}.',
        '',
        f'Written by `{command}`: `{args.model}`, batches of {args.batch_size} images of '
        f'{"x".join(map(str, images.shape[1:]))} in float32, eager mode. Medians of {args.repeats} rounds in which '
        'everything ran in turn, in milliseconds a batch. Ratios are between the faster memory formats of each side.',
        '',
        '`paper` replicates feature maps where a branch splits and has one group a node (`benchmarks/paper.py`); its '
        'outputs were compared with those of the model before timing. `optimised` is the model after '
        "`optimize_for_inference(model, engine='eager')`, which folds the batch normalisation and chooses the format; "
        'it is in the second part, for which the C library keeps freed memory (`timm_hne/process.py`). The other '
        'networks are plain convolutions without a tree; '
        f'{points[-1]} separate ones run one after the other.',
        '',
    ]
    seconds = {}
    for memory in ("the C library's default", 'kept'):
        if memory == 'kept':  # from here on, for the whole process
            keep_freed_memory()
            optimized = optimize_for_inference(modules['model'], images, engine='eager')
            calls |= {('optimised', layout): functools.partial(optimized, images) for layout in FORMATS}
        with torch.inference_mode():
            medians = paired_medians(calls, args.repeats, warmup=1)
        seconds[memory] = {f'{key}, {layout}': time for (key, layout), time in medians.items()}
        text += [f'## Freed memory: {memory}', '', tables(medians, points)]
    text = '\n'.join(text)
    print(text)
    if args.output:
        write_text(args.output.with_suffix('.md'), text)
        write_json(args.output.with_suffix('.json'), {'command': command, 'machine': machine(), 'seconds': seconds})


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='hne_resnet50_c16', choices=timm.list_models('hne_*'))
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--repeats', type=int, default=11)
    parser.add_argument('--threads', type=int, help="torch's own number if left out")
    parser.add_argument('--output', type=Path, default=RESULTS / 'forward', help='path of the results, without suffix')
    main(parser.parse_args())
