"""Training: losses, timm's training task, a trainer of our own with recipes.

`train.py --device-modules timm_hne.training` imports this package, which makes that script train with `HNETask`.
"""
from .checkpoint import load_checkpoint
from .launcher import inject_into_running_script, run_script
from .losses import OBJECTIVES, HNELoss
from .recipe import TrainConfig
from .task import HNETask, StockTaskWarning
from .trainer import NonFiniteLossError, TrainResult, train

__all__ = [
    'OBJECTIVES',
    'HNELoss',
    'HNETask',
    'NonFiniteLossError',
    'StockTaskWarning',
    'TrainConfig',
    'TrainResult',
    'load_checkpoint',
    'run_script',
    'train',
]

inject_into_running_script(__name__)
