"""The first n members of an ensemble as a model of their own."""
import copy

import torch.nn as nn

from ..tree import node_span, validate_num_members
from .frontier import check_tree


def extracted_nodes(nodes: tuple[int, ...], num_members: int) -> tuple[int, ...]:
    """Return the smallest uniform tree that holds the first n members of the tree `nodes`.

    A node that the prefix uses keeps all its children, unless it is the only one of its block: then it keeps those in
    use. So the first 3 members of `(1, 2, 4, 8, 16)`, which use `(1, 1, 1, 2, 3)` nodes, become `(1, 1, 1, 2, 4)`.
    """
    extracted: list[int] = []
    for parents, count in zip((1, *nodes), nodes):
        used = node_span(count, 0, num_members, nodes[-1])[1]
        extracted.append(used if not extracted or extracted[-1] == 1 else extracted[-1] * (count // parents))
    return tuple(extracted)


def extract(model: nn.Module, num_members: int) -> nn.Module:
    """Return a model of the same class that holds the first n members of `model` and no weight besides.

    Its `nodes` are those of the smallest uniform tree that holds the prefix. If the prefix fills that tree, as the
    powers of two do in a binary tree, the result is what `timm.create_model(..., nodes=extracted.nodes)` makes, and
    the state dict of one loads into the other. If not (3 members of a binary tree), the leaves beyond n have no
    weights: `ensemble_size` is n, less than `nodes[-1]`, and weights of nodes out of use are left out.

    Args:
        model: Any `hne_*` model. It is not changed, and shares no memory with the result.
        num_members: Number of members n, from 1 to N.

    Raises:
        TypeError: `model` is no hierarchical ensemble, or `num_members` is not an integer.
        ValueError: `num_members` is not from 1 to N.
    """
    check_tree(model, itself=True)
    num_members = validate_num_members(num_members, model.ensemble_size)
    leaves = model.nodes[-1]
    nodes = extracted_nodes(model.nodes, num_members)
    parts = model.parts()
    tree = dict(zip(parts, zip(nodes, (1, *nodes))))  # of the blocks; heads have a node for each leaf and its parent
    # What deepcopy finds in its memo it takes from there, so nothing that is left out is ever copied.
    memo = {
        id(part): part.keep(node_span(part.nodes, 0, num_members, leaves)[1], *tree.get(name, (nodes[-1], nodes[-1])))
        for name, part in parts.items()
    }
    result = copy.deepcopy(model, memo)
    result.nodes = nodes
    result.ensemble_size = num_members
    result.num_features = num_members * result.blocks[-1].out_channels
    result.head_hidden_size = model.head_hidden_size // model.ensemble_size * num_members
    # What timm writes into a config.json, from which it builds the tree again.
    result._model_args = {**getattr(model, '_model_args', {}), 'nodes': nodes}
    result.num_members = num_members
    return result
