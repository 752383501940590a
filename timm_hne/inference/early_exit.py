"""Inference in which images leave the batch once the ensemble is sure of them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from ..checks import check_integer, check_number
from ..models.anytime import check_images, check_ready, stepper, validate_schedule
from ..models.ensemble import HierarchicalEnsemble
from ..models.frontier import first_frontier
from ..prefix import prefix_means
from ..runtime import CRITERIA, LOW_IS_SURE, highest_score, is_sure


def _check_criterion(criterion: str, num_classes: int) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f'criterion must be one of {", ".join(CRITERIA)}, got {criterion!r}.')
    if num_classes < 2:
        raise ValueError(f'num_classes must be at least 2 for criterion {criterion!r}, got {num_classes}.')


def validate_criterion(criterion: str, threshold: float, num_classes: int) -> None:
    """Check an exit criterion and its threshold.

    Raises:
        TypeError: `threshold` is not a number.
        ValueError: `criterion` is unknown, there is one class only, or `threshold` is out of its range: 0 to
            ln(num_classes) for the entropy, 0 to 1 for the others.
    """
    _check_criterion(criterion, num_classes)
    check_number('threshold', threshold, 0, highest_score(criterion, num_classes))


def _check_member_logits(member_logits: torch.Tensor) -> None:
    if not isinstance(member_logits, torch.Tensor) or not member_logits.is_floating_point():
        got = member_logits.dtype if isinstance(member_logits, torch.Tensor) else type(member_logits).__name__
        raise TypeError(f'member_logits must be a tensor of floating point numbers, got {got}.')
    if member_logits.dim() != 3 or not member_logits.shape[1]:
        raise ValueError(
            f'member_logits must be (B, n, num_classes) with at least one member, got {list(member_logits.shape)}.')


def _check_held_out(member_logits: torch.Tensor, target: torch.Tensor) -> None:
    """Raise a TypeError or ValueError unless these are logits of images with known classes, at least one."""
    _check_member_logits(member_logits)
    integers = isinstance(target, torch.Tensor) and not (target.is_floating_point() or target.is_complex())
    if not integers or target.dtype == torch.bool:
        got = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
        raise TypeError(f'target must be a tensor of integers, the classes, got {got}.')
    if target.shape != member_logits.shape[:1] or not len(target):
        raise ValueError(
            f'target must be (B,), at least one class for as many images as member_logits has, got '
            f'{list(target.shape)} for member_logits of shape {list(member_logits.shape)}.')
    if not member_logits.isfinite().all():
        images = (~member_logits.isfinite()).flatten(1).any(dim=1).sum().item()
        raise ValueError(f'member_logits must be finite, got NaN or infinity for {images} of {len(target)} images.')
    lowest, highest = target.min().item(), target.max().item()
    if lowest < 0 or highest >= member_logits.shape[2]:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f'target must be classes from 0 to {member_logits.shape[2] - 1}, got {wrong}.')


def exit_scores(member_logits: torch.Tensor, criterion: str) -> torch.Tensor:
    """Measure how sure the ensemble of the members given is of each image.

    Args:
        member_logits: `(B, n, num_classes)`.
        criterion: 'confidence' is the highest probability of the ensemble, 'margin' its distance to the second
            highest, 'entropy' that of the probabilities in nats, 'agreement' the share of members that predict the
            ensemble's class. One member agrees with itself, which tells nothing, so for n = 1 the agreement is -1.

    Returns:
        `(B,)`. An image is sure if its score is at least the threshold; for the entropy, at most.

    Raises:
        TypeError: `member_logits` is not a tensor of floating point numbers.
        ValueError: It has another shape, or `criterion` is unknown.
    """
    _check_member_logits(member_logits)
    _check_criterion(criterion, member_logits.shape[2])
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
        model: Any hierarchical ensemble in evaluation mode, or what `optimize_for_inference` returned.
        x: Images `(B, C, H, W)`.
        threshold: What the criterion must reach: at least this, or at most this for the entropy.
        criterion: 'confidence', 'margin', 'entropy' or 'agreement'; see `exit_scores`.
        schedule: Increasing numbers of members after which images may leave; if None, those that the model was exported
            for, else 1, 2, 4, ..., N. The last is what the least sure images get.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
    """
    check_ready(model)
    check_images(x, model.in_chans)
    validate_criterion(criterion, threshold, model.num_classes)
    schedule = getattr(model, 'schedule', None) if schedule is None else schedule
    schedule = validate_schedule(schedule, model.ensemble_size)
    return exit_in_batch(model, x, torch.full((len(x),), float(threshold)), criterion, schedule)


@torch.no_grad()
def exit_in_batch(
        model: HierarchicalEnsemble,
        x: torch.Tensor,
        thresholds: torch.Tensor | None,
        criterion: str,
        schedule: Sequence[int],
        limits: torch.Tensor | None = None,
) -> EarlyExit:
    """Evaluate as many members as each image needs, by thresholds and bounds of its own.

    Args:
        model: As `early_exit` takes it.
        x: Images `(B, C, H, W)`.
        thresholds: `(B,)`, what the criterion must reach for each image. Images leave at their limits only if None.
        criterion: As `early_exit` takes it.
        schedule: Increasing numbers of members after which images may leave.
        limits: `(B,)`, the number of members at most for each image. One between two of the schedule costs as much as
            the higher one. No image has another bound than the schedule's end if None.
    """
    step, frontier, start = stepper(model), first_frontier(model, x), 0
    active = torch.arange(len(x), device=x.device)
    used = torch.full_like(active, schedule[0])
    limits = torch.full_like(active, schedule[-1]) if limits is None else limits.to(x.device)
    thresholds = None if thresholds is None else thresholds.to(x.device)
    member_logits = result = None
    for stop in schedule:
        new, frontier = step(frontier, start, stop)
        member_logits = new if member_logits is None else torch.cat([member_logits, new], dim=1)
        logits = member_logits.mean(dim=1)
        if result is None:
            result = torch.empty_like(logits)
        # Written for all that take part; those that stay are overwritten at the next step.
        result[active], used[active] = logits, stop
        stay = limits[active] > stop
        if thresholds is not None:
            stay &= ~is_sure(exit_scores(member_logits, criterion), thresholds[active], criterion)
        for i in (limits[active] < stop).nonzero().flatten().tolist():
            limit = limits[active[i]]
            result[active[i]], used[active[i]] = member_logits[i, :limit].mean(dim=0), limit
        if stop == schedule[-1] or not stay.any():
            break
        active, member_logits = active[stay], member_logits[stay]
        # Whatever the features are made of, the images lie along the first axis of every tensor in them.
        frontier = tree_map_only(torch.Tensor, lambda features, stay=stay: features[stay], frontier)
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
        TypeError: An argument is of a wrong type.
        ValueError: `criterion` is unknown, `member_logits` are not finite or do not fit `target`, a class in there is
            none that they have, or `macs` lacks an n.
    """
    _check_held_out(member_logits, target)
    _check_criterion(criterion, member_logits.shape[2])
    check_integer('max_points', max_points, 1)
    schedule = validate_schedule(schedule, member_logits.shape[1])
    if not isinstance(macs, Mapping):
        raise TypeError(f'macs must map numbers of members to MACs, got {type(macs).__name__}.')
    missing = [n for n in schedule if n not in macs]
    if missing:
        raise ValueError(f'macs must have an entry for every n of the schedule {schedule}, got none for {missing}.')
    for n in schedule:
        check_number(f'macs[{n}]', macs[n], 0)
    scores = torch.stack([exit_scores(member_logits[:, :n], criterion) for n in schedule])
    correct = (prefix_means(member_logits, schedule).argmax(dim=2) == target[:, None]).T
    costs = torch.tensor([float(macs[n]) for n in schedule], dtype=torch.float64, device=scores.device)
    members = torch.tensor(schedule, dtype=torch.float64, device=scores.device)

    # No threshold: the score -1 of a lone member's agreement, and what rounding puts beyond the range.
    highest = highest_score(criterion, member_logits.shape[2])
    candidates = scores[:-1].double().flatten()
    candidates = candidates[(candidates >= 0) & (candidates <= highest)].unique()
    ranks = torch.linspace(0, max(len(candidates) - 1, 0), min(max_points, len(candidates))).round().long()
    strictest = 0. if criterion in LOW_IS_SURE else highest
    thresholds = {*candidates[ranks.to(candidates.device)].tolist(), strictest}
    points = []
    for threshold in sorted(thresholds, reverse=criterion in LOW_IS_SURE):
        sure = is_sure(scores.double(), threshold, criterion)
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
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range as for `exit_curve`, not exactly one of `target_macs` and
            `max_accuracy_loss` is given, or it cannot be reached.
    """
    if (target_macs is None) == (max_accuracy_loss is None):
        raise ValueError(
            'exactly one of target_macs and max_accuracy_loss must be given, '
            f'got {target_macs!r} and {max_accuracy_loss!r}.')
    if target_macs is None:
        check_number('max_accuracy_loss', max_accuracy_loss, 0, 1)
    else:
        check_number('target_macs', target_macs, 0)
    points = exit_curve(member_logits, target, macs, criterion, schedule, max_points=2000)
    if target_macs is not None:
        affordable = [point for point in points if point.macs <= target_macs]
        if not affordable:
            raise ValueError(f'target_macs must be at least {points[0].macs:.6g}, got {target_macs}.')
        return max(affordable, key=lambda point: (point.accuracy, -point.macs))
    last = validate_schedule(schedule, member_logits.shape[1])[-1]
    full = (prefix_means(member_logits, [last])[:, 0].argmax(dim=1) == target).double().mean().item()
    # A share of images is compared; rounding must not lose one.
    good = [point for point in points if point.accuracy >= full - max_accuracy_loss - 1e-9]
    if not good:
        least = full - max(point.accuracy for point in points)
        raise ValueError(f'max_accuracy_loss must be at least {least:.6g} on these images, got {max_accuracy_loss}.')
    return min(good, key=lambda point: point.macs)
