"""Hierarchical Neural Ensembles as timm models. Importing this package makes them known to timm.

Everything is imported when it is first used: the models as soon as timm is there, a public name when it is asked for.
So `timm_hne.runtime`, which runs exported models, needs neither timm nor PyTorch.
"""
import sys
from typing import TYPE_CHECKING

from timm_hne_autoload import watch

from .version import __version__

if TYPE_CHECKING:
    from .evaluation import cost_table
    from .hub import publish
    from .inference import (
        AdaptiveRunner,
        LatencyTable,
        calibrate_threshold,
        early_exit,
        optimize_for_inference,
        quantize,
    )
    from .models import HierarchicalEnsemble, HNEFromTimm, HNEMobileNetV2, HNEResNet, hierarchize
    from .training import HNELoss, HNETask

__all__ = [
    'AdaptiveRunner',
    'HNEFromTimm',
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
    'hierarchize',
    'optimize_for_inference',
    'publish',
    'quantize',
]

_PACKAGES = {
    'evaluation': ('cost_table',),
    'hub': ('publish',),
    'inference': (
        'AdaptiveRunner', 'LatencyTable', 'calibrate_threshold', 'early_exit', 'optimize_for_inference', 'quantize'),
    'models': ('HNEFromTimm', 'HNEMobileNetV2', 'HNEResNet', 'HierarchicalEnsemble', 'hierarchize'),
    'serving': (),
    'training': ('HNELoss', 'HNETask'),
}
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names}
_MODULES = ('checks', 'files', 'images', 'prefix', 'pretrained', 'process', 'runtime', 'tree')


def _import(name: str):
    # Unlike importlib.import_module, this does not raise if another thread imports the same and waits for this one.
    __import__(f'{__name__}.{name}')
    return sys.modules[f'{__name__}.{name}']


def __getattr__(name: str):
    """Import what is used for the first time, a public name or a part of the package; Python calls this (PEP 562)."""
    if name in _HOMES:
        value = globals()[name] = getattr(_import(_HOMES[name]), name)
        return value
    if name in _PACKAGES or name in _MODULES:
        return _import(name)
    if name in ('cost', 'metrics'):  # where version 0.1 had them
        return _import(f'evaluation.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES, *_MODULES})


if not watch():
    _import('models')
