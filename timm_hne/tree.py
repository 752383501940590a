"""The tree of a hierarchical neural ensemble, as integer arithmetic. No torch in here.

Block `b` of the tree has `nodes[b]` nodes, `nodes[-1]` being N, the number of ensemble members. The children of a node
are neighbours, so the members that descend from one node are neighbours too: member `m` runs through node
`m * nodes[b] // N` of block `b`, and the first n members need the first `ceil(n * nodes[b] / N)` nodes of it.

    nodes                   sharing scheme (Fig. 5 of the paper)
    (1, 2, 4, 8, 16)        hierarchical: a binary tree
    (1, 1, 1, 16, 16)       multi-branch: a shared backbone, then 16 branches
    (16, 16, 16, 16, 16)    independent networks
    (1, 3, 3, 6, 12)        any other tuple whose entries divide the next one
"""
from collections.abc import Sequence

from .checks import check_integer

# Nodes that a block may have: 64 times those of the paper's largest tree. The time and memory of a model grow with
# them, so a slip (16384 for 16) would build for minutes.
MAX_NODES = 1024


def validate_nodes(nodes: Sequence[int], num_blocks: int | None = None) -> tuple[int, ...]:
    """Check a sharing scheme and return it as a tuple.

    Args:
        nodes: Number of nodes of each block, from the image to the classifier.
        num_blocks: Number of blocks of the architecture, if it is fixed.

    Raises:
        TypeError: `nodes` is not a sequence of integers.
        ValueError: `nodes` has the wrong length, an entry below 1 or above `MAX_NODES`, or an entry that does not
            divide the next one.
    """
    if isinstance(nodes, (str, bytes)) or not isinstance(nodes, Sequence):
        raise TypeError(f'nodes must be a tuple of integers, one per block, got {nodes!r}.')
    if any(isinstance(count, bool) or not isinstance(count, int) for count in nodes):
        raise TypeError(f'nodes must hold integers only, got {nodes!r}.')
    nodes = tuple(nodes)
    if not nodes or (num_blocks is not None and len(nodes) != num_blocks):
        expected = 'at least one entry' if num_blocks is None else f'{num_blocks} entries, one per block'
        raise ValueError(f'nodes must have {expected}, got {len(nodes)}: {nodes}.')
    if min(nodes) < 1 or max(nodes) > MAX_NODES:
        raise ValueError(f'nodes must be from 1 to {MAX_NODES} in every block, got {nodes}.')
    for parents, children in zip(nodes, nodes[1:]):
        if children % parents:
            raise ValueError(f'every entry of nodes must divide the next, not so {parents} and {children}: {nodes}.')
    return nodes


def validate_num_members(num_members: int, ensemble_size: int) -> int:
    """Check a number of members to evaluate and return it.

    Raises:
        TypeError: `num_members` is not an integer.
        ValueError: `num_members` is outside 1..`ensemble_size`.
    """
    return check_integer('num_members', num_members, 1, ensemble_size)


def prefixes(ensemble_size: int) -> tuple[int, ...]:
    """Return the paper's operating points: the powers of two below N, then N (Eq. 5)."""
    return *(2 ** b for b in range((ensemble_size - 1).bit_length())), ensemble_size


def node_span(num_nodes: int, start: int, stop: int, ensemble_size: int) -> tuple[int, int]:
    """Return the half-open range of a block's nodes that the members `start` to `stop - 1` run through.

    Args:
        num_nodes: Number of nodes of the block.
        start: First member, counted from 0.
        stop: One past the last member.
        ensemble_size: Number of members, N.
    """
    return start * num_nodes // ensemble_size, -(-stop * num_nodes // ensemble_size)
