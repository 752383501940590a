"""A tree that grows: the weights of more nodes from those of fewer."""
import zlib
from collections.abc import Sequence

import torch
import torch.nn as nn

__all__ = ['NOISE', 'grow_nodes', 'grow_weights']

NOISE = 0.3  # of a copy, relative to the root mean square of the tensor; benchmarks/branching.py


def grow_nodes(
        nodes: Sequence[dict[str, torch.Tensor]],
        count: int,
        siblings: int,
        parameters: set[str],
        name: str,
        noise: float = NOISE,
        seed: int = 0,
) -> list[dict[str, torch.Tensor]]:
    """Return the weights of more nodes: each node and its copies side by side, where its children would be.

    Copies of the same weights get the same gradients and never part, so there is noise, of their own, in those that
    have an elder sibling. A first child has none: where its parent is a copy, that has parted from its own already.

    Args:
        nodes: Weights of each node.
        count: Number of nodes to make, a multiple of those that there are.
        siblings: Number of nodes that have the same parent.
        parameters: Names of the tensors that get noise; those of statistics and indices must not.
        name: Name of the part; with the seed and the numbers of nodes it decides the noise.
        noise: Standard deviation of the noise, relative to the root mean square of the tensor.
        seed: Seed of the noise.
    """
    family = count // len(nodes)
    # A tree that grows again must not get the noise that its copies have already.
    again = f' of {len(nodes)}' if len(nodes) > 1 else ''
    grown = []
    for node in range(count):
        weights = dict(nodes[node // family])
        if noise and node % family and node % siblings:
            generator = torch.Generator().manual_seed(zlib.crc32(f'{seed} {name} {node}{again}'.encode()))
            for key in sorted(parameters & weights.keys()):
                tensor = weights[key]
                if tensor.is_meta or not tensor.is_floating_point():
                    continue
                random = torch.randn(tensor.shape, generator=generator, device='cpu').to(tensor.device)
                scale = noise * tensor.detach().float().square().mean().sqrt()
                weights[key] = (tensor.detach().float() + scale * random).to(tensor.dtype)
        grown.append(weights)
    return grown


def grow_weights(
        stored: dict[str, list[dict[str, torch.Tensor]]],
        model: nn.Module,
        noise: float = NOISE,
        seed: int = 0,
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return the weights of a smaller tree as those of a larger one: every member starts as one that there is.

    Args:
        stored: Weights of every node of every part, as `node_weights` returns them.
        model: The larger tree. The nodes of each of its parts are a multiple of those stored.
        noise: Standard deviation of the noise of copies, relative to the root mean square of a tensor.
        seed: Seed of the noise.
    """
    grown = {}
    parents = 1  # nodes that noise has parted
    for name, part in model.parts().items():
        if name in stored:
            one_node = part.split_state(dict(part.named_parameters()))
            parameters = set(one_node[0]) if one_node else set()
            grown[name] = grow_nodes(
                stored[name], part.nodes, part.nodes // parents, parameters, name, noise, seed)
            if parameters:  # a pooling, for one, has none
                parents = part.nodes
    return grown
