"""Inference that stops when it should: anytime prediction, and images that leave the batch once they are sure.

Both build on `advance`, which adds members to an evaluation and computes only the nodes that are new. In the paper's
words (section 3.1) networks of the tree "can be evaluated in a sequential manner"; this is that, in any step size.
"""
import functools
import math
import numbers
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .ensemble import HierarchicalEnsemble, check_images
from .tree import node_span, prefixes, validate_num_members

# For every block the feature map of the last parent computed if some of its children are still to come, else None.
Frontier = tuple[torch.Tensor | None, ...]

CRITERIA = ('confidence', 'margin', 'entropy', 'agreement')

# Durations of past steps in seconds, per model, then per (shape, dtype, device, start, stop): what `deadline` goes by.
_step_times: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_MEASUREMENTS_KEPT = 5

_clock = time.perf_counter


def check_ready(model: HierarchicalEnsemble) -> None:
    """Raise a ValueError unless `model` can be asked for logits: it has a classifier and is in evaluation mode."""
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
    for num_members in schedule:
        try:
            validate_num_members(num_members, ensemble_size)
        except (TypeError, ValueError) as error:
            raise type(error)(f'schedule {schedule!r}: {error}') from None
    if any(a >= b for a, b in zip(schedule, schedule[1:])):
        raise ValueError(f'schedule must increase, got {schedule!r}.')
    return tuple(schedule)


def first_frontier(model: HierarchicalEnsemble, x: torch.Tensor) -> Frontier:
    """Return the frontier of an evaluation that has not begun: the images `x`, `(B, C, H, W)`."""
    return x, *(None for _ in model.nodes[1:])


def advance(
        model: HierarchicalEnsemble,
        frontier: Frontier,
        start: int,
        stop: int,
) -> tuple[torch.Tensor, Frontier]:
    """Evaluate the members `start` to `stop - 1`, after those before `start`, computing only the nodes that are new.

    Args:
        model: Any `hne_*` model.
        frontier: What the previous step returned, or `first_frontier(model, x)` if `start` is 0.
        start: Number of members evaluated so far.
        stop: Number of members after this step.

    Returns:
        The new members' logits `(B, stop - start, num_classes)`, and the frontier of the next step.
    """
    leaves = model.num_leaves
    kept: list[torch.Tensor | None] = []
    # Feature maps of the parents that this step has computed. The image is the one parent of the first block.
    fresh, parents, parent_channels = (frontier[0] if start == 0 else None), 1, model.in_chans
    for block, last in zip(model.blocks, frontier):
        known = node_span(parents, 0, start, leaves)[1]
        first, end = node_span(block.nodes, 0, start, leaves)[1], node_span(block.nodes, 0, stop, leaves)[1]
        family = block.nodes // parents
        # Only the last parent known so far can have children to come.
        inputs = [last] if first < min(end, known * family) else []
        inputs += [fresh] if fresh is not None else []
        if end == family * node_span(parents, 0, stop, leaves)[1]:
            kept.append(None)
        elif fresh is None or fresh.shape[1] == parent_channels:
            kept.append(last if fresh is None else fresh)
        else:
            # A copy, lest the view keeps the other nodes in memory.
            kept.append(fresh[:, -parent_channels:].clone())
        fresh = None
        if inputs:
            x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
            fresh = block(x, None if (first, end) == (0, block.nodes) else (first, end))
        parents, parent_channels = block.nodes, block.out_channels
    span = None if (start, stop) == (0, leaves) else (start, stop)
    return model.head_members(fresh, span), tuple(kept)


def _stepper(model: torch.nn.Module) -> Callable[[Frontier, int, int], tuple[torch.Tensor, Frontier]]:
    """Return the model's own way to take a step: what `optimize_for_inference` returns has a compiled one."""
    return torch.no_grad()(getattr(model, 'advance', None) or functools.partial(advance, model))


def forget_times(model: torch.nn.Module) -> None:
    """Forget how long the steps of a model took, because it will take them elsewhere or anew."""
    _step_times.pop(model, None)


def _relative_cost(model: HierarchicalEnsemble, start: int, stop: int) -> float:
    """Estimate the work of a step, in a unit of its own: weights times pixels of the new nodes of each block."""
    cost = 0.
    for block, info in zip(model.blocks, model.feature_info):
        first, end = (node_span(block.nodes, 0, n, model.num_leaves)[1] for n in (start, stop))
        cost += (end - first) * sum(p.numel() for p in block.parameters()) / block.nodes / info['reduction'] ** 2
    return cost


def anytime(
        model: HierarchicalEnsemble,
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
        TypeError: `schedule` is not a sequence of integers, or `deadline` is not a number.
        ValueError: `schedule` is empty, out of order or out of range, `deadline` is NaN, `x` is not a batch of images,
            or the model is in training mode or has no classifier.
    """
    begin = _clock()
    check_ready(model)
    check_images(x, model.in_chans)
    schedule = validate_schedule(schedule, model.ensemble_size)
    if deadline is not None:
        if isinstance(deadline, bool) or not isinstance(deadline, numbers.Real):
            raise TypeError(f'deadline must be a number of seconds or None, got {deadline!r}.')
        if math.isnan(deadline):
            raise ValueError(f'deadline must be a number of seconds, got {deadline}.')
        deadline += begin
    return _anytime(model, x, schedule, deadline)


def _anytime(
        model: HierarchicalEnsemble,
        x: torch.Tensor,
        schedule: tuple[int, ...],
        deadline: float | None,
) -> Iterator[torch.Tensor]:
    # Networks that share nothing read the images at every step; the caller may have put others in their place by then.
    step, frontier = _stepper(model), first_frontier(model, x if model.nodes[0] == 1 else x.clone())
    measured = _step_times.setdefault(model, defaultdict(lambda: deque(maxlen=_MEASUREMENTS_KEPT)))
    shape, compiles = (tuple(x.shape), x.dtype, x.device), hasattr(model, 'advance')
    logits: list[torch.Tensor] = []
    spent, start = 0., 0
    for stop in schedule:
        key = (*shape, start, stop)
        if deadline is not None and start:
            past = measured.get(key)
            if past:
                expected = max(past)
            else:
                expected = spent * _relative_cost(model, start, stop) / _relative_cost(model, 0, start)
            now = _clock()
            if now + expected > deadline:
                # A step that is never taken gets no new times: one slow time must not rule it out for good.
                if past and now <= deadline:
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


def _highest(criterion: str, num_classes: int) -> float:
    return math.log(num_classes) if criterion == 'entropy' else 1.


def validate_criterion(criterion: str, threshold: float, num_classes: int) -> None:
    """Check an exit criterion and its threshold.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: `criterion` is unknown, or `threshold` is out of its range: 0 to ln(num_classes) for the entropy,
            0 to 1 for the others.
    """
    if criterion not in CRITERIA:
        raise ValueError(f'criterion must be one of {", ".join(CRITERIA)}, got {criterion!r}.')
    if num_classes < 2:
        raise ValueError(f'criterion {criterion!r} needs a model of at least 2 classes, got {num_classes}.')
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f'threshold must be a number, got {threshold!r}.')
    highest = _highest(criterion, num_classes)
    if not 0 <= threshold <= highest:
        raise ValueError(f'threshold of criterion {criterion!r} must be from 0 to {highest:.6g}, got {threshold}.')


def exit_scores(member_logits: torch.Tensor, criterion: str) -> torch.Tensor:
    """Measure how sure the ensemble of the members given is of each image.

    Args:
        member_logits: `(B, n, num_classes)`.
        criterion: 'confidence' is the highest probability of the ensemble, 'margin' its distance to the second
            highest, 'entropy' that of the probabilities in nats, 'agreement' the share of members that predict the
            ensemble's class. One member agrees with itself, which tells nothing, so for n = 1 the agreement is -1.

    Returns:
        `(B,)`. An image is sure if its score is at least the threshold; for the entropy, at most.
    """
    logits = member_logits.mean(dim=1)
    if criterion == 'agreement':
        if member_logits.shape[1] == 1:
            return torch.full_like(logits[:, 0], -1., dtype=torch.float)
        votes = member_logits.argmax(dim=2) == logits.argmax(dim=1, keepdim=True)
        return votes.float().mean(dim=1)
    if criterion == 'entropy':
        log_probs = logits.float().log_softmax(dim=1)
        return -(log_probs.exp() * log_probs).sum(dim=1)
    probs = logits.float().softmax(dim=1)
    if criterion == 'confidence':
        return probs.amax(dim=1)
    highest = probs.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1]


def _is_sure(scores: torch.Tensor, threshold: float, criterion: str) -> torch.Tensor:
    return scores <= threshold if criterion == 'entropy' else scores >= threshold


class EarlyExit(NamedTuple):
    """What `early_exit` returns.

    Attributes:
        logits: `(B, num_classes)`, those of the step at which each image left.
        num_members: `(B,)`, the number of members each image used.
    """
    logits: torch.Tensor
    num_members: torch.Tensor


@torch.no_grad()
def early_exit(
        model: HierarchicalEnsemble,
        x: torch.Tensor,
        threshold: float,
        criterion: str = 'confidence',
        schedule: Sequence[int] | None = None,
) -> EarlyExit:
    """Evaluate as many members as each image needs: after each step the images that are sure leave the batch.

    What `optimize_for_inference` returned has programs of its own for a single image, which may be what is left of a
    batch: before the first batch that counts, go through all steps of `anytime` once with many images, once with one.

    Args:
        model: Any `hne_*` model in evaluation mode, or what `optimize_for_inference` returned.
        x: Images `(B, C, H, W)`.
        threshold: What the criterion must reach: at least this, or at most this for the entropy.
        criterion: 'confidence', 'margin', 'entropy' or 'agreement'; see `exit_scores`.
        schedule: Increasing numbers of members after which images may leave; 1, 2, 4, ..., N if None. The last is
            what the least sure images get.

    Raises:
        TypeError: `schedule` or `threshold` is of a wrong type.
        ValueError: One of them or `criterion` is out of range, or the model is in training mode or has no classifier.
    """
    check_ready(model)
    check_images(x, model.in_chans)
    validate_criterion(criterion, threshold, model.num_classes)
    schedule = validate_schedule(schedule, model.ensemble_size)
    step, frontier, start = _stepper(model), first_frontier(model, x), 0
    active = torch.arange(len(x), device=x.device)
    used = torch.full_like(active, schedule[0])
    member_logits = result = None
    for stop in schedule:
        new, frontier = step(frontier, start, stop)
        member_logits = new if member_logits is None else torch.cat([member_logits, new], dim=1)
        logits = member_logits.mean(dim=1)
        if result is None:
            result = torch.empty_like(logits)
        # Written for all that take part; those that stay are overwritten at the next step.
        result[active], used[active] = logits, stop
        stay = ~_is_sure(exit_scores(member_logits, criterion), threshold, criterion)
        if stop == schedule[-1] or not stay.any():
            break
        active, member_logits = active[stay], member_logits[stay]
        frontier = tuple(None if features is None else features[stay] for features in frontier)
        start = stop
    return EarlyExit(result, used)


@dataclass(frozen=True)
class ExitPoint:
    """What a threshold costs and achieves on the data it was tried on.

    Attributes:
        threshold: The threshold.
        accuracy: Share of correct predictions, 0 to 1.
        macs: Multiply-accumulates per image, the mean over the images.
        num_members: Members per image, the mean over the images.
    """
    threshold: float
    accuracy: float
    macs: float
    num_members: float


def exit_curve(
        member_logits: torch.Tensor,
        target: torch.Tensor,
        macs: Mapping[int, float],
        criterion: str = 'confidence',
        schedule: Sequence[int] | None = None,
        max_points: int = 200,
) -> list[ExitPoint]:
    """Tell what `early_exit` would do at many thresholds, from logits of all members.

    Args:
        member_logits: `(B, N, num_classes)` of held-out images, from `model.forward_members`.
        target: Classes `(B,)`.
        macs: MACs of the first n members, for every n of the schedule; `timm_hne.cost.member_macs(model)` has them.
        criterion: 'confidence', 'margin', 'entropy' or 'agreement'; see `exit_scores`.
        schedule: As for `early_exit`.
        max_points: Thresholds to try at most: scores that occur, evenly spread by rank.

    Returns:
        Points from the cheapest to the most expensive.

    Raises:
        ValueError: `criterion` is unknown, `member_logits` and `target` do not fit, or `macs` lacks an n.
    """
    if member_logits.dim() != 3 or target.shape != member_logits.shape[:1] or not len(target):
        raise ValueError(
            'member_logits must be (B, N, num_classes) and target (B,) with at least one image, got '
            f'{list(member_logits.shape)} and {list(target.shape)}.')
    validate_criterion(criterion, 0, member_logits.shape[2])
    schedule = validate_schedule(schedule, member_logits.shape[1])
    missing = [n for n in schedule if n not in macs]
    if missing:
        raise ValueError(f'macs must have an entry for every n of the schedule {schedule}, got none for {missing}.')
    scores = torch.stack([exit_scores(member_logits[:, :n], criterion) for n in schedule])
    correct = torch.stack([member_logits[:, :n].mean(dim=1).argmax(dim=1) == target for n in schedule])
    costs = torch.tensor([float(macs[n]) for n in schedule], dtype=torch.float64, device=scores.device)
    members = torch.tensor(schedule, dtype=torch.float64, device=scores.device)

    # No threshold: the score -1 of a lone member's agreement, and what rounding puts beyond the range.
    candidates = scores[:-1].double().flatten()
    candidates = candidates[(candidates >= 0) & (candidates <= _highest(criterion, member_logits.shape[2]))].unique()
    ranks = torch.linspace(0, max(len(candidates) - 1, 0), min(max_points, len(candidates))).round().long()
    strictest = 0. if criterion == 'entropy' else 1.
    thresholds = {*candidates[ranks.to(candidates.device)].tolist(), strictest}
    points = []
    for threshold in sorted(thresholds, reverse=criterion == 'entropy'):
        sure = _is_sure(scores.double(), threshold, criterion)
        sure[-1] = True
        step = sure.int().argmax(dim=0)
        points.append(ExitPoint(
            threshold=threshold,
            accuracy=correct.gather(0, step[None]).double().mean().item(),
            macs=costs[step].mean().item(),
            num_members=members[step].mean().item(),
        ))
    return points


def calibrate_threshold(
        member_logits: torch.Tensor,
        target: torch.Tensor,
        macs: Mapping[int, float],
        criterion: str = 'confidence',
        schedule: Sequence[int] | None = None,
        target_macs: float | None = None,
        max_accuracy_loss: float | None = None,
) -> ExitPoint:
    """Pick the threshold of `early_exit` on held-out data, for a cost or for an accuracy.

    Args:
        member_logits: `(B, N, num_classes)` of held-out images, from `model.forward_members`.
        target: Classes `(B,)`.
        macs: MACs of the first n members, for every n of the schedule; `timm_hne.cost.member_macs(model)` has them.
        criterion: 'confidence', 'margin', 'entropy' or 'agreement'; see `exit_scores`.
        schedule: As for `early_exit`.
        target_macs: MACs per image, on average, that may not be exceeded: the most accurate threshold within is taken,
            of equally accurate ones the cheapest.
        max_accuracy_loss: Share of the images, 0 to 1, that may be lost against evaluating the last n of the schedule
            for all: the cheapest threshold that keeps this is taken.

    Raises:
        ValueError: Not exactly one of `target_macs` and `max_accuracy_loss` is given, or it cannot be reached.
    """
    if (target_macs is None) == (max_accuracy_loss is None):
        raise ValueError(
            'exactly one of target_macs and max_accuracy_loss must be given, '
            f'got {target_macs!r} and {max_accuracy_loss!r}.')
    points = exit_curve(member_logits, target, macs, criterion, schedule, max_points=2000)
    if target_macs is not None:
        affordable = [point for point in points if point.macs <= target_macs]
        if not affordable:
            raise ValueError(f'target_macs must be at least {points[0].macs:.6g}, got {target_macs}.')
        return max(affordable, key=lambda point: (point.accuracy, -point.macs))
    if not 0 <= max_accuracy_loss <= 1:
        raise ValueError(f'max_accuracy_loss must be from 0 to 1, got {max_accuracy_loss}.')
    last = validate_schedule(schedule, member_logits.shape[1])[-1]
    full = (member_logits[:, :last].mean(dim=1).argmax(dim=1) == target).double().mean().item()
    # A share of images is compared; rounding must not lose one.
    good = [point for point in points if point.accuracy >= full - max_accuracy_loss - 1e-9]
    if not good:
        least = full - max(point.accuracy for point in points)
        raise ValueError(f'max_accuracy_loss must be at least {least:.6g} on these images, got {max_accuracy_loss}.')
    return min(good, key=lambda point: point.macs)
