"""Hierarchical neural ensemble of MobileNetV2s for ImageNet (Table 3 and Figure 8 of the paper).

Paper: `Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost` - https://arxiv.org/abs/2003.01474
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model

from ..checks import check_integer, check_number
from ..pretrained import packaged
from ..tree import validate_nodes
from .branched import BranchedBlock, BranchedEnsemble
from .layers import BranchedDropPath, ConvNormAct
from .weights import build_model

__all__ = ['HNEMobileNetV2']


class ReLU6(nn.ReLU6):
    """ReLU6, in place in inference alone: its gradient needs the input, of which PyTorch would keep a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(x, inplace=not self.training)


class InvertedResidual(nn.Module):
    """Inverted residual layer: 1x1 expansion by 6, depth-wise 3x3, 1x1 (MBNet in Table 3, Figure 8).

    The first convolution may branch (MBNet+Branching). There is a shortcut where the layer keeps nodes, channels and
    resolution.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            parents: int,
            nodes: int,
            stride: int,
            dd: dict,
            drop_path: float = 0.,
    ):
        super().__init__()
        mid_chs = 6 * in_chs
        self.conv_pw = ConvNormAct(in_chs, mid_chs, 1, parents, nodes, act_layer=ReLU6, **dd)
        self.conv_dw = ConvNormAct(mid_chs, mid_chs, 3, nodes, nodes, stride, groups=mid_chs, act_layer=ReLU6, **dd)
        self.conv_pwl = ConvNormAct(mid_chs, out_chs, 1, nodes, nodes, act_layer=None, **dd)
        self.has_shortcut = parents == nodes and in_chs == out_chs and stride == 1
        self.drop_path = BranchedDropPath(drop_path, out_chs) if drop_path and self.has_shortcut else nn.Identity()

    def forward(self, x: torch.Tensor, span: Optional[Tuple[int, int]] = None) -> torch.Tensor:
        shortcut = x
        x = self.conv_pwl(self.conv_dw(self.conv_pw(x, span), span), span)
        if self.has_shortcut:
            x = self.drop_path(x)
            x += shortcut
        return x


class HNEMobileNetV2(BranchedEnsemble):
    """Tree of MobileNetV2s of width 0.75 with the head of MobileNetV3.

    Args:
        nodes: Number of nodes of each of the four blocks.
        drop_path_rate: Rate of stochastic depth in the last of the layers; it rises linearly from 0 in the first, and
            counts in layers that have a shortcut.

    The other arguments are those of `BranchedEnsemble`.
    """

    # Table 3: for each block its MBNet layers as (channels of a node, stride).
    stages = (
        ((24, 2), (24, 1)),
        ((24, 2), (24, 1), (24, 1)),
        ((48, 2), (48, 1), (48, 1), (48, 1), (72, 1), (72, 1), (72, 1)),
        ((120, 2), (120, 1), (120, 1)),
    )
    stem_features = 16
    num_conv_features = 720
    hidden_features = 1280

    def __init__(
            self,
            nodes: Sequence[int] = (1, 2, 4, 8),
            num_classes: int = 1000,
            in_chans: int = 3,
            num_members: Optional[int] = None,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        nodes = validate_nodes(nodes, len(self.stages))
        check_integer('in_chans', in_chans, 1)
        check_number('drop_path_rate', drop_path_rate, 0, 1)
        dd = {'device': device, 'dtype': dtype}
        chs = self.stem_features
        layers = [
            ConvNormAct(in_chans, chs, 3, 1, nodes[0], stride=2, act_layer=ReLU6, **dd),
            ConvNormAct(chs, chs, 1, nodes[0], nodes[0], act_layer=ReLU6, **dd),
        ]
        blocks, reductions, reduction, parents = [], [], 2, nodes[0]
        all_rates = calculate_drop_path_rates(drop_path_rate, [len(stage) for stage in self.stages], stagewise=True)
        for stage, rates, count in zip(self.stages, all_rates, nodes):
            for (out_chs, stride), rate in zip(stage, rates):
                layers.append(InvertedResidual(chs, out_chs, parents, count, stride, dd, rate))
                chs, parents, reduction = out_chs, count, reduction * stride
            if stage is self.stages[-1]:
                layers.append(ConvNormAct(chs, self.num_conv_features, 1, count, count, act_layer=ReLU6, **dd))
                chs = self.num_conv_features
            blocks.append(BranchedBlock(*layers, nodes=count, out_channels=chs))
            reductions.append(reduction)
            layers = []
        super().__init__(
            blocks,
            reductions,
            num_classes,
            in_chans,
            hidden_features=self.hidden_features,
            hidden_act_layer=ReLU6,
            num_members=num_members,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _cfg(**kwargs):
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'blocks.0.0.conv',
        'classifier': 'classifier',
        'paper_ids': 'arXiv:2003.01474',
        'paper_name': 'Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost',
        'license': 'apache-2.0',
        **kwargs,
    }


# In the order that timm's readers give the folders of train_scripts/tiny_imagenet.py.
_TINY_IMAGENET = tuple("""
abacus, academic gown, acorn, African elephant, albatross, alp, altar, American alligator, American lobster, apron,
Arabian camel, baboon, backpack, banana, bannister, barbershop, barn, barrel, basketball, bathtub, beach wagon,
beacon, beaker, bee, beer bottle, bell pepper, bighorn, bikini, binoculars, birdhouse, bison, black stork,
black widow, boa constrictor, bow tie, brain coral, brass, broom, brown bear, bucket, bullet train, bullfrog,
butcher shop, candle, cannon, cardigan, cash machine, cauliflower, CD player, centipede, chain, chest, Chihuahua,
chimpanzee, Christmas stocking, cliff, cliff dwelling, cockroach, comic book, computer keyboard, confectionery,
convertible, coral reef, cougar, crane, dam, desk, dining table, dragonfly, drumstick, dugong, dumbbell, Egyptian cat,
espresso, European fire salamander, flagpole, fly, fountain, freight car, frying pan, fur coat, gasmask, gazelle,
German shepherd, go-kart, golden retriever, goldfish, gondola, goose, grasshopper, guacamole, guinea pig, hog,
hourglass, ice cream, ice lolly, iPod, jellyfish, jinrikisha, kimono, king penguin, koala, Labrador retriever,
ladybug, lakeside, lampshade, lawn mower, lemon, lesser panda, lifeboat, limousine, lion, magnetic compass, mantis,
mashed potato, maypole, meat loaf, military uniform, miniskirt, monarch, moving van, mushroom, nail, neck brace,
obelisk, oboe, orange, orangutan, organ, ox, parking meter, pay-phone, Persian cat, picket fence, pill bottle, pizza,
plate, plunger, pole, police van, pomegranate, poncho, pop bottle, potpie, potter's wheel, pretzel, projectile,
punching bag, reel, refrigerator, remote control, rocking chair, rugby ball, sandal, school bus, scoreboard, scorpion,
sea cucumber, sea slug, seashore, sewing machine, slug, snail, snorkel, sock, sombrero, space heater, spider web,
spiny lobster, sports car, standard poodle, steel arch bridge, stopwatch, sulphur butterfly, sunglasses,
suspension bridge, swimming trunks, syringe, tabby, tailed frog, tarantula, teapot, teddy, thatch, torch, tractor,
trilobite, triumphal arch, trolleybus, turnstile, umbrella, vestment, viaduct, volleyball, walking stick, water jug,
water tower, wok, wooden spoon, Yorkshire terrier
""".strip().replace('\n', ' ').split(', '))

default_cfgs = generate_default_cfgs({
    'hne_mobilenetv2_075_e8.hcd_tiny_imagenet': _cfg(
        input_size=(3, 96, 96),
        num_classes=len(_TINY_IMAGENET),
        pool_size=(3, 3),
        crop_pct=1.0,
        file=packaged('hne_mobilenetv2_075_e8.hcd_tiny_imagenet'),
        label_names=_TINY_IMAGENET,
    ),
    'hne_mobilenetv2_075_e8.hcd_in1k': _cfg(),
    'hne_mobilenetv2_075_e4.hcd_in1k': _cfg(),
})


def _create_hne_mobilenetv2(variant: str, pretrained: bool = False, **kwargs) -> HNEMobileNetV2:
    return build_model(
        HNEMobileNetV2,
        variant,
        pretrained,
        # The wrapper that calls `forward_intermediates` is the one that respects `num_members`.
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter', flatten_sequential=True),
        **kwargs,
    )


@register_model
def hne_mobilenetv2_075_e8(pretrained: bool = False, **kwargs) -> HNEMobileNetV2:
    """HNE of the paper: 8 MobileNetV2s of width 0.75 (Table 3)."""
    return _create_hne_mobilenetv2('hne_mobilenetv2_075_e8', pretrained, **dict(dict(nodes=(1, 2, 4, 8)), **kwargs))


@register_model
def hne_mobilenetv2_075_e4(pretrained: bool = False, **kwargs) -> HNEMobileNetV2:
    """The same networks in a smaller tree of 4 members, whose first two blocks are shared by all."""
    return _create_hne_mobilenetv2('hne_mobilenetv2_075_e4', pretrained, **dict(dict(nodes=(1, 1, 2, 4)), **kwargs))
