"""Hierarchical Neural Ensembles as timm models. Importing this package registers them."""
from .budget import LatencyTable
from .cost import cost_table
from .ensemble import HierarchicalEnsemble
from .hne_mobilenetv2 import HNEMobileNetV2
from .hne_resnet import HNEResNet
from .inference import calibrate_threshold, early_exit
from .losses import HNELoss
from .optimize import optimize_for_inference
from .publishing import publish
from .runner import AdaptiveRunner
from .task import HNETask
from .version import __version__

__all__ = [
    'AdaptiveRunner',
    'HNELoss',
    'HNEMobileNetV2',
    'HNEResNet',
    'HNETask',
    'HierarchicalEnsemble',
    'LatencyTable',
    '__version__',
    'calibrate_threshold',
    'cost_table',
    'early_exit',
    'optimize_for_inference',
    'publish',
]
