"""Adaptive inference: anytime, early exit, latency budgets, fast models, a runner for requests, export."""
from ..models.anytime import anytime
from ..models.frontier import advance, first_frontier
from .deploy import export_folder
from .early_exit import CRITERIA, EarlyExit, ExitPoint, calibrate_threshold, early_exit, exit_curve, exit_scores
from .export import export
from .latency import LatencyTable
from .optimize import OptimizedEnsemble, optimize_for_inference
from .quantize import quantize
from .runner import AdaptiveRunner, Answer, DeadlineTooShort, Overloaded, ShutDown

__all__ = [
    'CRITERIA',
    'AdaptiveRunner',
    'Answer',
    'DeadlineTooShort',
    'EarlyExit',
    'ExitPoint',
    'LatencyTable',
    'OptimizedEnsemble',
    'Overloaded',
    'ShutDown',
    'advance',
    'anytime',
    'calibrate_threshold',
    'early_exit',
    'exit_curve',
    'exit_scores',
    'export',
    'export_folder',
    'first_frontier',
    'optimize_for_inference',
    'quantize',
]
