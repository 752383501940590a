"""A model made fast for inference on the machine at hand: folded, laid out, formulated and compiled by measurement."""
import copy
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..models.anytime import anytime, check_images, forget_times
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..models.frontier import Frontier, advance
from ..process import keep_freed_memory
from ..tree import validate_num_members
from .folding import fold
from .formulations import FoldedConv, shortest_times


def _tensors(frontier: Frontier) -> list[Tensor]:
    """Return the tensors that the features of a frontier hold, whatever they are made of."""
    return [leaf for leaf in tree_leaves(frontier) if isinstance(leaf, Tensor)]


def _with_own_code(function: Callable) -> Callable:
    """Copy a function with its code: the compiler's cache and its limit of entries belong to the code object."""
    code = function.__code__.replace()
    name, defaults = function.__name__, function.__defaults__
    return types.FunctionType(code, function.__globals__, name, defaults, function.__closure__)


def _refused(name: str) -> Callable:
    def refuse(self, *args, **kwargs) -> None:
        raise RuntimeError(f'An optimised model cannot {name}; do it to the original and optimise that.')

    refuse.__doc__ = 'Refuse: compiled programs are of the model as it is.'
    return refuse


class OptimizedEnsemble(nn.Module):
    """What `optimize_for_inference` returns: a frozen, folded ensemble with the interface of the original.

    Whatever is not defined here (`nodes`, `ensemble_size`, `num_classes`, `blocks`, ...) is that of the folded model.

    Args:
        model: Folded model of which nobody else holds a reference.
        compile: Whether to compile.
        output_dtype: Type of the logits returned.
    """

    def __init__(self, model: HierarchicalEnsemble, compile: bool, output_dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.compile_programs = compile
        self.output_dtype = output_dtype
        self.dtype = next(model.parameters()).dtype
        self.memory_format: torch.memory_format | None = None
        # Per kind, first and last member, and whether for a single image: the program, and whether it is compiled.
        self._programs: dict[tuple, tuple[Callable, bool]] = {}
        self._lock = threading.RLock()
        super().train(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('model'), name)

    def __getstate__(self) -> dict:
        # Compiled programs hold this very model; a copy makes its own.
        return {**self.__dict__, '_programs': {}, '_lock': None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def _apply(self, fn: Callable, recurse: bool = True) -> 'OptimizedEnsemble':
        super()._apply(fn, recurse)
        self.dtype = next(self.model.parameters()).dtype
        # All that was measured was measured elsewhere, or in another type.
        self.memory_format = None
        for module in self.model.modules():
            if isinstance(module, FoldedConv):
                module.formulations.clear()
        self._programs.clear()
        forget_times(self)
        return self

    def train(self, mode: bool = True) -> 'OptimizedEnsemble':
        """Refuse training mode."""
        if mode:
            raise ValueError('mode must be False: an optimised model cannot be trained; train the original.')
        return super().train(False)

    load_state_dict = _refused('load weights')
    extract = _refused('extract')
    init_weights = _refused('init_weights')
    reset_classifier = _refused('reset_classifier')
    prune_intermediate_layers = _refused('prune_intermediate_layers')

    @property
    def mode(self) -> str:
        """What runs: 'compiled', 'folded' (eager), or 'partly compiled' if the compiler failed after some programs.

        Before the first call it is what is intended.
        """
        if self.compile_programs:
            return 'compiled'
        return 'partly compiled' if any(compiled for _, compiled in [*self._programs.values()]) else 'folded'

    def uncompiled(self) -> HierarchicalEnsemble:
        """Return a copy of the folded model with all convolutions as such, for tools that read or trace it."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if isinstance(module, FoldedConv):
                module.formulations = {}
        return model

    @property
    def num_members(self) -> int:
        """Number of members that are evaluated unless the call says otherwise."""
        return self.model.num_members

    @num_members.setter
    def num_members(self, num_members: int | None) -> None:
        self.model.num_members = num_members

    def forward(self, x: Tensor, num_members: int | None = None) -> Tensor:
        """Compute the ensemble's logits `(B, num_classes)`, as the original does."""
        return self._run('forward', 0, self._resolve(num_members), (self._check(x),))

    def forward_members(self, x: Tensor, num_members: int | None = None) -> Tensor:
        """Compute the logits of each of the first n members `(B, n, num_classes)`, as the original does."""
        return self._run('members', 0, self._resolve(num_members), (self._check(x),))

    def advance(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        """Add members to an evaluation; see `timm_hne.inference.advance`."""
        if start == 0:
            self._check(frontier[0])
        return self._run('advance', start, stop, frontier)

    def anytime(
            self,
            x: Tensor,
            schedule: Sequence[int] | None = None,
            deadline: float | None = None,
    ) -> Iterator[Tensor]:
        """Yield the logits after more and more members; see `timm_hne.inference.anytime`."""
        return anytime(self, x, schedule, deadline)

    @torch.no_grad()
    def forward_features(self, x: Tensor, num_members: int | None = None) -> Tensor:
        """Compute the last feature maps `(B, n * F, H', W')` in the type computed in; not compiled."""
        return self.model.forward_features(self._check(x).to(self.dtype), num_members)

    @torch.no_grad()
    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        """Compute the feature maps of the blocks in the type computed in; not compiled."""
        return self.model.forward_intermediates(self._check(x).to(self.dtype), *args, **kwargs)

    def _resolve(self, num_members: int | None) -> int:
        return self.num_members if num_members is None else validate_num_members(num_members, self.model.ensemble_size)

    def _check(self, x: Tensor) -> Tensor:
        check_images(x, self.model.in_chans)
        return x

    def _body(self, kind: str, start: int, stop: int) -> Callable:
        """Return the function of feature maps that a program computes."""
        model, output_dtype = self.model, self.output_dtype

        def body(*frontier: Any):
            if kind == 'advance':
                logits, frontier = advance(model, frontier, start, stop)
                return logits.to(output_dtype), frontier
            forward = model.forward if kind == 'forward' else model.forward_members
            return forward(frontier[0], stop).to(output_dtype)

        return body

    @torch.no_grad()
    def _run(self, kind: str, start: int, stop: int, frontier: Frontier):
        some = _tensors(frontier)[0]
        if start == 0:
            if self.memory_format is None:
                with self._lock:
                    if self.memory_format is None:
                        self._choose_layout(some)
            some = some.detach().to(self.dtype, memory_format=self.memory_format)
            frontier = (some, *frontier[1:])
        if some.shape[0] == 0:
            return self._body(kind, start, stop)(*frontier)
        key = (kind, start, stop, some.shape[0] == 1)
        found = self._programs.get(key)
        if found is None:
            with self._lock:
                found = self._programs.get(key)
                if found is None:
                    return self._build(key, frontier)
        program, compiled = found
        return self._try(program, key, frontier) if compiled else program(*frontier)

    def _build(self, key: tuple, frontier: Frontier):
        """Measure the convolutions of a program, make it, and run it for the first time."""
        body = self._body(*key[:3])
        convs = [module for module in self.model.modules() if isinstance(module, FoldedConv)]
        for conv in convs:
            conv.measuring = True
        try:
            result = body(*frontier)
        finally:
            for conv in convs:
                conv.measuring = False
        if not self.compile_programs:
            self._programs[key] = body, False
            return result

        def program(*frontier: Any):
            compiled = _compile(_with_own_code(body), frontier)
            result = compiled(*frontier)
            self._programs[key] = compiled, True
            return result

        return self._try(program, key, frontier)

    def _try(self, program: Callable, key: tuple, frontier: Frontier):
        """Run a compiled program. If the compiler fails, now or with a later image size, go on without it."""
        if not key[3]:
            # One program serves all batch sizes from 2.
            for tensor in _tensors(frontier):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return program(*frontier)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = str(error)
        body = self._body(*key[:3])
        result = body(*frontier)  # if it was not the compiler, this fails too
        warnings.warn(f'Compilation is not available here, going on without: {message}', stacklevel=4)
        self.compile_programs, self._programs[key] = False, (body, False)
        return result

    def _choose_layout(self, x: Tensor) -> None:
        """Measure the folded first member in both memory formats and keep the faster one."""
        formats = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
        models = {name: copy.deepcopy(self.model).to(memory_format=formats[name]) for name in formats}
        seconds = shortest_times({
            name: functools.partial(models[name], x.detach().to(self.dtype, memory_format=formats[name]), 1)
            for name in formats
        }, x.device)
        fastest = formats[min(seconds, key=seconds.get)]
        self.model.to(memory_format=fastest)
        self.memory_format = fastest  # last: other threads go ahead when they see it


def _compile(function: Callable, frontier: Frontier) -> Callable:
    return torch.compile(function, options={
        # Weights become constants, packed for the processor once.
        'freezing': _tensors(frontier)[0].device.type == 'cpu',
        # Nothing but the input can change: the folded model belongs to this module alone.
        'guard_filter_fn': torch.compiler.keep_tensor_guards_unsafe,
    })


def optimize_for_inference(
        model: HierarchicalEnsemble,
        example_input: Tensor | None = None,
        compile: bool = True,
        dtype: torch.dtype | None = None,
        keep_memory: bool = False,
) -> OptimizedEnsemble:
    """Return a fast version of a model with the same `forward(x, num_members=None)`.

    Batch normalisation is folded into the convolutions. At the first call the memory format is chosen, and for every
    branched convolution its formulation: a grouped convolution, a batched matrix product, or a convolution per node,
    whichever is fastest on this device; this is measured once per kind of convolution and remembered. For each number
    of members asked for there is one compiled program for all batches of two images or more, and one for a single
    image, made when first needed.

    The results are those of the original within 1e-4 of the largest logit in float32 and within 5e-2 in bfloat16.

    Args:
        model: Any hierarchical ensemble in evaluation mode. It is not changed, and shares no memory with the result.
        example_input: Images `(B, C, H, W)` as they will come; measuring and compiling for them is then done at once.
        compile: Use `torch.compile`. Where it fails, the result runs eagerly, after a warning; its `mode` says which.
        dtype: Type to compute in, e.g. `torch.bfloat16`; the model's own if None. Logits have the original's type.
        keep_memory: If the model is on a CPU, call `timm_hne.process.keep_freed_memory`, which changes the whole
            process for good: feature maps of a large batch come back from the system page by page otherwise, each time.

    Raises:
        TypeError: `model` is no hierarchical ensemble, or `dtype` no floating point type.
        ValueError: `model` is in training mode, or `example_input` is not a batch of images for it.
    """
    check_ensemble(model)
    if model.training:
        raise ValueError('model must be in evaluation mode, got one in training mode; call model.eval() first.')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating point torch.dtype or None, got {dtype!r}.')
    output_dtype = next(model.parameters()).dtype
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        fold(model)
        model = model.to(dtype)
    if keep_memory and next(model.parameters()).device.type == 'cpu':
        keep_freed_memory()
    optimized = OptimizedEnsemble(model, compile, output_dtype)
    if example_input is not None:
        optimized(example_input)
    return optimized
