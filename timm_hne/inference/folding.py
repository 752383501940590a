"""Batch normalisation folded into the convolutions before it, where a module says plainly what follows what."""
import copy

import timm.layers
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from ..models.ensemble import HierarchicalEnsemble
from ..models.layers import BranchedConv2d, ConvNormAct


class FoldedConv(BranchedConv2d):
    """A `ConvNormAct` whose batch normalisation is part of the weights.

    Args:
        layer: The layer to fold, in evaluation mode.
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
        tensors = (conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        weight, mean, var, scale, shift = (tensor.double() for tensor in tensors)
        weight, bias = fuse_conv_bn_weights(weight, None, mean, var, bn.eps, scale, shift)
        self.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        self.act = bn.act

    def forward(self, x: Tensor, span: tuple[int, int] | None = None) -> Tensor:
        return self.act(super().forward(x, span))


def folded(model: HierarchicalEnsemble) -> HierarchicalEnsemble:
    """Return a copy of a model in evaluation mode with folded batch normalisations and frozen weights."""
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        fold(model)
    return model


def fold(module: nn.Module) -> None:
    """Fold the batch normalisations inside a module in evaluation mode, in place.

    Branched layers become `FoldedConv`. In modules of other kinds a convolution is folded if it is followed by a batch
    normalisation in an `nn.Sequential` or in timm's `ConvNormAct`; of code that calls its modules one by one nothing is
    known here, and they stay as they are.
    """
    for name, child in module.named_children():
        if isinstance(child, ConvNormAct):
            setattr(module, name, FoldedConv(child))
        else:
            fold(child)
    pairs: list[tuple[str, str]] = []
    if type(module).forward is nn.Sequential.forward:
        names = [name for name, _ in module.named_children()]
        pairs = list(zip(names, names[1:]))
    elif type(module) is timm.layers.ConvNormAct:
        pairs = [('conv', 'bn')]
    for name, following in pairs:
        conv, bn = getattr(module, name), getattr(module, following)
        known = type(conv) is nn.Conv2d and type(bn) in (nn.BatchNorm2d, timm.layers.BatchNormAct2d)
        if known and bn.track_running_stats:
            setattr(module, name, fuse_conv_bn_eval(conv, bn))
            setattr(module, following, getattr(bn, 'act', nn.Identity()))  # timm's drops nothing in evaluation mode
