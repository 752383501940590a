"""PyTorch's own compiler: a program per step for all batches, and one for a single image."""
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...models.ensemble import HierarchicalEnsemble
from ...models.frontier import advance
from .base import Frontier, tensors
from .eager import Eager


class Inductor(Eager):
    """`torch.compile`. Where it fails, the step runs eagerly from then on, after a warning; `ran` says so."""
    name = 'inductor'

    def __init__(self, model: HierarchicalEnsemble):
        super().__init__(model)
        self.failed = False
        # Per first and last member, and whether for a single image: the program, and whether it is compiled.
        self._programs: dict[tuple[int, int, bool], tuple[Callable, bool]] = {}

    @property
    def ran(self) -> str:
        if not self.failed:
            return self.name
        return 'partly inductor' if any(compiled for _, compiled in [*self._programs.values()]) else 'eager'

    def _run(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        key = start, stop, tensors(frontier)[0].shape[0] == 1
        found = self._programs.get(key)
        if found is None:
            with self._lock:
                found = self._programs.get(key)
                if found is None:
                    return self._build(key, frontier)
        program, compiled = found
        return self._try(program, key, frontier) if compiled else program(*frontier)

    def _body(self, start: int, stop: int) -> Callable:
        model = self.model

        def body(*frontier: Any) -> tuple[Tensor, Frontier]:
            return advance(model, frontier, start, stop)

        # With code of its own: the compiler's cache and its limit of entries belong to the code object.
        return types.FunctionType(body.__code__.replace(), body.__globals__, body.__name__, None, body.__closure__)

    def _build(self, key: tuple[int, int, bool], frontier: Frontier) -> tuple[Tensor, Frontier]:
        """Make a program by running it for the first time."""
        if self.failed:
            self._programs[key] = self._body(*key[:2]), False
            return self._programs[key][0](*frontier)

        def program(*frontier: Any) -> tuple[Tensor, Frontier]:
            compiled = _compile(self._body(*key[:2]), tensors(frontier)[0].device)
            result = compiled(*frontier)
            self._programs[key] = compiled, True
            return result

        return self._try(program, key, frontier)

    def _try(self, program: Callable, key: tuple[int, int, bool], frontier: Frontier) -> tuple[Tensor, Frontier]:
        """Run a compiled program. If the compiler fails, now or with a later image size, go on without it."""
        if not key[2]:
            # One program serves all batch sizes from 2.
            for tensor in tensors(frontier):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return program(*frontier)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = str(error)
        body = self._body(*key[:2])
        result = body(*frontier)  # if it was not the compiler, this fails too
        warnings.warn(f'Compilation is not available here, going on without: {message}', stacklevel=6)
        self.failed, self._programs[key] = True, (body, False)
        return result


def _compile(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, options={
        # Weights become constants, packed for the processor once.
        'freezing': device.type == 'cpu',
        # Nothing but the input can change: the folded model belongs to the engine alone.
        'guard_filter_fn': torch.compiler.keep_tensor_guards_unsafe,
    })
