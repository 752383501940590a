"""Time of a tree of a timm model, beside the model itself and beside N separate ones.

    python benchmarks/from_timm.py --output docs/results/from_timm

In one run and in turn, for each base: n members of the default tree, n separate networks, and the base through
torch.compile, as its user would have it. Tree and separate networks are run by the same engine (`--engine`), the latter
as a tree that shares nothing, of which n members are exactly n networks; one of them is the base. Figures are medians.
What the report has of this machine already is not measured again.
"""
import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from common import describe_machine, markdown_table, paired_medians, write_json

from timm_hne import hierarchize, optimize_for_inference
from timm_hne.evaluation.cost import member_macs
from timm_hne.files import write_text
from timm_hne.process import keep_freed_memory
from timm_hne.tree import prefixes

BASES = ('resnet18', 'resnet50', 'mobilenetv3_large_100', 'convnext_tiny', 'vit_tiny_patch16_224')
SIZE = 8


@torch.no_grad()
def measure(base: str, engine: str, batch_sizes: list[int], repeats: int) -> Iterator[list[dict]]:
    """Yield the rows of each batch size, one for each number of members."""
    model = timm.create_model(base).eval()
    ensemble = hierarchize(model, ensemble_size=SIZE)
    macs = member_macs(ensemble)
    tree = optimize_for_inference(ensemble, engine=engine)
    separate = optimize_for_inference(hierarchize(model, nodes=(SIZE,) * len(ensemble.nodes)), engine=engine)
    compiled = torch.compile(model)
    for batch_size in batch_sizes:
        x = torch.randn(batch_size, 3, 224, 224)
        calls = {'compiled': lambda x=x: compiled(x)}
        for n in prefixes(SIZE):
            calls[f'tree {n}'] = lambda x=x, n=n: tree(x, n)
            calls[f'separate {n}'] = lambda x=x, n=n: separate(x, n)
        ms = {name: 1000 * seconds for name, seconds in paired_medians(calls, repeats).items()}
        yield [{
            'base': base, 'nodes': list(ensemble.nodes), 'batch_size': batch_size, 'n': n, 'engine': tree.mode,
            'macs': macs[n], 'tree_ms': ms[f'tree {n}'], 'separate_ms': ms[f'separate {n}'],
            'base_ms': ms['separate 1'], 'compiled_ms': ms['compiled'],
        } for n in prefixes(SIZE)]


def to_markdown(report: dict) -> str:
    """Return the report as a table."""
    header = [
        'base', 'batch', 'n', 'engine', 'G MACs', 'tree [ms]', 'n separate [ms]', 'separate / tree', 'tree / base',
        'n compiled / tree']
    rows = [[
        row['base'], row['batch_size'], row['n'], row['engine'], f'{row["macs"] / 1e9:.2f}', f'{row["tree_ms"]:.1f}',
        f'{row["separate_ms"]:.1f}', f'{row["separate_ms"] / row["tree_ms"]:.2f}',
        f'{row["tree_ms"] / row["base_ms"]:.2f}', f'{row["n"] * row["compiled_ms"] / row["tree_ms"]:.2f}',
    ] for row in report['rows']]
    return f'`python benchmarks/from_timm.py`, {report["machine"]}\n\n{markdown_table(header, rows)}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bases', nargs='+', default=BASES, metavar='NAME')
    parser.add_argument('--engine', default='auto')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--output', type=Path, default=Path('output/from_timm'))
    args = parser.parse_args()
    keep_freed_memory()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / 'from_timm.json'
    report = json.loads(path.read_text()) if path.exists() else {'rows': []}
    asked = {'machine': describe_machine(), 'engine': args.engine}
    if any(report.get(key) != value for key, value in asked.items()):
        report = {**asked, 'rows': []}
    known = {(row['base'], row['batch_size']) for row in report['rows']}
    for base in args.bases:
        missing = [size for size in args.batch_size if (base, size) not in known]
        for rows in measure(base, args.engine, missing, args.repeats) if missing else ():
            report['rows'] += rows
            write_json(path, report)
            write_text(args.output / 'from_timm.md', to_markdown(report))
    print(to_markdown(report), end='')


if __name__ == '__main__':
    main()
