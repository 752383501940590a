"""The timm contract of a hierarchical neural ensemble, written once for every family."""
# TorchScript reads these annotations.
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.models._features import feature_take_indices

from ..checks import check_integer, check_number
from ..tree import node_span, validate_num_members
from .anytime import anytime, check_images
from .block import Block, NodeWeights
from .extract import extract

__all__ = ['HierarchicalEnsemble']

torch.fx.wrap('check_images')  # its conditions are about values, which a tracer has none of


class HierarchicalEnsemble(nn.Module):
    """N networks in a tree that shares their early blocks (Eq. 1 to 5 of the paper).

    `model(x)` returns the mean of the members' logits. `model(x, num_members=n)` evaluates the first n members only and
    computes only the nodes that these need.

    What the blocks are made of is their own affair (`block.py`). A kind of ensemble adds the heads of its members:
    `BranchedEnsemble` and `ReplicatedEnsemble` do.

    Args:
        blocks: Blocks of the tree, from the image to the last features.
        reductions: Image size over feature map size, for each block.
        in_chans: Number of image channels.
        num_members: Number of members evaluated unless the call says otherwise; all if None.
        drop_rate: Dropout rate before the classifier, from 0 to 1.

    Attributes:
        nodes: Number of nodes of each block; the last one is the number of leaves.
        ensemble_size: Number of members, N: the leaves, unless `extract` left some out.
        blocks: The blocks of the tree; `blocks[b](x, span)` computes some of the nodes of block b.
        num_classes: Number of classes, 0 without a classifier.
        num_features: Channels of the last features, all leaves together.
        head_hidden_size: Features before the classifier, all members together.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range.
    """
    # Modules whose weights belong to one set of classes, and are left out for another.
    classifier_names: Tuple[str, ...] = ('classifier',)

    # The scripted module keeps the default that it was scripted with.
    __jit_unused_properties__ = ['num_members', 'feature_info']  # noqa: RUF012

    def __init__(
            self,
            blocks: Sequence[Block],
            reductions: Sequence[int],
            in_chans: int,
            num_members: Optional[int] = None,
            drop_rate: float = 0.,
    ):
        super().__init__()
        self.nodes = tuple(block.nodes for block in blocks)
        self.ensemble_size = self.nodes[-1]
        self._num_members = self.ensemble_size
        self.num_members = num_members
        self.in_chans = check_integer('in_chans', in_chans, 1)
        self.drop_rate = check_number('drop_rate', drop_rate, 0, 1)
        self.blocks = nn.Sequential(*blocks)
        self.reductions = tuple(reductions)
        self.num_features = blocks[-1].nodes * blocks[-1].out_channels

    # What a kind of ensemble adds: the heads of its members.

    def head_members(
            self,
            x: torch.Tensor,
            span: Optional[Tuple[int, int]] = None,
            pre_logits: bool = False,
    ) -> torch.Tensor:
        """Compute the members' logits from their last features.

        Args:
            x: Features of the last block, of the members in `span`.
            span: Half-open range of members; all if None.
            pre_logits: Return the features before the classifier instead.

        Returns:
            Logits `(B, n, num_classes)`, or features `(B, n, head_hidden_size // N)`.

        Raises:
            ValueError: The model has no pooling.
        """
        raise NotImplementedError

    def head_parts(self) -> Dict[str, NodeWeights]:
        """The modules of the heads that have weights for each member, by their names."""
        raise NotImplementedError

    def remove_head(self) -> None:
        """Remove classifier, pooling and whatever else stands behind the last block."""
        raise NotImplementedError

    @property
    def num_members(self) -> int:
        """Number of members that are evaluated unless the call says otherwise."""
        return self._num_members

    @num_members.setter
    def num_members(self, num_members: Optional[int]) -> None:
        if num_members is None:
            num_members = self.ensemble_size
        self._num_members = validate_num_members(num_members, self.ensemble_size)
        if '_model_args' in self.__dict__:  # by which timm saves how to make the model again
            self._model_args = {name: value for name, value in self._model_args.items() if name != 'num_members'}
            if num_members < self.ensemble_size:
                self._model_args['num_members'] = num_members

    @torch.jit.ignore
    def parts(self) -> Dict[str, NodeWeights]:
        """All modules that have weights for each of their nodes, by their names: the blocks, then the heads."""
        return {**{f'blocks.{b}': block for b, block in enumerate(self.blocks)}, **self.head_parts()}

    @property
    def feature_info(self) -> List[Dict[str, Any]]:
        """Channels, reduction and name of the feature map of each block, for `self.num_members` members."""
        return [
            dict(
                num_chs=node_span(block.nodes, 0, self.num_members, self.nodes[-1])[1] * block.out_channels,
                reduction=reduction,
                module=f'blocks.{b}',
            )
            for b, (block, reduction) in enumerate(zip(self.blocks, self.reductions))
        ]

    def _resolve_num_members(self, num_members: Optional[int]) -> int:
        if torch.jit.is_scripting():
            resolved = self._num_members if num_members is None else num_members
            if resolved < 1 or resolved > self.ensemble_size:
                raise ValueError(f'num_members must be from 1 to {self.ensemble_size}, got {resolved}.')
            return resolved
        else:
            # FX passes a Proxy for an argument that has a default; it stands for the default.
            if num_members is None or isinstance(num_members, torch.fx.Proxy):
                return self._num_members
            return validate_num_members(num_members, self.ensemble_size)

    def _span(self, num_nodes: int, num_members: int) -> Optional[Tuple[int, int]]:
        span = node_span(num_nodes, 0, num_members, self.nodes[-1])
        return None if span[1] == num_nodes else span

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that an optimizer must not decay, beyond timm's own rules: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r'^blocks\.0\.',
            blocks=[
                (r'^blocks\.(\d+)' if coarse else r'^blocks\.(\d+)\.(\d+)', None),
                (r'^hidden\.', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass instead of keeping their activations."""
        for block in self.blocks:
            block.grad_checkpointing = enable

    def forward_features(self, x: torch.Tensor, num_members: Optional[int] = None) -> torch.Tensor:
        """Compute the last feature maps of the first n members.

        Args:
            x: Images `(B, C, H, W)`.
            num_members: Number of members n; `self.num_members` if None.

        Returns:
            Feature maps `(B, n * F, H', W')`, member-major.

        Raises:
            TypeError: `num_members` is not an integer, or `x` no floating point tensor.
            ValueError: `num_members` is not from 1 to `self.ensemble_size`, or `x` is of another shape.
        """
        return self.blocks[-1].merge(self._forward_blocks(x, self._resolve_num_members(num_members)))

    def _forward_blocks(self, x: torch.Tensor, num_members: int) -> torch.Tensor:
        """Compute the features of the last block for the first n members."""
        check_images(x, self.in_chans)
        for block in self.blocks:
            x = block(x, self._span(block.nodes, num_members))
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the ensemble's logits from the feature maps that `forward_features` returns.

        Args:
            x: Feature maps `(B, n * F, H, W)`.
            pre_logits: Return the features before the classifiers instead.

        Returns:
            Logits `(B, num_classes)`, the mean over the n members (Eq. 5). Features `(B, n * F)` with `pre_logits` or
            without a classifier; the feature maps themselves without a pooling.

        Raises:
            TypeError: `x` is no floating point tensor.
            ValueError: It is of another shape.
        """
        block = self.blocks[-1]
        x = block.split(x)
        return self._forward_head(x, block.count(x), pre_logits)

    def _forward_head(self, x: torch.Tensor, num_members: int, pre_logits: bool = False) -> torch.Tensor:
        if self.poolings == 0:
            return self.blocks[-1].merge(x)
        x = self.head_members(x, self._span(self.nodes[-1], num_members), pre_logits)
        return x.flatten(1) if pre_logits or self.num_classes == 0 else x.mean(dim=1)

    def forward_members(self, x: torch.Tensor, num_members: Optional[int] = None) -> torch.Tensor:
        """Compute the logits of each of the first n members.

        Args:
            x: Images `(B, C, H, W)`.
            num_members: Number of members n; `self.num_members` if None.

        Returns:
            Logits `(B, n, num_classes)`; without a classifier, features `(B, n, F)`.

        Raises:
            TypeError: `num_members` is not an integer, or `x` no floating point tensor.
            ValueError: `num_members` is not from 1 to `self.ensemble_size`, `x` is of another shape, or the model has
                no pooling.
        """
        num_members = self._resolve_num_members(num_members)
        x = self._forward_blocks(x, num_members)
        return self.head_members(x, self._span(self.nodes[-1], num_members))

    def forward(self, x: torch.Tensor, num_members: Optional[int] = None) -> torch.Tensor:
        """Compute the ensemble's logits, the mean over the first n members (Eq. 5).

        Args:
            x: Images `(B, C, H, W)`.
            num_members: Number of members n, from 1 to `self.ensemble_size`; `self.num_members` if None.

        Returns:
            Logits `(B, num_classes)`.

        Raises:
            TypeError: `num_members` is not an integer, or `x` no floating point tensor.
            ValueError: `num_members` is not from 1 to `self.ensemble_size`, or `x` is of another shape.
        """
        num_members = self._resolve_num_members(num_members)
        return self._forward_head(self._forward_blocks(x, num_members), num_members)

    @torch.jit.ignore
    def anytime(
            self,
            x: torch.Tensor,
            schedule: Optional[Sequence[int]] = None,
            deadline: Optional[float] = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the logits after more and more members; see `timm_hne.inference.anytime`."""
        return anytime(self, x, schedule, deadline)

    @torch.jit.ignore
    def extract(self, num_members: int) -> 'HierarchicalEnsemble':
        """Return an ordinary model that holds the first n members only; see `timm_hne.models.extract`."""
        return extract(self, num_members)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            num_members: Optional[int] = None,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Compute the feature maps of the blocks.

        Args:
            x: Images `(B, C, H, W)`.
            indices: Blocks to return: the last n if an integer, all if None.
            norm: Has no effect, every feature map is normalised.
            stop_early: Compute nothing after the last block asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Return the feature maps of the blocks without the last one.
            num_members: Number of members; `self.num_members` if None.

        Returns:
            The last features, as `forward_features` returns them, and the feature maps `(B, C, H, W)` of the blocks
            asked for, tokens as the base has them; or the latter only.

        Raises:
            TypeError: `num_members` is not an integer, or `x` no floating point tensor.
            ValueError: `output_fmt` is not 'NCHW', `num_members` is not from 1 to `self.ensemble_size`, or `x` is of
                another shape.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        check_images(x, self.in_chans)
        num_members = self._resolve_num_members(num_members)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        intermediates: List[torch.Tensor] = []
        for b, block in enumerate(self.blocks):
            if b <= max_index or not stop_early:
                x = block(x, self._span(block.nodes, num_members))
                if b in take_indices:
                    intermediates.append(block.feature_map(x))
        if intermediates_only:
            return intermediates
        return self.blocks[max_index if stop_early else -1].merge(x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the blocks after the last one asked for, and the head.

        What is left is an ensemble of fewer members, one for each node of its last block.

        Args:
            indices: Blocks that are needed: the last n if an integer.
            prune_norm: Has no effect, no normalisation stands outside the blocks.
            prune_head: Drop the head even if no block is dropped.

        Returns:
            The indices of the blocks that are needed.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        prune_head = prune_head or max_index + 1 < len(self.blocks)
        leaves = self.nodes[-1]
        self.blocks = self.blocks[:max_index + 1]
        self.nodes = self.nodes[:max_index + 1]
        self._num_members = node_span(self.nodes[-1], 0, self._num_members, leaves)[1]
        self.ensemble_size = node_span(self.nodes[-1], 0, self.ensemble_size, leaves)[1]
        self.num_features = self.ensemble_size * self.blocks[-1].out_channels
        if prune_head:
            self.remove_head()
        return take_indices
