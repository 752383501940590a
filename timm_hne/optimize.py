"""A model made fast for inference on the machine at hand: folded, laid out, formulated and compiled by measurement."""
import copy
import functools
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .ensemble import HierarchicalEnsemble, check_images
from .inference import Frontier, advance, anytime, forget_times
from .layers import BranchedConv2d, ConvNormAct
from .memory import keep_freed_memory
from .tree import validate_num_members

# A formulation other than the grouped convolution must be this much faster to be chosen: compilers fuse the
# convolution with what follows it, and timings scatter.
_ADVANTAGE = 1.15

# The fastest formulation of every convolution measured in this process.
_fastest: dict[tuple, str] = {}


def _grouped(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, parents * (conv.groups // conv.parents))


def _matmul(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    x = x[:, :, ::conv.stride[0], ::conv.stride[1]]
    batch, channels, height, width = x.shape
    features = x.permute(0, 2, 3, 1).reshape(batch * height * width, parents, channels // parents)
    weight = weight.view(parents, -1, channels // parents).transpose(1, 2)
    x = torch.baddbmm(bias.view(parents, 1, -1), features.transpose(0, 1), weight)
    return x.transpose(0, 1).reshape(batch, height, width, len(bias)).permute(0, 3, 1, 2)


def _per_node(conv: BranchedConv2d, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> Tensor:
    parts = zip(x.chunk(parents, dim=1), weight.chunk(parents), bias.chunk(parents))
    return torch.cat([F.conv2d(*part, conv.stride, conv.padding, conv.dilation) for part in parts], dim=1)


# Ways to compute the children of some parents: `(conv, x, weight, bias, parents)` to feature maps.
FORMULATIONS: dict[str, Callable[..., Tensor]] = {
    'grouped': _grouped,
    'matmul': _matmul,
    'per_node': _per_node,
}


def _time(functions: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the seconds of one call of each function: the fastest of a few, taken in turn."""
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


class FoldedConv(BranchedConv2d):
    """A `ConvNormAct` whose batch normalisation is part of the weights, in the formulation that is fastest here.

    Args:
        layer: The layer to fold, in evaluation mode.

    Attributes:
        formulations: The formulation in use, per (first node, last node, whether the batch is one image).
        measuring: Whether to measure what has no formulation yet.
    """

    def __init__(self, layer: ConvNormAct):
        conv, bn = layer.conv, layer.bn
        super().__init__(
            conv.in_channels // conv.parents,
            conv.out_channels // conv.nodes,
            conv.kernel_size[0],
            conv.parents,
            conv.nodes,
            stride=conv.stride[0],
            groups=conv.groups // conv.parents,
            device='meta',
        )
        # In double precision, so that folding itself adds no error to speak of.
        scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        bias = bn.bias.double() - bn.running_mean.double() * scale
        self.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
        self.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
        self.act = bn.act
        self.formulations: dict[tuple[int, int, bool], str] = {}
        self.measuring = False

    def forward(self, x: Tensor, span: tuple[int, int] | None = None) -> Tensor:
        return self.act(super().forward(x, (0, self.nodes) if span is None else span))

    def convolve(self, x: Tensor, first: int, last: int, parents: int) -> Tensor:
        channels = self.out_channels // self.nodes
        weight = self.weight[first * channels:last * channels]
        bias = self.bias[first * channels:last * channels]
        key = (first, last, x.shape[0] == 1)
        if self.measuring and key not in self.formulations:
            self.formulations[key] = self._choose(x, weight, bias, parents)
        return FORMULATIONS[self.formulations.get(key, 'grouped')](self, x, weight, bias, parents)

    def _choose(self, x: Tensor, weight: Tensor, bias: Tensor, parents: int) -> str:
        """Return the name of the fastest formulation, from memory if the same convolution has been measured."""
        candidates = ['grouped']
        if self.groups == self.parents and parents > 1:
            candidates += ['per_node', *(['matmul'] if self.kernel_size == (1, 1) else [])]
        if len(candidates) == 1:
            return 'grouped'
        layout = x.is_contiguous(memory_format=torch.channels_last)
        device = (x.device, torch.get_num_threads() if x.device.type == 'cpu' else None)
        key = (device, x.dtype, x.shape, layout, weight.shape, self.stride, parents)
        if key not in _fastest:
            seconds = _time({
                name: functools.partial(FORMULATIONS[name], self, x, weight, bias, parents) for name in candidates
            }, x.device)
            seconds['grouped'] /= _ADVANTAGE
            _fastest[key] = min(seconds, key=seconds.get)
        return _fastest[key]


def _fold(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNormAct):
            setattr(module, name, FoldedConv(child))
        else:
            _fold(child)


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
        # Per kind, first and last member, and whether for single images: the program, and whether it is compiled.
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

        def body(*frontier: Tensor | None):
            if kind == 'advance':
                logits, frontier = advance(model, frontier, start, stop)
                return logits.to(output_dtype), frontier
            forward = model.forward if kind == 'forward' else model.forward_members
            return forward(frontier[0], stop).to(output_dtype)

        return body

    @torch.no_grad()
    def _run(self, kind: str, start: int, stop: int, frontier: Frontier):
        some = next(features for features in frontier if features is not None)
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

        def program(*frontier: Tensor | None):
            compiled = _compile(_with_own_code(body), frontier)
            result = compiled(*frontier)
            self._programs[key] = compiled, True
            return result

        return self._try(program, key, frontier)

    def _try(self, program: Callable, key: tuple, frontier: Frontier):
        """Run a compiled program. If the compiler fails, now or with a later image size, go on without it."""
        if not key[3]:
            _mark_batch(frontier)
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
        seconds = _time({
            name: functools.partial(models[name], x.detach().to(self.dtype, memory_format=formats[name]), 1)
            for name in formats
        }, x.device)
        fastest = formats[min(seconds, key=seconds.get)]
        self.model.to(memory_format=fastest)
        self.memory_format = fastest  # last: other threads go ahead when they see it


def _mark_batch(frontier: Frontier) -> None:
    """Let one program serve all batch sizes from 2."""
    for features in frontier:
        if features is not None:
            torch._dynamo.maybe_mark_dynamic(features, 0)


def _compile(function: Callable, frontier: Frontier) -> Callable:
    device = next(features for features in frontier if features is not None).device
    return torch.compile(function, options={
        # Weights become constants, packed for the processor once.
        'freezing': device.type == 'cpu',
        # Nothing but the input can change: the folded model belongs to this module alone.
        'guard_filter_fn': torch.compiler.keep_tensor_guards_unsafe,
    })


def optimize_for_inference(
        model: HierarchicalEnsemble,
        example_input: Tensor | None = None,
        compile: bool = True,
        dtype: torch.dtype | None = None,
        keep_memory: bool = True,
) -> OptimizedEnsemble:
    """Return a fast version of a model with the same `forward(x, num_members=None)`.

    Batch normalisation is folded into the convolutions. At the first call the memory format is chosen, and for every
    convolution its formulation: a grouped convolution, a batched matrix product, or a convolution per node, whichever
    is fastest on this device; this is measured once per kind of convolution and remembered. For each number of members
    asked for there is one compiled program for all batch sizes, and one for single images, made when first needed.

    On a CPU with Linux the C library is told to keep freed memory, for the whole process and for good: feature maps of
    a large batch would otherwise come back from the system page by page, each time.

    The results are those of the original within 1e-4 of the largest logit in float32 and within 5e-2 in bfloat16.

    Args:
        model: Any `hne_*` model in evaluation mode. It is not changed, and shares no memory with the result.
        example_input: Images `(B, C, H, W)` as they will come; measuring and compiling for them is then done at once.
        compile: Use `torch.compile`. Where it fails, the result runs eagerly, after a warning.
        dtype: Type to compute in, e.g. `torch.bfloat16`; the model's own if None. Logits have the original's type.
        keep_memory: Let the process keep freed memory on a CPU, as said above.

    Raises:
        TypeError: `model` is no `hne_*` model, or `dtype` no floating point type.
        ValueError: `model` is in training mode, or `example_input` is not a batch of images for it.
    """
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(f'model must be an hne_* model, got {type(model).__name__}.')
    if model.training:
        raise ValueError('model must be in evaluation mode, got one in training mode; call model.eval() first.')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating point torch.dtype or None, got {dtype!r}.')
    output_dtype = next(model.parameters()).dtype
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        model = copy.deepcopy(model).requires_grad_(False)
        _fold(model)
        model = model.to(dtype)
    if keep_memory and next(model.parameters()).device.type == 'cpu':
        keep_freed_memory()
    optimized = OptimizedEnsemble(model, compile, output_dtype)
    if example_input is not None:
        optimized(example_input)
    return optimized
