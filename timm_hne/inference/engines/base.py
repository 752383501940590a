"""What an engine is: whatever takes the steps of one folded ensemble, from some members to more."""
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...models.ensemble import HierarchicalEnsemble

Frontier = Any


class Engine(ABC):
    """Takes the steps of one folded ensemble.

    Args:
        model: Folded ensemble, which belongs to the engine.

    Attributes:
        name: Name by which users ask for the engine.
        extra: What `pip install 'timm-hne[...]'` must name to have it, '' if nothing.
        stepwise: Whether all evaluations are made of the steps 0 -> 1 -> 2 -> 4 -> ... -> N, so that each weight is in
            one program; else a direct evaluation is one step.
    """
    name: ClassVar[str]
    extra: ClassVar[str] = ''
    stepwise: ClassVar[bool] = False

    def __init__(self, model: HierarchicalEnsemble):
        self.model = model

    @classmethod
    def missing(cls) -> list[str]:
        """Return the packages that the engine needs and that are not installed."""
        return []

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype) -> str:
        """Say why the engine cannot serve a model on this device and of this type, '' if it can."""
        return ''

    @property
    def ran(self) -> str:
        """What runs, should it be something else than what was asked for."""
        return self.name

    @abstractmethod
    def step(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        """Evaluate the members `start` to `stop - 1`.

        Args:
            frontier: What the previous step returned, or `first_frontier(model, x)` if `start` is 0. The images lie
                along the first axis of every tensor in it.
            start: Number of members evaluated so far.
            stop: Number of members after this step.

        Returns:
            Logits `(B, stop - start, num_classes)`, and the frontier of the next step.
        """


def tensors(frontier: Frontier) -> list[Tensor]:
    """Return the tensors that a frontier holds, whatever it is made of."""
    return [leaf for leaf in tree_leaves(frontier) if isinstance(leaf, Tensor)]


def shortest_times(functions: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, float]:
    """Call functions in turn, five times each; return the seconds of the shortest call of each."""
    seconds = dict.fromkeys(functions, float('inf'))
    for _ in range(5):
        for name, function in functions.items():
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            function()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds
