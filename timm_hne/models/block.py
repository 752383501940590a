"""The block protocol: all that the rest of the package knows of a block of the tree.

A block is one level of the tree: `nodes` instances of the same layers. Its features are what its nodes compute from the
features of their parents. Nobody but the block looks into them: the ensemble hands them from block to block, and asks
the block to pick, join or merge them.

    BranchedBlock      all nodes of a layer in one tensor and one grouped convolution (`branched.py`)
    ReplicatedBlock    one plain module per node, features in a list (`replicated.py`)
"""
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

State = Mapping[str, torch.Tensor]


def check_features(x: torch.Tensor, block: 'Block', axis: int) -> None:
    """Make sure that `x` holds features of some of a block's nodes, their channels side by side.

    Raises:
        TypeError: It is no tensor, or not one of floating point numbers.
        ValueError: It is of another shape.
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f'x must be a floating point tensor of feature maps, got {kind}.')
    channels = x.shape[axis] if -x.dim() <= axis < x.dim() else 0
    count, rest = divmod(channels, block.out_channels)
    if rest or not 1 <= count <= block.nodes:
        raise ValueError(
            f'x must be feature maps of 1 to {block.nodes} members, {block.out_channels} channels each along axis '
            f'{axis}, got shape {list(x.shape)}.')


class NodeWeights:
    """Weights of `nodes` alike instances: what can be counted, compared, cut and copied node by node.

    Blocks have them, and so have the heads of the members.

    Attributes:
        nodes: Number of instances.
        used: Number of instances that have weights: the first ones, all of them unless `keep` left some out.
    """
    nodes: int
    used: int

    @abstractmethod
    def split_state(self, state: State) -> list[dict[str, torch.Tensor]]:
        """Take a state dict of such a module, with any number of nodes, apart: one dict per node, with equal names.

        Raises:
            ValueError: The tensors are not those of a whole number of nodes.
        """

    @abstractmethod
    def join_state(self, parts: Sequence[State]) -> dict[str, torch.Tensor]:
        """Return the state dict of a module whose nodes have these weights; the inverse of `split_state`."""

    @abstractmethod
    def keep(self, used: int, nodes: int, parents: int) -> nn.Module:
        """Return a copy that has the weights of the first `used` nodes only, and shares no memory with this one.

        Args:
            used: Number of nodes that have weights.
            nodes: Number of nodes of the copy, in the tree where it stands.
            parents: Number of nodes of the block before it there; 1 for the first block, whose parent is the image.
        """


class Block(NodeWeights, nn.Module):
    """One level of the tree.

    Attributes:
        nodes: Number of nodes.
        used: Number of nodes that have weights.
        out_channels: Channels of the features of one node.
        grad_checkpointing: Whether to recompute the layers in the backward pass instead of keeping their activations.
    """
    out_channels: int
    grad_checkpointing: bool

    @abstractmethod
    def forward(self, x: Any, span: tuple[int, int] | None = None) -> Any:
        """Compute the features of the nodes in the half-open range `span`, all if None, from exactly their parents'."""

    @abstractmethod
    def count(self, x: Any) -> int:
        """Return of how many nodes `x` holds the features."""

    @abstractmethod
    def pick(self, x: Any, first: int, last: int) -> Any:
        """Return the features of the nodes `first` to `last - 1` of those in `x`, which need not stay in memory."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Any:
        """Return the features of neighbouring nodes, given in parts, together."""

    @abstractmethod
    def merge(self, x: Any) -> torch.Tensor:
        """Return features as one tensor that has the channels of all nodes side by side."""

    def feature_map(self, x: Any) -> torch.Tensor:
        """Return features as `merge` does, but feature maps as `(B, C, H, W)` in any case."""
        return self.merge(x)

    @abstractmethod
    def split(self, x: torch.Tensor) -> Any:
        """Return the features that such a tensor holds; the inverse of `merge`.

        Raises:
            TypeError: `x` is no floating point tensor.
            ValueError: It is of another shape.
        """
