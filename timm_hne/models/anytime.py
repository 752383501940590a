"""Anytime prediction: logits after more and more members, until the caller or a deadline stops it."""
import functools
import math
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
import torch.nn as nn

from ..checks import check_integer, check_number
from ..tree import node_span, prefixes
from .frontier import Frontier, advance, check_tree, first_frontier

# Durations of past steps in seconds, per model, then per (shape, dtype, device, start, stop): what `deadline` goes by.
_step_times: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_MEASUREMENTS_KEPT = 5

_clock = time.perf_counter


def check_ready(model: nn.Module) -> None:
    """Make sure that a model can be asked for logits.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
        ValueError: It has no classifier, or it is in training mode.
    """
    check_tree(model)
    if model.training:
        raise ValueError('model must be in evaluation mode, got one in training mode; call model.eval() first.')
    if model.num_classes == 0:
        raise ValueError('model must have a classifier, got one with num_classes=0.')


def validate_schedule(schedule: Sequence[int] | None, ensemble_size: int) -> tuple[int, ...]:
    """Check the numbers of members to stop at and return them; the powers of two, then N, if None.

    Raises:
        TypeError: `schedule` is not a sequence of integers.
        ValueError: `schedule` is empty, does not increase, or leaves 1..`ensemble_size`.
    """
    if schedule is None:
        return prefixes(ensemble_size)
    if isinstance(schedule, (str, bytes)) or not isinstance(schedule, Sequence):
        raise TypeError(f'schedule must be a sequence of numbers of members, got {schedule!r}.')
    if not schedule:
        raise ValueError(f'schedule must hold at least one number from 1 to {ensemble_size}, got {schedule!r}.')
    for i, num_members in enumerate(schedule):
        check_integer(f'schedule[{i}]', num_members, 1, ensemble_size)
    if any(a >= b for a, b in zip(schedule, schedule[1:])):
        raise ValueError(f'schedule must increase, got {schedule!r}.')
    return tuple(schedule)


def check_images(x: torch.Tensor, in_chans: int) -> None:
    """Make sure that `x` is a batch of images `(B, in_chans, H, W)` of at least one pixel.

    Raises:
        TypeError: `x` is no tensor, or not one of floating point numbers.
        ValueError: `x` is of another shape.
    """
    if not torch.jit.is_scripting() and not isinstance(x, torch.Tensor):
        raise TypeError(f'x must be a tensor of images, got {type(x).__name__}.')
    if not x.is_floating_point():
        raise TypeError(f'x must hold floating point numbers, normalised as the model expects them, got {x.dtype}.')
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f'x must be images (B, {in_chans}, H, W) of at least 1x1 pixels, got shape {list(x.shape)}.')


def stepper(model: nn.Module) -> Callable[[Frontier, int, int], tuple[torch.Tensor, Frontier]]:
    """Return the model's own way to take a step: what `optimize_for_inference` returns has a compiled one."""
    return torch.no_grad()(getattr(model, 'advance', None) or functools.partial(advance, model))


def forget_times(model: nn.Module) -> None:
    """Forget how long the steps of a model took, because it will take them elsewhere or anew."""
    _step_times.pop(model, None)


def _relative_cost(model: nn.Module, start: int, stop: int) -> float:
    """Return a number that grows with the work of a step: parameters times pixels, over the new nodes of each block."""
    if isinstance(macs := getattr(model, 'macs', None), dict):  # of exported programs, which have no blocks
        return macs[stop] - macs.get(start, 0)
    cost = 0.
    for block, info in zip(model.blocks, model.feature_info):
        first, end = (node_span(block.nodes, 0, n, model.nodes[-1])[1] for n in (start, stop))
        cost += (end - first) * sum(p.numel() for p in block.parameters()) / block.used / info['reduction'] ** 2
    return cost


def anytime(
        model: nn.Module,
        x: torch.Tensor,
        schedule: Sequence[int] | None = None,
        deadline: float | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the ensemble's logits after more and more members, reusing everything that has been computed.

    The caller may stop at any time. With a `deadline` the iterator stops by itself: it takes another step only if that
    step, as slow as the slowest of its last five times with this model, shape and device, would end in time. Each time
    a step is declined the oldest of these times is forgotten; a step without any is predicted from the steps before it.
    The first step is always taken. No gradients are kept.

    A step that an optimised model takes for the first time is compiled first, which no deadline foresees: go through
    all steps once, without a deadline, before you rely on one.

    Args:
        model: Any `hne_*` model in evaluation mode, or what `optimize_for_inference` returned.
        x: Images `(B, C, H, W)`.
        schedule: Increasing numbers of members to yield after; 1, 2, 4, ..., N if None.
        deadline: Seconds from this call after which no step may end; none if None.

    Returns:
        Iterator over logits `(B, num_classes)`, equal to `model(x, num_members=n)` for each n of the schedule.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: `schedule` is empty, out of order or out of range, `deadline` is NaN, `x` is not a batch of images
            for this model, or the model is in training mode or has no classifier.
    """
    begin = _clock()
    check_ready(model)
    check_images(x, model.in_chans)
    schedule = validate_schedule(schedule, model.ensemble_size)
    if deadline is not None:
        if deadline != math.inf:  # which is a deadline too: nothing is ever declined, but all is timed
            check_number('deadline', deadline)
        deadline += begin
    return _anytime(model, x, schedule, deadline)


def _anytime(
        model: nn.Module,
        x: torch.Tensor,
        schedule: tuple[int, ...],
        deadline: float | None,
) -> Iterator[torch.Tensor]:
    # Networks that share nothing read the images at every step; the caller may have put others in their place by then.
    step, frontier = stepper(model), first_frontier(model, x if model.nodes[0] == 1 else x.clone())
    measured = _step_times.setdefault(model, defaultdict(lambda: deque(maxlen=_MEASUREMENTS_KEPT)))
    shape, compiles = (tuple(x.shape), x.dtype, x.device), hasattr(model, 'advance')
    logits: list[torch.Tensor] = []
    spent, start = 0., 0
    for stop in schedule:
        key = (*shape, start, stop)
        if deadline is not None and start:
            past = measured.get(key, ())
            expected = max(past, default=None)  # another thread may take out the only one
            if expected is None:
                expected = spent * _relative_cost(model, start, stop) / _relative_cost(model, 0, start)
            now = _clock()
            if now + expected > deadline:
                # A step that is never taken gets no new times: one slow time must not rule it out for good.
                if past and now <= deadline:
                    with suppress(IndexError):
                        past.popleft()
                return
        begin = _clock()
        members, frontier = step(frontier, start, stop)
        logits.append(members)
        prediction = torch.cat(logits, dim=1).mean(dim=1)
        if deadline is not None:
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            duration = _clock() - begin
            spent += duration
            first_time = key not in measured
            past = measured[key]
            # The first time of a step that is compiled is that of the compiler.
            if not (compiles and first_time):
                past.append(duration)
        yield prediction
        start = stop
