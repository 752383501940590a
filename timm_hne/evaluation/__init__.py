"""What an ensemble is worth and what it costs, for every number of members."""
from .cost import MemberCost, cost_table, member_macs, member_params
from .evaluate import evaluate, to_markdown
from .metrics import EnsembleMetrics
from .plots import plot_accuracy

__all__ = [
    'EnsembleMetrics',
    'MemberCost',
    'cost_table',
    'evaluate',
    'member_macs',
    'member_params',
    'plot_accuracy',
    'to_markdown',
]
