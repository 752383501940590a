"""The tree as timm models: the block protocol, its blocks, and the families. Importing it registers them."""
from . import hne_from_timm as hne_from_timm  # registers it
from .create import check_ensemble, create_ensemble
from .ensemble import HierarchicalEnsemble
from .from_timm import HNEFromTimm, hierarchize
from .hne_mobilenetv2 import HNEMobileNetV2
from .hne_resnet import HNEResNet

__all__ = [
    'HNEFromTimm',
    'HNEMobileNetV2',
    'HNEResNet',
    'HierarchicalEnsemble',
    'check_ensemble',
    'create_ensemble',
    'hierarchize',
]
