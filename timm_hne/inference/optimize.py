"""A model made fast for inference on the machine at hand: folded, and run by the fastest engine there is."""
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..models.anytime import anytime, check_images, forget_times
from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..models.frontier import Frontier, advance, first_frontier
from ..process import keep_freed_memory
from ..tree import prefixes, validate_num_members
from .engines import ENGINES, Engine, check_engine, engines_for
from .engines.base import shortest_times, tensors
from .folding import folded

_logger = logging.getLogger(__name__)


def _refused(name: str) -> Callable:
    def refuse(self, *args, **kwargs) -> None:
        raise RuntimeError(f'An optimised model cannot {name}; do it to the original and optimise that.')

    refuse.__doc__ = 'Refuse: programs are of the model as it is.'
    return refuse


class OptimizedEnsemble(nn.Module):
    """What `optimize_for_inference` returns: a frozen, folded ensemble with the interface of the original.

    Whatever is not defined here (`nodes`, `ensemble_size`, `num_classes`, `blocks`, ...) is that of the folded model.

    Args:
        model: Folded model of which nobody else holds a reference.
        engine: Name of the engine, or 'auto'.
        output_dtype: Type of the logits returned.

    Attributes:
        requested_engine: The engine asked for.
        reason: Why the engine in use was taken; empty before the first call.
    """

    def __init__(self, model: HierarchicalEnsemble, engine: str, output_dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.requested_engine = engine
        self.output_dtype = output_dtype
        self.dtype = next(model.parameters()).dtype
        self.reason = ''
        self._engine: Engine | None = None
        self._lock = threading.RLock()
        super().train(False)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('model'), name)

    def __getstate__(self) -> dict:
        # Programs are of this very model; a copy makes its own.
        return {**self.__dict__, '_engine': None, '_lock': None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def _apply(self, fn: Callable, recurse: bool = True) -> 'OptimizedEnsemble':
        super()._apply(fn, recurse)
        self.dtype = next(self.model.parameters()).dtype
        # All that was made and measured was so elsewhere, or in another type.
        self._engine = None
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
        """The engine that runs; 'partly inductor' if the compiler failed after some programs. At first what is asked.

        'auto' is decided at the first call.
        """
        return self.requested_engine if self._engine is None else self._engine.ran

    @property
    def num_members(self) -> int:
        """Number of members that are evaluated unless the call says otherwise."""
        return self.model.num_members

    @num_members.setter
    def num_members(self, num_members: int | None) -> None:
        self.model.num_members = num_members

    def forward(self, x: Tensor, num_members: int | None = None) -> Tensor:
        """Compute the ensemble's logits `(B, num_classes)`, or features `(B, n * F)`, as the original does."""
        members = self.forward_members(x, num_members)
        return members.mean(dim=1) if self.model.num_classes else members.flatten(1)

    def forward_members(self, x: Tensor, num_members: int | None = None) -> Tensor:
        """Compute the logits of each of the first n members `(B, n, num_classes)`, as the original does."""
        if num_members is None:
            num_members = self.num_members
        validate_num_members(num_members, self.model.ensemble_size)
        check_images(x, self.model.in_chans)
        return self.advance(first_frontier(self.model, x), 0, num_members)[0]

    @torch.no_grad()
    def advance(self, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
        """Add members to an evaluation; see `timm_hne.inference.advance`. The frontier is the engine's own affair."""
        if start == 0:
            check_images(frontier[0], self.model.in_chans)
            frontier = (frontier[0].detach().to(self.dtype), *frontier[1:])
        if tensors(frontier)[0].shape[0] == 0:  # no image
            logits, frontier = advance(self.model, frontier, start, stop)
            return logits.to(self.output_dtype), frontier
        engine = self._engine
        if engine is None:
            with self._lock:
                engine = self._engine = self._engine or self._choose(frontier, stop)
        logits, frontier = _advance(engine, frontier, start, stop)
        return logits.to(self.output_dtype), frontier

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
        """Compute the last feature maps `(B, n * F, H', W')` in the type computed in, by PyTorch."""
        check_images(x, self.model.in_chans)
        return self.model.forward_features(x.to(self.dtype), num_members)

    @torch.no_grad()
    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        """Compute the feature maps of the blocks in the type computed in, by PyTorch."""
        check_images(x, self.model.in_chans)
        return self.model.forward_intermediates(x.to(self.dtype), *args, **kwargs)

    def _make(self, name: str) -> Engine:
        return ENGINES[name](self.model)

    def _choose(self, frontier: Frontier, stop: int) -> Engine:
        """Make the engine asked for; for 'auto', the fastest of the run-times installed, else PyTorch's compiler."""
        device = next(self.model.parameters()).device
        with torch.inference_mode(False):
            if self.requested_engine != 'auto':
                check_engine(self.requested_engine, device, self.dtype)
                self.reason = 'asked for'
                return self._make(self.requested_engine)
            engines: dict[str, Engine] = {}
            failures = [
                f'{name} is not installed' for name, engine in ENGINES.items()
                if engine.stepwise and engine.missing() and not engine.obstacle(device, self.dtype)
            ]
            for name in engines_for(device, self.dtype):
                if ENGINES[name].stepwise:
                    engine = self._make(name)
                    try:
                        _advance(engine, frontier, 0, stop)
                    except Exception as error:
                        warnings.warn(f'{name} cannot run this model, going on without: {error}', stacklevel=5)
                        failures.append(f'{name} failed')
                    else:
                        engines[name] = engine
        if not engines:
            advance(self.model, frontier, 0, stop)  # says what is wrong with the images, if it is them
            self.reason = '; '.join([*failures, f"PyTorch's compiler serves {self.dtype} on {device.type}"])
            engines = {'inductor': self._make('inductor')}
        chosen = next(iter(engines))
        if len(engines) > 1:
            seconds = shortest_times({
                name: functools.partial(_advance, engine, frontier, 0, stop) for name, engine in engines.items()
            }, device)
            chosen = min(seconds, key=seconds.get)
            times = ', '.join(f'{name} {1000 * s:.2f} ms' for name, s in seconds.items())
            self.reason = f'the fastest for {stop} members and {frontier[0].shape[0]} images: {times}'
        elif not self.reason:
            self.reason = '; '.join(['the only run-time that is installed and serves this model', *failures])
        _logger.info('engine %s: %s', chosen, self.reason)
        return engines[chosen]


def _advance(engine: Engine, frontier: Frontier, start: int, stop: int) -> tuple[Tensor, Frontier]:
    """Let an engine go from `start` to `stop` members, in its own steps."""
    between = (n for n in prefixes(stop) if start < n < stop) if engine.stepwise else ()
    logits = []
    for end in (*between, stop):
        members, frontier = engine.step(frontier, start, end)
        logits.append(members)
        start = end
    return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1), frontier


def optimize_for_inference(
        model: HierarchicalEnsemble,
        example_input: Tensor | None = None,
        engine: str = 'auto',
        dtype: torch.dtype | None = None,
        keep_memory: bool = False,
        compile: bool | None = None,
) -> OptimizedEnsemble:
    """Return a fast version of a model with the same `forward(x, num_members=None)`.

    Batch normalisation is folded into the convolutions, and an engine computes the rest:

    - 'onnxruntime' and 'openvino' go through the steps 0 -> 1 -> 2 -> 4 -> ... -> N, each an ONNX program that is
      written when first needed and kept on disk (`$TIMM_HNE_CACHE`, or `timm_hne` in the user's cache folder). For any
      other number of members there is one more program, for the step from the last of these.
    - 'inductor' is `torch.compile`: for each number of members asked for one program for all batches of two images or
      more, and one for a single image. Where it fails, the result runs eagerly, after a warning.
    - 'eager' is PyTorch layer by layer.
    - 'auto' takes the fastest of ONNX Runtime and OpenVINO as measured with the first images, if they are installed and
      serve the model's device and type, and the compiler otherwise.

    `result.mode` says which engine runs, and `result.reason` why. Whatever is needed is made when first asked for, so
    the first call with each number of members takes longer.

    The results are those of the original within 1e-4 of the largest logit in float32 and within 5e-2 in bfloat16.

    Args:
        model: Any hierarchical ensemble in evaluation mode. It is not changed, and shares no memory with the result.
        example_input: Images `(B, C, H, W)` as they will come; choosing and making programs is then done at once.
        engine: 'auto', 'onnxruntime', 'openvino', 'inductor' or 'eager'.
        dtype: Type to compute in, e.g. `torch.bfloat16`; the model's own if None. Logits have the original's type.
        keep_memory: If the model is on a CPU, call `timm_hne.process.keep_freed_memory`, which changes the whole
            process for good: feature maps of a large batch come back from the system page by page otherwise, each time.
        compile: Deprecated: True for engine='inductor', False for engine='eager'.

    Raises:
        TypeError: `model` is no hierarchical ensemble, or `dtype` no floating point type.
        ValueError: `model` is in training mode or has no pooling, `example_input` is not a batch of images for it, or
            the engine is unknown or cannot run on the model's device or in its type.
        ImportError: The engine is not installed.
    """
    check_ensemble(model)
    if model.training:
        raise ValueError('model must be in evaluation mode, got one in training mode; call model.eval() first.')
    if not model.poolings:
        raise ValueError("model must pool its last feature maps, got one with global_pool=''.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f'dtype must be a floating point torch.dtype or None, got {dtype!r}.')
    if compile is not None:
        engine = 'inductor' if compile else 'eager'
        warnings.warn(f'compile={compile} is deprecated: use engine={engine!r}.', DeprecationWarning, stacklevel=2)
    weight = next(model.parameters())
    if engine != 'auto':
        check_engine(engine, weight.device, dtype or weight.dtype)
    with torch.inference_mode(False):
        model = folded(model).to(dtype)
    if keep_memory and weight.device.type == 'cpu':
        keep_freed_memory()
    optimized = OptimizedEnsemble(model, engine, weight.dtype)
    if example_input is not None:
        optimized(example_input)
    return optimized
