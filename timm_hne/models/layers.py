"""Branched layers: the nodes of one layer of the tree, computed together.

Feature maps are `(B, nodes * C, H, W)` and node-major: node `k` owns the channels `k * C` to `(k + 1) * C - 1`. Where a
layer branches, the children of a parent are neighbours, so branching is one grouped convolution with one group per
parent and more outputs: nothing is replicated, unlike in Fig. 2 of the paper.

Every `forward` takes a `span`, the half-open range of the layer's nodes to compute, and expects in `x` exactly the
parents of these nodes. `None` means all nodes. A prefix is the span that starts at 0; anytime inference uses others.
"""
import copy
import math
from collections.abc import Sequence
from typing import List, Optional, Tuple  # TorchScript reads these annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath, drop_path

from .block import NodeWeights, State
from .convolution import convolve_in_training, has_slow_gradient


class BranchedWeights(NodeWeights):
    """Node-major weights: the first axis of every tensor is that of the nodes, times what one node has of it."""

    def split_state(self, state: State) -> list[dict[str, torch.Tensor]]:
        own = self.state_dict()
        rows = {name: tensor.shape[0] // self.used for name, tensor in own.items() if tensor.dim()}
        sizes = {name: (len(state[name]), rows[name]) for name in rows if name in state and state[name].dim()}
        count = max((size // one for size, one in sizes.values()), default=0)
        wrong = [f'{name} {size}, {one} a node' for name, (size, one) in sizes.items() if size != count * one]
        if not count or wrong:
            raise ValueError(
                f'the rows of the tensors do not make {count or "any"} nodes: {"; ".join(wrong[:3]) or sorted(state)}.')
        parts = {name: t.chunk(count) if name in rows and t.dim() else [t] * count for name, t in state.items()}
        return [{name: parts[name][node] for name in parts} for node in range(count)]

    def join_state(self, parts: Sequence[State]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([part[name] for part in parts]) if tensor.dim() else tensor
            for name, tensor in parts[0].items()
        }

    def keep(self, used: int, nodes: int, parents: int) -> nn.Module:
        # Telling deepcopy what to put in the place of each tensor spares a copy of those that are cut.
        memo: dict[int, object] = {}
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.dim():
                cut = tensor.detach()[:tensor.shape[0] // self.used * used].clone()
                memo[id(tensor)] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
        result = copy.deepcopy(self, memo)
        for module in result.modules():
            if isinstance(module, BranchedConv2d):
                # The layers that branch take the features of the parents, the others those of their own nodes.
                new_parents = nodes if module.parents == self.nodes else parents
                module.in_channels = module.in_channels // module.parents * new_parents
                module.out_channels = module.out_channels // module.nodes * nodes
                module.groups = module.groups // module.parents * new_parents
                module.parents, module.nodes = new_parents, nodes
            elif isinstance(module, BranchedLinear):
                module.out_features = module.out_features // module.nodes * nodes
            elif hasattr(module, 'num_features'):
                module.num_features = module.weight.shape[0]
        result.nodes, result.used = nodes, used
        return result


class BranchedConv2d(nn.Conv2d):
    """Convolution of `nodes` nodes whose inputs come from `parents` nodes.

    Args:
        in_channels: Input channels of one node.
        out_channels: Output channels of one node.
        kernel_size: Height and width of the kernel; the padding keeps the resolution at stride 1.
        parents: Number of nodes of the previous layer. Divides `nodes`.
        nodes: Number of nodes of this layer.
        stride: Stride in pixels.
        groups: Groups within one node; `in_channels` makes a depth-wise convolution. A branching layer has one.

    Shape:
        - x: `(B, parents * in_channels, H, W)`, or the parents of `span` only.
        - Output: `(B, nodes * out_channels, H', W')`, or the nodes of `span` only.

    Raises:
        ValueError: `groups` is not 1 in a branching layer.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            parents: int,
            nodes: int,
            stride: int = 1,
            groups: int = 1,
            device=None,
            dtype=None,
    ):
        if groups != 1 and parents != nodes:
            raise ValueError(f'groups must be 1 where {parents} parents branch into {nodes} nodes, got {groups}.')
        super().__init__(
            parents * in_channels,
            nodes * out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=parents * groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.parents = parents
        self.nodes = nodes

    def init_weights(self) -> None:
        """Kaiming normal initialisation with the fan-out of one node, independent for every node."""
        groups_per_node = self.groups // self.parents
        fan_out = self.kernel_size[0] * self.kernel_size[1] * self.out_channels // self.nodes // groups_per_node
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        if not torch.jit.is_scripting() and self.training:
            if span is None and has_slow_gradient(x, self.weight, self.stride, self.groups):
                return convolve_in_training(x, self.weight, self.groups)
            # On a CPU, the backward pass of a strided depth-wise convolution takes five to ten times as long in
            # bfloat16 as in float32.
            slow = self.stride[0] > 1 and self.groups > self.parents
            if slow and torch.is_autocast_enabled('cpu') and x.device.type == 'cpu':
                with torch.autocast('cpu', enabled=False):
                    return self.convolve_nodes(x.to(self.weight.dtype), span)
        return self.convolve_nodes(x, span)

    def convolve_nodes(self, x: torch.Tensor, span: Optional[Tuple[int, int]]) -> torch.Tensor:
        """Compute the nodes of `span`, all if None."""
        if span is None:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        start, stop = span
        branching = self.nodes // self.parents
        # Parents whose children are all asked for share one convolution; the span may cut the family of the first and
        # of the last parent, which then have a convolution of their own.
        whole_start = min(-(-start // branching) * branching, stop)
        whole_stop = max(stop // branching * branching, whole_start)
        cuts = [start, whole_start, whole_stop, stop]
        in_channels = self.in_channels // self.parents
        outputs: List[torch.Tensor] = []
        for i in range(3):
            first, last = cuts[i], cuts[i + 1]
            if first < last:
                parent_start = first // branching - start // branching
                parent_stop = -(-last // branching) - start // branching
                features = x[:, parent_start * in_channels:parent_stop * in_channels]
                outputs.append(self.convolve(features, first, last, parent_stop - parent_start))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def convolve(self, x: torch.Tensor, first: int, last: int, parents: int) -> torch.Tensor:
        """Compute the nodes `first` to `last - 1` from their parents, all of which have the same number of children."""
        out_channels = self.out_channels // self.nodes
        weight, bias = self.weight[first * out_channels:last * out_channels], self.bias
        if bias is not None:  # where a batch normalisation is folded into the layer
            bias = bias[first * out_channels:last * out_channels]
        groups = parents * (self.groups // self.parents)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, parents={self.parents}, nodes={self.nodes}'


def _check_prefix_norm(bn: nn.Module) -> None:
    """Refuse what the functional normalisation of a prefix would silently do otherwise."""
    if bn.training and isinstance(bn, nn.SyncBatchNorm):
        raise RuntimeError(
            'num_members must be that of all members to train with synchronised batch normalisation: some nodes alone '
            'would not be synchronised.')
    if bn.training and bn.momentum is None:
        raise ValueError(
            'momentum of a batch normalisation must be a number to train a part of the members, got None, an average '
            'over all batches, which are not counted for each node.')


class ConvNormAct(nn.Module):
    """Branched convolution, batch normalisation and activation.

    Args:
        in_channels: Input channels of one node.
        out_channels: Output channels of one node.
        kernel_size: Height and width of the kernel.
        parents: Number of nodes of the previous layer.
        nodes: Number of nodes of this layer.
        stride: Stride in pixels.
        groups: Groups within one node.
        act_layer: Activation, or None for none.

    Shape:
        As `BranchedConv2d`.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            parents: int,
            nodes: int,
            stride: int = 1,
            groups: int = 1,
            act_layer: Optional[type] = nn.ReLU,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = BranchedConv2d(in_channels, out_channels, kernel_size, parents, nodes, stride, groups, **dd)
        # timm's own module, called as it is on the full path, so that converting it (synchronised or frozen batch
        # normalisation) works as for any timm model.
        self.bn = BatchNormAct2d(nodes * out_channels, apply_act=act_layer is not None, act_layer=act_layer, **dd)

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        x = self.conv(x, span)
        if span is None:
            return self.bn(x)
        channels = self.conv.out_channels // self.conv.nodes
        start, stop = span[0] * channels, span[1] * channels
        bn = self.bn
        training, momentum = False, 0.
        if hasattr(bn, 'momentum'):  # timm's frozen batch normalisation has none and always uses its own statistics
            if not torch.jit.is_scripting():
                _check_prefix_norm(bn)
            training = bn.training
            if training:
                momentum = bn.momentum
        x = F.batch_norm(
            x,
            bn.running_mean[start:stop],
            bn.running_var[start:stop],
            bn.weight[start:stop],
            bn.bias[start:stop],
            training,
            momentum,
            bn.eps,
        )
        return bn.act(x)


class BranchedDropPath(DropPath):
    """Stochastic depth: while training, leaves out the path of an image at random, for each node by itself.

    Args:
        drop_prob: Share of the paths that are left out, from 0 to 1.
        channels: Channels of one node.

    Shape:
        - x: `(B, nodes * channels, H, W)`, of any number of nodes.
        - Output: As x.
    """

    def __init__(self, drop_prob: float, channels: int):
        super().__init__(drop_prob)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0. or not self.training:
            return x
        batch_size, nodes = x.shape[0], x.shape[1] // self.channels
        kept = drop_path(x.new_ones(batch_size * nodes, 1), self.drop_prob, True, self.scale_by_keep)
        return x * kept.expand(-1, self.channels).reshape(batch_size, -1, 1, 1)


class BranchedLinear(BranchedWeights, nn.Linear):
    """One linear layer per node.

    It is PyTorch's by type, shapes and names, so that whoever initialises, counts or converts linear layers knows it;
    transformers, for one, fills a classifier of another size by type alone.

    Args:
        in_features: Input features of one node.
        out_features: Output features of one node; the attribute of this name counts those of all nodes, as the channels
            of `BranchedConv2d` do.
        nodes: Number of nodes.

    Shape:
        - x: `(B, nodes, in_features)`, or the nodes of `span` only.
        - Output: `(B, nodes, out_features)`, or the nodes of `span` only.
    """

    def __init__(self, in_features: int, out_features: int, nodes: int, device=None, dtype=None):
        super().__init__(in_features, nodes * out_features, device=device, dtype=dtype)
        self.nodes = self.used = nodes

    def reset_parameters(self) -> None:
        """The initialisation of `nn.Linear` for the weights, zero for the bias."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    init_weights = reset_parameters

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        out_features = self.out_features // self.nodes
        weight, bias = self.weight, self.bias
        if span is not None:  # the gradient of a slice, even of all, is a copy into zeros
            weight = weight[span[0] * out_features:span[1] * out_features]
            bias = bias[span[0] * out_features:span[1] * out_features]
        weight = weight.view(-1, out_features, self.in_features)
        x = torch.matmul(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
        return x + bias.view(-1, out_features)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, nodes={self.nodes}'


class BranchedIdentity(nn.Identity):
    """Stands where a `BranchedLinear` is left out."""

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        return x
