"""Draw the paper's figures and Table 1 from evaluations (`timm-hne eval ... --output RUN.json`).

    fig4    accuracy and deviation of the logits against MACs, a line per objective
    fig5    the same, a line per sharing scheme (`nodes`)
    fig6    accuracy against MACs at the operating points 1, 2, 4, ..., N, a line per model
    fig9    accuracy against the number of members, and each member's own; a panel per run
    table1  accuracy at 1, 2, 4, ..., N members, as Markdown

Runs that differ in nothing but their seed are averaged; table1 adds the standard deviation over the seeds. Where a run
is one of the paper's Table 1 (same model, data, tree, objective and alpha), the published accuracy is drawn beside it,
dashed. The data must be named cifar10 or cifar100, see `timm-hne eval --data-name`.
"""
import argparse
import sys
from pathlib import Path

from ..evaluation.figures import DATA, FIGURES, distinct, load_runs, make_table, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne plot`."""
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument('what', choices=[*FIGURES, 'table1'])
    parser.add_argument('runs', nargs='*', metavar='RUN.json', help="without any, table1 is the paper's")
    parser.add_argument('--output', type=Path, help='.png, .svg or .pdf; .md for table1, which is printed otherwise')
    parser.add_argument('--missing', action='store_true', help='table1: list what was not run, too')
    parser.add_argument('--no-paper', action='store_true', help="leave out the paper's published numbers")


def run(args: argparse.Namespace) -> None:
    """Draw a figure or the table.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file cannot be read or written.
        ValueError: An argument is wrong, or a file is no evaluation.
    """
    is_table = args.what == 'table1'
    suffixes = ('.md',) if is_table else ('.png', '.svg', '.pdf')
    if args.missing and not is_table:
        raise ValueError('--missing is for table1.')
    if args.no_paper and is_table and (args.missing or not args.runs):
        raise ValueError('--no-paper: table1 without runs, and --missing, list what the paper has.')
    if args.output is None and not is_table:
        raise ValueError('--output is needed for a figure.')
    if args.output is not None and args.output.suffix not in suffixes:
        raise ValueError(f'--output must end in {" or ".join(suffixes)}, got {str(args.output)!r}.')
    if not args.runs and not is_table:
        raise ValueError('a figure needs the JSON file of at least one evaluation.')
    if args.output is not None and not args.output.parent.is_dir():
        raise ValueError(f'--output: there is no folder {str(args.output.parent)!r}.')
    runs = load_runs(args.runs, with_paper=not args.no_paper)
    for name in distinct(runs, 'data'):
        if name not in DATA and not args.no_paper:
            print(
                f"timm-hne plot: the paper's numbers are of {' and '.join(DATA)}, not of {name!r}; if it is one of "
                'them, evaluate with --data-name.', file=sys.stderr)
    made = make_table(runs, args.missing) if is_table else FIGURES[args.what](runs)
    if args.output is None:
        print(made, end='')
    else:
        save(args.output, made)
