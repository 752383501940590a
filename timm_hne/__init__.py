"""Hierarchical Neural Ensembles as timm models. Importing this package registers them.

The models are imported at once, since timm must know them. All else is imported when it is first used: whoever only
creates a model, as every process does that imports timm, need not wait for it.
"""
from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__, check_timm

check_timm()  # before the models import what an older timm has not

from .models import HierarchicalEnsemble, HNEFromTimm, HNEMobileNetV2, HNEResNet, hierarchize  # noqa: E402

if TYPE_CHECKING:
    from .evaluation import cost_table
    from .hub import publish
    from .inference import AdaptiveRunner, LatencyTable, calibrate_threshold, early_exit, optimize_for_inference
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
]

_PACKAGES = {
    'evaluation': ('cost_table',),
    'hub': ('publish',),
    'inference': ('AdaptiveRunner', 'LatencyTable', 'calibrate_threshold', 'early_exit', 'optimize_for_inference'),
    'training': ('HNELoss', 'HNETask'),
}
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names}


def __getattr__(name: str):
    """Import what is used for the first time, a public name or a package; Python calls this (PEP 562)."""
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f'.{_HOMES[name]}', __name__), name)
        return value
    if name in _PACKAGES:
        return import_module(f'.{name}', __name__)
    if name in ('cost', 'metrics'):  # where version 0.1 had them
        return import_module(f'.evaluation.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
