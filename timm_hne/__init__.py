"""Hierarchical Neural Ensembles as timm models. Importing this package registers them."""
from .ensemble import HierarchicalEnsemble
from .hne_mobilenetv2 import HNEMobileNetV2
from .hne_resnet import HNEResNet
from .version import __version__

__all__ = [
    'HNEMobileNetV2',
    'HNEResNet',
    'HierarchicalEnsemble',
    '__version__',
]
