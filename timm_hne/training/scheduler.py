"""Learning-rate schedules: the one that the paper uses on ImageNet, as a timm scheduler, and timm's."""
from bisect import bisect_right
from collections.abc import Sequence

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from .recipe import TrainConfig

__all__ = ['CyclicLRScheduler', 'create_scheduler', 'learning_rate']


class CyclicLRScheduler(Scheduler):
    """Cycles of linear decay with warm restarts, halved at milestones (Mehta et al., ESPNetv2, CVPR 2019).

    In epoch t the rate is `lr - (t mod T) * lr / T`, T being the length of a cycle: with T = 5, from `lr` down to
    `lr / 5`. It is multiplied by `decay_rate` at each milestone.

    Args:
        optimizer: Optimizer whose learning rates are scheduled, from those that it has.
        cycle_length: Epochs of a cycle, T.
        milestones: Epochs from which on the rate is reduced.
        decay_rate: Factor of each reduction.
        warmup_t: Epochs at the beginning that have the lowest rate of a cycle, as in the code of Mehta et al., where it
            is one epoch.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            cycle_length: int = 5,
            milestones: Sequence[int] = (60, 90, 110, 125, 135, 145),
            decay_rate: float = 0.5,
            warmup_t: int = 0,
    ):
        if cycle_length < 1:
            raise ValueError(f'cycle_length must be at least 1, got {cycle_length}.')
        if list(milestones) != sorted(set(milestones)):
            raise ValueError(f'milestones must increase, got {milestones}.')
        if not 0 < decay_rate <= 1:
            raise ValueError(f'decay_rate must be above 0 and at most 1, got {decay_rate}.')
        super().__init__(optimizer, param_group_field='lr')
        self.cycle_length = cycle_length
        self.milestones = list(milestones)
        self.decay_rate = decay_rate
        self.warmup_t = warmup_t

    def _get_lr(self, t: int) -> list[float]:
        position = self.cycle_length - 1 if t < self.warmup_t else t % self.cycle_length
        factor = (1 - position / self.cycle_length) * self.decay_rate ** bisect_right(self.milestones, t)
        return [value * factor for value in self.base_values]


def create_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int) -> Scheduler:
    """Create the schedule of a recipe: the one above by epochs, timm's by updates."""
    if config.sched == 'cyclic':
        return CyclicLRScheduler(
            optimizer,
            milestones=config.decay_milestones,
            decay_rate=config.decay_rate,
            warmup_t=int(config.warmup_epochs),
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_milestones=config.decay_milestones,
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the present rate of the layers whose rate is not scaled down."""
    return max(group['lr'] / (group.get('lr_scale') or 1.) for group in optimizer.param_groups)
