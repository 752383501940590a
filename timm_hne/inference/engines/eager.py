"""PyTorch without a compiler: the folded model in the faster memory format."""
import copy
import functools
import threading

import torch
from torch import Tensor

from ...models.ensemble import HierarchicalEnsemble
from ...models.frontier import advance
from .base import Engine, Frontier, shortest_times


class Eager(Engine):
    """PyTorch, layer by layer, in the memory format that is faster with the first images."""
    name = 'eager'

    def __init__(self, model: HierarchicalEnsemble):
        super().__init__(model)
        self.memory_format: torch.memory_format | None = None
        self._lock = threading.RLock()

    def step(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        if start == 0:
            if self.memory_format is None:
                with self._lock:
                    if self.memory_format is None:
                        self._choose_layout(frontier[0])
            frontier = (frontier[0].to(memory_format=self.memory_format), *frontier[1:])
        return self._run(frontier, start, stop)

    def _run(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        return advance(self.model, frontier, start, stop)

    def _choose_layout(self, x: Tensor) -> None:
        formats = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
        models = {name: copy.deepcopy(self.model).to(memory_format=formats[name]) for name in formats}
        seconds = shortest_times({
            name: functools.partial(models[name], x.to(memory_format=formats[name]), 1) for name in formats
        }, x.device)
        fastest = formats[min(seconds, key=seconds.get)]
        self.model.to(memory_format=fastest)
        self.memory_format = fastest  # last: other threads go ahead when they see it
