"""The losses of an epoch: their means, and the end of a run in which they are no numbers any more."""
import math

import torch
from timm.utils import reduce_tensor

__all__ = ['EpochLosses', 'NonFiniteLossError']


class NonFiniteLossError(RuntimeError):
    """The loss, or a weight, became infinite or not a number."""


class EpochLosses:
    """The losses of an epoch. They are read from the device now and then only, each reading waits for it."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.names: list[str] = []
        self.unread: list[tuple[torch.Tensor, int, float]] = []
        self.total = 0.
        self.count = 0

    def add(self, output: dict[str, torch.Tensor], step: int, lr: float) -> None:
        """Take the loss and its terms from the output of a task."""
        self.names = [name for name in output if name != 'output']
        self.unread.append((torch.stack([output[name].detach() for name in self.names]), step, lr))

    def check(self) -> dict[str, float]:
        """Return the mean losses since the beginning of the epoch.

        Raises:
            NonFiniteLossError: One was infinite or not a number.
        """
        values = torch.stack([losses for losses, _, _ in self.unread]).cpu().double()
        for losses, (_, step, lr) in zip(values, self.unread):
            if not losses.isfinite().all():
                bad = ', '.join(f'{name} = {value}' for name, value in zip(self.names, losses.tolist())
                                if not math.isfinite(value))
                kept = 'The last checkpoint is from before. ' if self.epoch else ''
                raise NonFiniteLossError(
                    f'the loss is not finite in epoch {self.epoch + 1}, step {step} of its phase (counted from 0), at '
                    f'learning rate {lr:g}: {bad}. '
                    f'{kept}A lower lr, warmup_epochs or clip_grad may help.')
        self.total = self.total + values.sum(dim=0)
        self.count += len(self.unread)
        self.unread.clear()
        return dict(zip(self.names, (self.total / self.count).tolist()))

    def of_all_processes(self, world_size: int, device: torch.device) -> dict[str, float]:
        """Return the mean losses that were read, over all processes, which have equally many."""
        mean = self.total / self.count
        if world_size > 1:
            mean = reduce_tensor(mean.to(device), world_size)
        return dict(zip(self.names, mean.tolist()))
