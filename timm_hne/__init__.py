"""Hierarchical Neural Ensembles as timm models. Importing this package registers them."""
from .ensemble import HierarchicalEnsemble
from .hne_mobilenetv2 import HNEMobileNetV2
from .hne_resnet import HNEResNet
from .inference import calibrate_threshold, early_exit
from .losses import HNELoss
from .optimize import optimize_for_inference
from .publish import publish
from .task import HNETask
from .version import __version__

__all__ = [
    'HNELoss',
    'HNEMobileNetV2',
    'HNEResNet',
    'HNETask',
    'HierarchicalEnsemble',
    '__version__',
    'calibrate_threshold',
    'early_exit',
    'optimize_for_inference',
    'publish',
]
