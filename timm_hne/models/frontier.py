"""Evaluating an ensemble step by step: what a step needs of those before it, and nothing more.

In the paper's words (section 3.1) networks of the tree "can be evaluated in a sequential manner"; this is that, in any
step size.
"""
from typing import Any

import torch
import torch.nn as nn

from ..tree import node_span

# For every block the features of the last parent computed if some of its children are still to come, else None.
Frontier = tuple[Any, ...]


def check_tree(model: object, itself: bool = False) -> None:
    """Make sure that a model is a hierarchical ensemble.

    It is known by what it has, as its class is defined further up. So what `optimize_for_inference` returned counts
    too, which has the interface of its original.

    Args:
        model: What was given as a model.
        itself: Take no such stand-in.

    Raises:
        TypeError: It is none.
    """
    owner, names = (type(model), ('parts',)) if itself else (
        model, ('training', 'ensemble_size', 'num_classes', 'in_chans'))
    if not all(hasattr(owner, name) for name in names):
        raise TypeError(
            f'model must be a hierarchical ensemble (timm_hne.HierarchicalEnsemble), got {type(model).__name__}.')


def first_frontier(model: nn.Module, x: torch.Tensor) -> Frontier:
    """Return the frontier of an evaluation that has not begun: the images `x`, `(B, C, H, W)`.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
    """
    check_tree(model)
    return x, *(None for _ in model.nodes[1:])


def advance(model: nn.Module, frontier: Frontier, start: int, stop: int) -> tuple[torch.Tensor, Frontier]:
    """Evaluate the members `start` to `stop - 1`, after those before `start`, computing only the nodes that are new.

    Args:
        model: Any `hne_*` model.
        frontier: What the previous step returned, or `first_frontier(model, x)` if `start` is 0.
        start: Number of members evaluated so far.
        stop: Number of members after this step.

    Returns:
        The new members' logits `(B, stop - start, num_classes)`, and the frontier of the next step.
    """
    leaves = model.nodes[-1]
    kept: list[Any] = []
    # Features of the parents that this step has computed. The image is the one parent of the first block.
    fresh, parents, previous = (frontier[0] if start == 0 else None), 1, None
    for block, last in zip(model.blocks, frontier):
        known = node_span(parents, 0, start, leaves)[1]
        first, end = node_span(block.nodes, 0, start, leaves)[1], node_span(block.nodes, 0, stop, leaves)[1]
        family = block.nodes // parents
        # Only the last parent known so far can have children to come.
        inputs = [last] if first < min(end, known * family) else []
        inputs += [fresh] if fresh is not None else []
        if end == family * node_span(parents, 0, stop, leaves)[1]:
            kept.append(None)
        elif fresh is None or previous is None:
            kept.append(last if fresh is None else fresh)
        else:
            count = previous.count(fresh)
            kept.append(previous.pick(fresh, count - 1, count))
        fresh = None
        if inputs:
            x = inputs[0] if len(inputs) == 1 else previous.join(inputs)
            fresh = block(x, None if (first, end) == (0, block.nodes) else (first, end))
        parents, previous = block.nodes, block
    span = None if (start, stop) == (0, leaves) else (start, stop)
    return model.head_members(fresh, span), tuple(kept)
