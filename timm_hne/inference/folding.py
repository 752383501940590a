"""Batch normalisation folded into the convolutions before it, where a module says plainly what follows what."""
import timm.layers
import torch.nn as nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models.layers import ConvNormAct
from .formulations import FoldedConv


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
