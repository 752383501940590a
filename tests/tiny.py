"""Ensembles of a few layers, of both kinds of blocks, for tests of what does not depend on the architecture."""
import naive
import torch
import torch.nn as nn

from timm_hne.models.branched import BranchedBlock, BranchedEnsemble
from timm_hne.models.layers import ConvNormAct
from timm_hne.models.replicated import ReplicatedBlock, ReplicatedEnsemble

TREES = [(1, 2, 4), (1, 1, 6), (3, 3, 3), (1, 3, 6), (2, 4, 8), (1, 1, 1)]
KINDS = ['branched', 'replicated']


class Head(nn.Module):
    """Average pooling and a linear classifier."""

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.classifier(x)

    def get_classifier(self):
        return self.classifier


class Pair(nn.Module):
    """A stage whose features are a tuple of tensors that share their batch."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        x = x[0] * x[1] if isinstance(x, tuple) else x
        x = self.layers(x)
        return x, x.mean((2, 3), keepdim=True)


class PairHead(Head):
    def forward(self, x, pre_logits=False):
        return super().forward(x[0] * x[1], pre_logits)


def tiny_ensemble(nodes=(1, 2, 4), kind='branched', num_classes=5, in_chans=3, channels=8):
    """A model of two layers a block; 'pairs' is a replicated one whose features are tuples."""
    torch.manual_seed(0)
    ins = [in_chans, *[channels] * (len(nodes) - 1)]
    reductions = [1] * len(nodes)
    if kind == 'branched':
        blocks = [
            BranchedBlock(
                ConvNormAct(features, channels, 1, parents, count),
                ConvNormAct(channels, channels, 3, count, count, groups=channels),
                nodes=count, out_channels=channels,
            )
            for features, parents, count in zip(ins, (1, *nodes), nodes)
        ]
        return naive.randomize(BranchedEnsemble(blocks, reductions, num_classes=num_classes, in_chans=in_chans)).eval()

    def stage(features):
        layers = nn.Sequential(
            naive.conv_norm_act(features, channels, 1, act=nn.ReLU),
            naive.conv_norm_act(channels, channels, 3, groups=channels, act=nn.ReLU),
        )
        return Pair(layers) if kind == 'pairs' else layers

    blocks = [
        ReplicatedBlock([stage(features) for _ in range(count)], parents, channels)
        for features, parents, count in zip(ins, (1, *nodes), nodes)
    ]
    heads = [(PairHead if kind == 'pairs' else Head)(channels, num_classes) for _ in range(nodes[-1])]
    return naive.randomize(ReplicatedEnsemble(blocks, reductions, heads, num_classes, channels, in_chans)).eval()
