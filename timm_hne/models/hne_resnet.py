"""Hierarchical neural ensemble of ResNet-50s for small images (Table 2 and Figure 7 of the paper).

Paper: `Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost` - https://arxiv.org/abs/2003.01474
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model

from ..checks import check_integer, check_number
from ..pretrained import packaged
from ..tree import validate_nodes
from .branched import BranchedBlock, BranchedEnsemble
from .layers import BranchedDropPath, ConvNormAct
from .weights import build_model

__all__ = ['HNEResNet']


class Bottleneck(nn.Module):
    """Residual layer: 1x1, depth-wise 3x3, 1x1 (Figure 7).

    The first layer of a block (ResNet+Branching in Table 2) has a 1x1 projection as its shortcut; in both of its paths
    the first convolution branches.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            parents: int,
            nodes: int,
            stride: int,
            project: bool,
            dd: dict,
            drop_path: float = 0.,
    ):
        super().__init__()
        mid_chs = out_chs // 4
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, parents, nodes, **dd)
        self.conv2 = ConvNormAct(mid_chs, mid_chs, 3, nodes, nodes, stride, groups=mid_chs, **dd)
        self.conv3 = ConvNormAct(mid_chs, out_chs, 1, nodes, nodes, act_layer=None, **dd)
        self.shortcut = None
        if project:
            self.shortcut = ConvNormAct(in_chs, out_chs, 1, parents, nodes, stride, act_layer=None, **dd)
        self.drop_path = BranchedDropPath(drop_path, out_chs) if drop_path else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, span)
        x = self.drop_path(self.conv3(self.conv2(self.conv1(x, span), span), span))
        x += shortcut
        return self.act(x)


class HNEResNet(BranchedEnsemble):
    """Tree of bottleneck ResNets of depth 50.

    Args:
        width: Channels of the first convolution; 16 in the paper's HNE, 8 in its HNE small.
        nodes: Number of nodes of each of the five blocks.
        zero_init_last: Start every residual layer as its shortcut, as timm's ResNets do.
        drop_path_rate: Rate of stochastic depth in the last residual layer; it rises linearly from 0 in the first.

    The other arguments are those of `BranchedEnsemble`.
    """

    # Blocks 1 to 4 of Table 2: channels of a node (in units of `width`), layers, stride. Where the table's stride and
    # resolutions disagree (block 4), the resolutions count.
    stages = ((4, 3, 1), (8, 4, 2), (16, 4, 2), (16, 5, 1))

    def __init__(
            self,
            width: int = 16,
            nodes: Sequence[int] = (1, 2, 4, 8, 16),
            num_classes: int = 10,
            in_chans: int = 3,
            zero_init_last: bool = True,
            num_members: Optional[int] = None,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        nodes = validate_nodes(nodes, len(self.stages) + 1)
        check_integer('in_chans', in_chans, 1)
        check_integer('width', width, 1)
        check_number('drop_path_rate', drop_path_rate, 0, 1)
        dd = {'device': device, 'dtype': dtype}
        chs = 4 * width
        blocks = [BranchedBlock(
            ConvNormAct(in_chans, width, 3, 1, nodes[0], **dd),
            ConvNormAct(width, chs, 1, nodes[0], nodes[0], **dd),
            nodes=nodes[0],
            out_channels=chs,
        )]
        reductions = [1]
        rates = calculate_drop_path_rates(drop_path_rate, [depth for _, depth, _ in self.stages], stagewise=True)
        for (multiple, _, stride), (first, *others), parents, count in zip(self.stages, rates, nodes, nodes[1:]):
            in_chs, chs = chs, multiple * width
            layers = [Bottleneck(in_chs, chs, parents, count, stride, project=True, dd=dd, drop_path=first)]
            layers += [Bottleneck(chs, chs, count, count, 1, project=False, dd=dd, drop_path=rate) for rate in others]
            blocks.append(BranchedBlock(*layers, nodes=count, out_channels=chs))
            reductions.append(reductions[-1] * stride)
        self.zero_init_last = zero_init_last
        super().__init__(
            blocks,
            reductions,
            num_classes,
            in_chans,
            num_members=num_members,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def init_weights(self) -> None:
        super().init_weights()
        if self.zero_init_last:
            for module in self.modules():
                if isinstance(module, Bottleneck):
                    nn.init.zeros_(module.conv3.bn.weight)


def _cfg(label_names, **kwargs):
    return dict(
        num_classes=len(label_names),
        label_names=label_names,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation='bilinear',
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        first_conv='blocks.0.0.conv',
        classifier='classifier',
        paper_ids='arXiv:2003.01474',
        paper_name='Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost',
        license='apache-2.0',
        **kwargs,
    )


_CIFAR10 = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_CIFAR100 = tuple("""
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus, butterfly, camel,
can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup, dinosaur,
dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion,
lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea,
seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper, table,
tank, telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman,
worm
""".strip().replace('\n', ' ').split(', '))

# 'hcd' stands for hierarchical co-distillation, the objective.
default_cfgs = generate_default_cfgs({
    'hne_resnet50_c16.hcd_cifar10': _cfg(_CIFAR10, file=packaged('hne_resnet50_c16.hcd_cifar10')),
    'hne_resnet50_c8.hcd_cifar10': _cfg(_CIFAR10, file=packaged('hne_resnet50_c8.hcd_cifar10')),
    'hne_resnet50_c8.hcd_cifar100': _cfg(_CIFAR100, file=packaged('hne_resnet50_c8.hcd_cifar100')),
})


def _create_hne_resnet(variant: str, pretrained: bool = False, **kwargs) -> HNEResNet:
    return build_model(
        HNEResNet,
        variant,
        pretrained,
        # The wrapper that calls `forward_intermediates` is the one that respects `num_members`.
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls='getter', flatten_sequential=True),
        **kwargs,
    )


@register_model
def hne_resnet50_c16(pretrained: bool = False, **kwargs) -> HNEResNet:
    """HNE of the paper: 16 ResNet-50s whose first convolution has 16 channels (Table 2)."""
    return _create_hne_resnet('hne_resnet50_c16', pretrained, **dict(dict(width=16), **kwargs))


@register_model
def hne_resnet50_c8(pretrained: bool = False, **kwargs) -> HNEResNet:
    """HNE small of the paper: half the channels of `hne_resnet50_c16` in every layer (section 4.2)."""
    return _create_hne_resnet('hne_resnet50_c8', pretrained, **dict(dict(width=8), **kwargs))
