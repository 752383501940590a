"""Branched blocks and their ensembles: for families of small layers, where launches cost more than arithmetic.

All nodes of a layer are computed together, see `layers.py`.
"""
from collections.abc import Sequence
from typing import Any, Dict, Optional, Tuple  # TorchScript reads these annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint

from ..checks import check_integer
from .block import Block, check_features
from .ensemble import HierarchicalEnsemble
from .layers import BranchedConv2d, BranchedIdentity, BranchedLinear, BranchedWeights

__all__ = ['BranchedBlock', 'BranchedEnsemble']


class BranchedBlock(BranchedWeights, Block, nn.Sequential):
    """Branched layers that share a number of nodes, of which the first may branch.

    Args:
        layers: Branched layers. The first takes the features of the parents.
        nodes: Number of nodes of the block.
        out_channels: Output channels of one node.

    Features are one tensor `(B, nodes * out_channels, H, W)`.
    """

    def __init__(self, *layers: nn.Module, nodes: int, out_channels: int):
        super().__init__(*layers)
        self.nodes = self.used = nodes
        self.out_channels = out_channels
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        for layer in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(layer, x, span)
            else:
                x = layer(x, span)
        return x

    def count(self, x: torch.Tensor) -> int:
        return x.shape[1] // self.out_channels

    def pick(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        if (first, last) == (0, self.count(x)):
            return x
        # A copy, lest a view keeps the other nodes in memory.
        return x[:, first * self.out_channels:last * self.out_channels].clone()

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts, dim=1)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def split(self, x: torch.Tensor) -> torch.Tensor:
        check_features(x, self, 1)
        return x


_POOLINGS = ('avg', 'max', 'avgmax', 'catavgmax')


def _create_pool(name: str) -> SelectAdaptivePool2d:
    if name.lower() not in ('', 'fast', *_POOLINGS, *(f'fast{pooling}' for pooling in _POOLINGS)):
        raise ValueError(
            f"global_pool must be one of {', '.join(_POOLINGS)}, each also after 'fast', or '', got {name!r}.")
    return SelectAdaptivePool2d(pool_type=name)


class BranchedEnsemble(HierarchicalEnsemble):
    """A hierarchical ensemble of branched blocks, whose heads are branched linear layers too.

    Args:
        blocks: Blocks of the tree, from the image to the last feature map.
        reductions: Image size over feature map size, for each block.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of image channels.
        hidden_features: Width of one member's fully connected layer before the classifier, 0 for none.
        hidden_act_layer: Activation of that layer.
        num_members: Number of members evaluated unless the call says otherwise; all if None.
        global_pool: timm's name of a pooling, or '' for none (then there is no classifier either).
        drop_rate: Dropout rate before the classifier, from 0 to 1.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range, or a classifier is asked for without a pooling.
    """

    def __init__(
            self,
            blocks: Sequence[BranchedBlock],
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
        super().__init__(blocks, reductions, in_chans, num_members, drop_rate)
        dd = {'device': device, 'dtype': dtype}
        if hidden_features:
            pooled_features = blocks[-1].out_channels * _create_pool(global_pool).feat_mult()
            self.hidden = BranchedLinear(pooled_features, hidden_features, self.nodes[-1], **dd)
            self.hidden_act = hidden_act_layer()
        else:
            self.hidden = BranchedIdentity()
            self.hidden_act = nn.Identity()
        self._create_head(num_classes, global_pool, dd)
        if torch.device(device or 'cpu').type != 'meta':
            self.init_weights()

    def _create_head(self, num_classes: int, global_pool: str, dd: Dict[str, Any]) -> None:
        check_integer('num_classes', num_classes, 0)
        if num_classes and not global_pool:
            raise ValueError(f'A classifier of {num_classes} classes needs a pooling, got global_pool={global_pool!r}.')
        pool = _create_pool(global_pool)
        features = self.blocks[-1].out_channels * pool.feat_mult()
        if isinstance(self.hidden, BranchedLinear):
            if self.hidden.in_features != features:
                raise ValueError(f'global_pool={global_pool!r} does not fit the width of the hidden layer.')
            features = self.hidden.out_features // self.nodes[-1]
        self.num_classes = num_classes
        self.global_pool = pool
        self.poolings = pool.feat_mult() if global_pool else 0
        self.head_hidden_size = features * self.ensemble_size
        self.classifier = BranchedIdentity()
        if num_classes:
            self.classifier = BranchedLinear(features, num_classes, self.ensemble_size, **dd)
            if self.ensemble_size < self.nodes[-1]:  # a part of a tree, whose other leaves have no weights
                self.classifier.nodes, self.classifier.out_features = self.nodes[-1], num_classes * self.nodes[-1]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise all weights; the nodes of a block independently of each other, so that members start different."""
        for module in self.modules():
            if isinstance(module, (BranchedConv2d, BranchedLinear)):
                module.init_weights()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def head_parts(self) -> Dict[str, nn.Module]:
        return {name: getattr(self, name) for name in ('hidden', 'classifier') if hasattr(getattr(self, name), 'nodes')}

    @torch.jit.ignore
    def remove_head(self) -> None:
        self.hidden = BranchedIdentity()
        self.hidden_act = nn.Identity()
        self.reset_classifier(0, '')

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
            TypeError: `num_classes` is not an integer.
            ValueError: `num_classes` is negative, a classifier is asked for with `global_pool=''`, or the pooling is
                unknown or does not fit the hidden layer. The model is then as it was.
        """
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ('avg' if num_classes else '')
        self._create_head(num_classes, global_pool, get_device_dtype(self))
        self.classifier.train(self.training)
        self.global_pool.train(self.training)

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
        features = self.blocks[-1].out_channels
        x = x.reshape(x.shape[0], self.poolings, stop - start, features).transpose(1, 2).flatten(2)
        x = self.hidden_act(self.hidden(x, span))
        if self.drop_rate > 0.:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x, span)
