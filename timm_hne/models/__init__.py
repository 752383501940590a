"""The tree as timm models: the block protocol, its blocks, and the families. Importing it registers them."""
from ..version import check_timm

check_timm()  # before the modules below import what an older timm has not

from . import hne_from_timm as hne_from_timm  # noqa: E402 registers it
from .create import check_ensemble, create_ensemble  # noqa: E402
from .ensemble import HierarchicalEnsemble  # noqa: E402
from .from_timm import HNEFromTimm, hierarchize  # noqa: E402
from .hne_mobilenetv2 import HNEMobileNetV2  # noqa: E402
from .hne_resnet import HNEResNet  # noqa: E402

__all__ = [
    'HNEFromTimm',
    'HNEMobileNetV2',
    'HNEResNet',
    'HierarchicalEnsemble',
    'check_ensemble',
    'create_ensemble',
    'hierarchize',
]
