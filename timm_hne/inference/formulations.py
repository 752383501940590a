"""A branched convolution without its batch normalisation, computed in the way that is fastest on this machine."""
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..models.layers import BranchedConv2d, ConvNormAct

# A formulation other than the grouped convolution must be this much faster to be chosen: compilers fuse the
# convolution with what follows it, and timings scatter.
_ADVANTAGE = 1.15

# The fastest formulation of every convolution measured in this process.
_fastest: dict[tuple, str] = {}


def forget_measurements() -> None:
    """Forget which formulations were the fastest in this process."""
    _fastest.clear()


def _grouped(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, parents * (conv.groups // conv.parents))


def _matmul(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    x = x[:, :, ::conv.stride[0], ::conv.stride[1]]
    batch, channels, height, width = x.shape
    features = x.permute(0, 2, 3, 1).reshape(batch * height * width, parents, channels // parents)
    weight = weight.view(parents, -1, channels // parents).transpose(1, 2)
    x = torch.baddbmm(bias.view(parents, 1, -1), features.transpose(0, 1), weight)
    return x.transpose(0, 1).reshape(batch, height, width, len(bias)).permute(0, 3, 1, 2)


def _per_node(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    parts = zip(x.chunk(parents, dim=1), weight.chunk(parents), bias.chunk(parents))
    return torch.cat([F.conv2d(*part, conv.stride, conv.padding, conv.dilation) for part in parts], dim=1)


# Ways to compute the children of some parents: `(conv, x, weight, bias, parents)` to feature maps.
FORMULATIONS: dict[str, Callable[..., Tensor]] = {
    'grouped': _grouped,
    'matmul': _matmul,
    'per_node': _per_node,
}


def shortest_times(functions: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Call functions in turn, five times each; return the seconds of the shortest call of each."""
    seconds = dict.fromkeys(functions, float('inf'))
    for _ in range(5):
        for name, function in functions.items():
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            function()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


class FoldedConv(BranchedConv2d):
    """A `ConvNormAct` whose batch normalisation is part of the weights, in the formulation that is fastest here.

    Args:
        layer: The layer to fold, in evaluation mode.

    Attributes:
        formulations: The formulation in use, per (first node, last node, 'image' or 'batch'); grouped if not in here.
        measuring: Whether to measure what has no formulation yet.
    """

    def __init__(self, layer: ConvNormAct):
        conv, bn = layer.conv, layer.bn
        super().__init__(
            conv.in_channels // conv.parents,
            conv.out_channels // conv.nodes,
            conv.kernel_size[0],
            conv.parents,
            conv.nodes,
            stride=conv.stride[0],
            groups=conv.groups // conv.parents,
            device='meta',
        )
        # In double precision, so that folding itself adds no error to speak of.
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        bias = bn.bias.double() - bn.running_mean.double() * scale
        self.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        self.act = bn.act
        self.formulations: dict[tuple[int, int, str], str] = {}
        self.measuring = False

    def forward(self, x: Tensor, span: tuple[int, int] | None = None) -> Tensor:
        return self.act(super().forward(x, (0, self.nodes) if span is None else span))

    def convolve(self, x: Tensor, first: int, last: int, parents: int) -> Tensor:
        channels = self.out_channels // self.nodes
        weight = self.weight[first * channels:last * channels]
        bias = self.bias[first * channels:last * channels]
        name = 'grouped'
        if self.measuring or self.formulations:
            # The condition is decided here, also while a program for any batch is traced (its batches have two images
            # or more), so the key holds no symbol: some versions of PyTorch cannot look one up.
            key = first, last, 'image' if x.shape[0] == 1 else 'batch'
            if self.measuring and key not in self.formulations:
                self.formulations[key] = self._choose(x, weight, bias, parents)
            name = self.formulations.get(key, 'grouped')
        return FORMULATIONS[name](self, x, weight, bias, parents)

    def _choose(self, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> str:
        """Return the name of the fastest formulation, from memory if the same convolution has been measured."""
        candidates = ['grouped']
        if self.groups == self.parents and parents > 1:
            candidates += ['per_node', *(['matmul'] if self.kernel_size == (1, 1) else [])]
        if len(candidates) == 1:
            return 'grouped'
        layout = x.is_contiguous(memory_format=torch.channels_last)
        device = (x.device, torch.get_num_threads() if x.device.type == 'cpu' else None)
        key = (device, x.dtype, x.shape, layout, weight.shape, self.stride, parents)
        if key not in _fastest:
            seconds = shortest_times({
                name: functools.partial(FORMULATIONS[name], self, x, weight, bias, parents) for name in candidates
            }, x.device)
            seconds['grouped'] /= _ADVANTAGE
            _fastest[key] = min(seconds, key=seconds.get)
        return _fastest[key]
