"""The timm contract of a hierarchical neural ensemble, written once for every family."""
# TorchScript reads these annotations.
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models._features import feature_take_indices

from .layers import BranchedConv2d, BranchedIdentity, BranchedLinear, TreeBlock
from .tree import node_span, validate_num_members

__all__ = ['HierarchicalEnsemble']


@torch.fx.wrap
def check_images(x: torch.Tensor, in_chans: int) -> None:
    """Raise a ValueError unless `x` is a batch of images `(B, in_chans, H, W)` with at least one pixel."""
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f'x must be images (B, {in_chans}, H, W) of at least 1x1 pixels, got shape {list(x.shape)}.')


class HierarchicalEnsemble(nn.Module):
    """N networks in a tree that shares their early blocks (Eq. 1 to 5 of the paper).

    `model(x)` returns the mean of the members' logits. `model(x, num_members=n)` evaluates the first n members only and
    computes only the nodes that these need.

    Args:
        blocks: Blocks of the tree, from the image to the last feature map.
        reductions: Image size over feature map size, for each block.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        hidden_features: Width of one member's fully connected layer before the classifier, 0 for none.
        hidden_act_layer: Activation of that layer.
        num_members: Number of members evaluated unless the call says otherwise; all if None.
        global_pool: timm's name of a pooling, or '' for none (then there is no classifier either).
        drop_rate: Dropout rate before the classifier.

    Attributes:
        nodes: Number of nodes of each block.
        ensemble_size: Number of members, N.
        num_leaves: Leaves of the tree: N, unless `extract` left some out.
        blocks: The blocks of the tree; `blocks[b](x, span)` computes some of the nodes of block b.
        num_features: Channels of the last feature map, all members together.
        head_hidden_size: Features before the classifier, all members together.

    Raises:
        TypeError: `num_members` is not an integer.
        ValueError: `num_members` is not from 1 to N, or a classifier is asked for without a pooling.
    """
    # The scripted module keeps the default that it was scripted with.
    __jit_unused_properties__ = ['num_members', 'feature_info']  # noqa: RUF012

    def __init__(
            self,
            blocks: Sequence[TreeBlock],
            reductions: Sequence[int],
            num_classes: int,
            in_chans: int,
            hidden_features: int = 0,
            hidden_act_layer: type = nn.Identity,
            num_members: Optional[int] = None,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.nodes = tuple(block.nodes for block in blocks)
        self.ensemble_size = self.num_leaves = self.nodes[-1]
        self._num_members = self.ensemble_size
        self.num_members = num_members
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        self.blocks = nn.Sequential(*blocks)
        self.reductions = tuple(reductions)
        self.num_features = blocks[-1].nodes * blocks[-1].out_channels
        dd = {'device': device, 'dtype': dtype}
        if hidden_features:
            pooled_features = blocks[-1].out_channels * SelectAdaptivePool2d(pool_type=global_pool).feat_mult()
            self.hidden = BranchedLinear(pooled_features, hidden_features, self.ensemble_size, **dd)
            self.hidden_act = hidden_act_layer()
        else:
            self.hidden = BranchedIdentity()
            self.hidden_act = nn.Identity()
        self._create_head(num_classes, global_pool, dd)
        self.init_weights()

    def _create_head(self, num_classes: int, global_pool: str, dd: Dict[str, Any]) -> None:
        if num_classes < 0:
            raise ValueError(f'num_classes must be positive, or 0 for no classifier, got {num_classes}.')
        if num_classes and not global_pool:
            raise ValueError(f'A classifier of {num_classes} classes needs a pooling, got global_pool={global_pool!r}.')
        pool = SelectAdaptivePool2d(pool_type=global_pool)
        features = self.num_features // self.nodes[-1] * pool.feat_mult()
        if isinstance(self.hidden, BranchedLinear):
            if self.hidden.in_features != features:
                raise ValueError(f'global_pool={global_pool!r} does not fit the width of the hidden layer.')
            features = self.hidden.out_features
        self.num_classes = num_classes
        self.global_pool = pool
        self.poolings = pool.feat_mult() if global_pool else 0
        self.head_hidden_size = features * self.nodes[-1]
        self.classifier = BranchedIdentity()
        if num_classes:
            self.classifier = BranchedLinear(features, num_classes, self.ensemble_size, **dd)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise all weights; the nodes of a block independently of each other, so that members start different."""
        for module in self.modules():
            if isinstance(module, (BranchedConv2d, BranchedLinear)):
                module.init_weights()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    @property
    def num_members(self) -> int:
        """Number of members that are evaluated unless the call says otherwise."""
        return self._num_members

    @num_members.setter
    def num_members(self, num_members: Optional[int]) -> None:
        if num_members is None:
            num_members = self.ensemble_size
        self._num_members = validate_num_members(num_members, self.ensemble_size)

    @property
    def feature_info(self) -> List[Dict[str, Any]]:
        """Channels, reduction and name of the feature map of each block, for `self.num_members` members."""
        return [
            dict(
                num_chs=node_span(block.nodes, 0, self.num_members, self.num_leaves)[1] * block.out_channels,
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
        span = node_span(num_nodes, 0, num_members, self.num_leaves)
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

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifiers of all members, one module: weight `(N * num_classes, F)`, bias `(N * num_classes,)`."""
        return self.classifier

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one, or remove it.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: timm's name of a pooling, '' for none. As it is if None, except that a classifier brings back
                the average pooling of a model that has none.

        Raises:
            ValueError: `num_classes` is negative, a classifier is asked for with `global_pool=''`, or the pooling does
                not fit the hidden layer. The model is then as it was.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ('avg' if num_classes else '')
        self._create_head(num_classes, global_pool, get_device_dtype(self))
        self.classifier.train(self.training)
        self.global_pool.train(self.training)

    def forward_features(self, x: torch.Tensor, num_members: Optional[int] = None) -> torch.Tensor:
        """Compute the last feature maps of the first n members.

        Args:
            x: Images `(B, C, H, W)`.
            num_members: Number of members n; `self.num_members` if None.

        Returns:
            Feature maps `(B, n * F, H', W')`, member-major.
        """
        check_images(x, self.in_chans)
        num_members = self._resolve_num_members(num_members)
        for block in self.blocks:
            x = block(x, self._span(block.nodes, num_members))
        return x

    def head_members(
            self,
            x: torch.Tensor,
            span: Optional[Tuple[int, int]] = None,
            pre_logits: bool = False,
    ) -> torch.Tensor:
        """Compute the members' logits from their last feature maps.

        Args:
            x: Feature maps `(B, n * F, H, W)` of the members in `span`.
            span: Half-open range of members; all if None.
            pre_logits: Return the features before the classifier instead.

        Returns:
            Logits `(B, n, num_classes)`, or features `(B, n, head_hidden_size // N)`.

        Raises:
            ValueError: The model has no pooling.
        """
        start, stop = (0, self.nodes[-1]) if span is None else span
        if self.poolings == 0:
            raise ValueError("The features of a member need a pooling, got global_pool=''.")
        x = self.global_pool(x)
        # A pooling that concatenates several ones does so for all members at once; bring each member's together.
        features = self.num_features // self.nodes[-1]
        x = x.reshape(x.shape[0], self.poolings, stop - start, features).transpose(1, 2).flatten(2)
        x = self.hidden_act(self.hidden(x, span))
        if self.drop_rate > 0.:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x, span)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the ensemble's logits from the feature maps that `forward_features` returns.

        Args:
            x: Feature maps `(B, n * F, H, W)`.
            pre_logits: Return the features before the classifiers instead.

        Returns:
            Logits `(B, num_classes)`, the mean over the n members (Eq. 5). Features `(B, n * F)` with `pre_logits` or
            without a classifier; the feature maps themselves without a pooling.
        """
        return self._forward_head(x, x.shape[1] * self.nodes[-1] // self.num_features, pre_logits)

    def _forward_head(self, x: torch.Tensor, num_members: int, pre_logits: bool = False) -> torch.Tensor:
        if self.poolings == 0:
            return x
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
            TypeError: `num_members` is not an integer.
            ValueError: `num_members` is not from 1 to `self.ensemble_size`, or the model has no pooling.
        """
        num_members = self._resolve_num_members(num_members)
        x = self.forward_features(x, num_members)
        return self.head_members(x, self._span(self.num_leaves, num_members))

    def forward(self, x: torch.Tensor, num_members: Optional[int] = None) -> torch.Tensor:
        """Compute the ensemble's logits, the mean over the first n members (Eq. 5).

        Args:
            x: Images `(B, C, H, W)`.
            num_members: Number of members n, from 1 to `self.ensemble_size`; `self.num_members` if None.

        Returns:
            Logits `(B, num_classes)`.

        Raises:
            TypeError: `num_members` is not an integer.
            ValueError: `num_members` is not from 1 to `self.ensemble_size`.
        """
        num_members = self._resolve_num_members(num_members)
        return self._forward_head(self.forward_features(x, num_members), num_members)

    @torch.jit.ignore
    def anytime(
            self,
            x: torch.Tensor,
            schedule: Optional[Sequence[int]] = None,
            deadline: Optional[float] = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the logits after more and more members; see `timm_hne.inference.anytime`."""
        from .inference import anytime
        return anytime(self, x, schedule, deadline)

    @torch.jit.ignore
    def extract(self, num_members: int) -> 'HierarchicalEnsemble':
        """Return an ordinary model that holds the first n members only; see `timm_hne.extract.extract`."""
        from .extract import extract
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
            The last feature map and those of the blocks asked for, or the latter only.

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
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
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

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
        self.blocks = self.blocks[:max_index + 1]
        self.nodes = self.nodes[:max_index + 1]
        self._num_members = node_span(self.nodes[-1], 0, self._num_members, self.num_leaves)[1]
        self.ensemble_size = node_span(self.nodes[-1], 0, self.ensemble_size, self.num_leaves)[1]
        self.num_leaves = self.nodes[-1]
        self.num_features = self.nodes[-1] * self.blocks[-1].out_channels
        if prune_head:
            self.hidden = BranchedIdentity()
            self.hidden_act = nn.Identity()
            self.reset_classifier(0, '')
        return take_indices
