"""The networks as the paper implements them: replicate the feature maps, then one group a node (Figures 2 and 7).

Naive on purpose: plain convolutions, batch normalisations and activations, and a copy of its parent's feature maps for
every child, wherever a branch splits. It computes what the package's models compute, from the same weights.
"""
import torch
import torch.nn as nn

from timm_hne import HierarchicalEnsemble
from timm_hne.models.hne_mobilenetv2 import InvertedResidual
from timm_hne.models.hne_resnet import Bottleneck
from timm_hne.models.layers import BranchedLinear, ConvNormAct
from timm_hne.tree import node_span


class Replicate(nn.Module):
    """Copies feature maps along the channel axis, the maps of one parent for each of the nodes.

    Args:
        parents: Number of nodes of the previous block in the whole tree.
        nodes: Number of nodes of this block in the whole tree.
        count: Number of these nodes that are needed.
    """

    def __init__(self, parents: int, nodes: int, count: int):
        super().__init__()
        self.sources = [node * parents // nodes for node in range(count)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parents = x.chunk(self.sources[-1] + 1, dim=1)
        return torch.cat([parents[source] for source in self.sources], dim=1)


def conv_norm_act(layer: ConvNormAct, count: int) -> nn.Sequential:
    """The first `count` nodes of a layer, each of which has an input of its own: one group for each (Figure 7)."""
    conv, bn = layer.conv, layer.bn
    channels = count * conv.out_channels // conv.nodes
    dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
    new_conv = nn.Conv2d(
        count * conv.in_channels // conv.parents,
        channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=count * conv.groups // conv.parents,
        bias=False,
        **dd,
    )
    new_conv.load_state_dict({'weight': conv.weight[:channels]})
    new_bn = nn.BatchNorm2d(channels, eps=bn.eps, momentum=bn.momentum, **dd)
    new_bn.load_state_dict({
        name: value[:channels] if value.dim() else value for name, value in bn.state_dict().items()
    })
    return nn.Sequential(new_conv, new_bn, type(bn.act)(inplace=True))


def linear(layer: BranchedLinear, count: int) -> nn.Conv2d:
    """The first `count` nodes of a linear layer as a grouped convolution of 1x1 pixels."""
    rows, weight = count * layer.out_features // layer.nodes, layer.weight
    conv = nn.Conv2d(count * layer.in_features, rows, 1, groups=count, device=weight.device, dtype=weight.dtype)
    conv.load_state_dict({'weight': weight[:rows, :, None, None], 'bias': layer.bias[:rows]})
    return conv


class Residual(nn.Module):
    """A layer of Figure 7 or 8: replication where it branches, then convolutions beside a shortcut."""

    def __init__(self, replicate: nn.Module, convs: nn.Module, shortcut: nn.Module | None, act: nn.Module):
        super().__init__()
        self.replicate = replicate
        self.convs = convs
        self.shortcut = shortcut
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.replicate(x)
        y = self.convs(x)
        if self.shortcut is not None:
            y += self.shortcut(x)
        return self.act(y)


def convert(layer: nn.Module, count: int) -> nn.Module:
    """Convert the first `count` nodes of a layer of the package to the paper's implementation."""
    conv = next(module.conv for module in layer.modules() if isinstance(module, ConvNormAct))
    replicate = nn.Identity() if conv.parents == conv.nodes else Replicate(conv.parents, conv.nodes, count)
    if isinstance(layer, ConvNormAct):
        return nn.Sequential(replicate, conv_norm_act(layer, count))
    if isinstance(layer, Bottleneck):
        names, act = ('conv1', 'conv2', 'conv3'), nn.ReLU(inplace=True)
        shortcut = nn.Identity() if layer.shortcut is None else conv_norm_act(layer.shortcut, count)
    elif isinstance(layer, InvertedResidual):
        names, act = ('conv_pw', 'conv_dw', 'conv_pwl'), nn.Identity()
        shortcut = nn.Identity() if layer.has_shortcut else None
    else:
        raise TypeError(f'layer must be one of the package, got {type(layer).__name__}.')
    convs = nn.Sequential(*(conv_norm_act(getattr(layer, name), count) for name in names))
    return Residual(replicate, convs, shortcut, act)


class PaperNetwork(nn.Module):
    """The first members of an ensemble in the paper's implementation, with copies of the ensemble's weights.

    Where a branch splits, the network of a prefix goes on with the nodes it needs. It holds no other weights, so
    evaluating it slices nothing.

    Args:
        model: Model of the package, with average pooling.
        num_members: Number of members; all if None.
    """

    def __init__(self, model: HierarchicalEnsemble, num_members: int | None = None):
        super().__init__()
        self.num_members = model.ensemble_size if num_members is None else num_members
        self.blocks = nn.Sequential(*(
            convert(layer, node_span(block.nodes, 0, self.num_members, model.ensemble_size)[1])
            for block in model.blocks
            for layer in block
        ))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Identity()
        if isinstance(model.hidden, BranchedLinear):
            self.hidden = nn.Sequential(linear(model.hidden, self.num_members), type(model.hidden_act)(inplace=True))
        self.classifier = linear(model.classifier, self.num_members)
        self.train(model.training)

    def forward_members(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits `(B, num_members, num_classes)` of images `(B, C, H, W)`."""
        x = self.classifier(self.hidden(self.pool(self.blocks(x))))
        return x.reshape(x.shape[0], self.num_members, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the mean `(B, num_classes)` of the members' logits (Eq. 1)."""
        return self.forward_members(x).mean(dim=1)
