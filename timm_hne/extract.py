"""The first n members of an ensemble as a model of their own."""
import copy

import torch.nn as nn

from .ensemble import HierarchicalEnsemble
from .layers import BranchedLinear, ConvNormAct
from .tree import node_span, validate_num_members


def extracted_nodes(nodes: tuple[int, ...], num_members: int, num_leaves: int) -> tuple[int, ...]:
    """Return the smallest uniform tree that holds the first n members of the tree `nodes`.

    A node that the prefix uses keeps all its children, unless it is the only one of its block: then it keeps those in
    use. So the first 3 members of `(1, 2, 4, 8, 16)`, which use `(1, 1, 1, 2, 3)` nodes, become `(1, 1, 1, 2, 4)`.
    """
    extracted: list[int] = []
    for parents, count in zip((1, *nodes), nodes):
        used = node_span(count, 0, num_members, num_leaves)[1]
        extracted.append(used if not extracted or extracted[-1] == 1 else extracted[-1] * (count // parents))
    return tuple(extracted)


def extract(model: HierarchicalEnsemble, num_members: int) -> HierarchicalEnsemble:
    """Return a model of the same class that holds the first n members of `model` and no weight besides.

    Its `nodes` are those of the smallest uniform tree that holds the prefix. If the prefix fills that tree, as the
    powers of two do in a binary tree, the result is what `timm.create_model(..., nodes=extracted.nodes)` makes, and
    the state dict of one loads into the other. If not (3 members of a binary tree), the leaves beyond n have no
    weights: `ensemble_size` is n, `num_leaves` the size of the tree, and weights of nodes out of use are left out.

    Args:
        model: Any `hne_*` model. It is not changed, and shares no memory with the result.
        num_members: Number of members n, from 1 to N.

    Raises:
        TypeError: `num_members` is not an integer.
        ValueError: `num_members` is not from 1 to N.
    """
    num_members = validate_num_members(num_members, model.ensemble_size)
    nodes = extracted_nodes(model.nodes, num_members, model.num_leaves)
    used = {count: node_span(count, 0, num_members, model.num_leaves)[1] for count in model.nodes}
    tree = dict(zip(model.nodes, nodes))
    # The image is the one parent of the first block, however many nodes of one there are elsewhere.
    tree.setdefault(1, 1)

    # Telling deepcopy what to put in the place of each tensor spares a copy of those that are cut.
    memo: dict[int, object] = {}

    def keep(module: nn.Module, held: int, kept: int) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dim():
                cut = tensor.detach()[:tensor.shape[0] // held * kept].clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(cut, tensor.requires_grad) if is_parameter else cut

    for module in model.modules():
        if isinstance(module, ConvNormAct):
            for part in (module.conv, module.bn):
                held = part.weight.shape[0] * module.conv.nodes // module.conv.out_channels
                keep(part, held, used[module.conv.nodes])
        elif isinstance(module, BranchedLinear):
            keep(module, module.nodes, num_members)
    result = copy.deepcopy(model, memo)

    for block in result.blocks:
        block.nodes = tree[block.nodes]
    for module in result.modules():
        if isinstance(module, ConvNormAct):
            conv = module.conv
            parents, count = tree[conv.parents], tree[conv.nodes]
            conv.in_channels = conv.in_channels // conv.parents * parents
            conv.out_channels = conv.out_channels // conv.nodes * count
            conv.groups = conv.groups // conv.parents * parents
            conv.parents, conv.nodes = parents, count
            module.bn.num_features = module.bn.weight.shape[0]
        elif isinstance(module, BranchedLinear):
            module.nodes = num_members
    result.nodes = nodes
    result.num_leaves = nodes[-1]
    result.ensemble_size = num_members
    result.num_members = num_members
    result.num_features = nodes[-1] * result.blocks[-1].out_channels
    result.head_hidden_size = model.head_hidden_size // model.num_leaves * nodes[-1]
    return result
