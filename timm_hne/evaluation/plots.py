"""The plot of an evaluation: accuracy against cost."""
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..tree import prefixes

__all__ = ['draw_accuracy', 'plot_accuracy']


def draw_accuracy(rows: Sequence[Mapping[str, Any]], chosen: int | None = None):
    """Return a figure of top-1 accuracy against MACs; the powers of two are labelled.

    Args:
        rows: The `members` of an evaluation, or some of them.
        chosen: Number of members that is marked; none if None.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'timm-hne[plots]'.") from error
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    macs = [row['macs'] / 1e6 for row in rows]
    axes.plot(macs, [row['top1'] for row in rows], marker='o')
    for row, x in zip(rows, macs):
        if row['num_members'] == chosen:
            axes.plot([x], [row['top1']], marker='o', markersize=14, fillstyle='none', color='C1', markeredgewidth=2)
    points = prefixes(max(row['num_members'] for row in rows))
    for row, x in zip(rows, macs):
        if row['num_members'] in points:
            label = f'n = {row["num_members"]}'
            axes.annotate(label, (x, row['top1']), (3, -12), textcoords='offset points')
    axes.set(xlabel='million MACs of one image', ylabel='top-1 accuracy (%)', xscale='log')
    ticks = [x for row, x in zip(rows, macs) if row['num_members'] in points]
    axes.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.16, y=0.15)
    axes.grid(alpha=0.3)
    return figure


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draw top-1 accuracy against MACs as a PNG file; see `draw_accuracy`.

    Args:
        rows: The `members` of an evaluation, or some of them.
        path: File to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # No version in the file: same results, same bytes.
    draw_accuracy(rows).savefig(path, format='png', dpi=120, metadata={'Software': None})
