"""The timm training task of hierarchical neural ensembles."""
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model

from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from .losses import HNELoss

_logger = logging.getLogger(__name__)


class StockTaskWarning(UserWarning):
    """A script that `timm-hne run` runs trains an HNE by a task that sees nothing but the mean of its members."""


class MemberLogits(nn.Module):
    """What `HNETask` trains: the ensemble, called for the logits of all members.

    DDP and `torch.compile` must wrap the module whose `forward` is the training forward, hence a module of its own.
    """

    def __init__(self, model: HierarchicalEnsemble):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_members(x, self.model.ensemble_size)

    def no_weight_decay(self) -> set[str]:
        return {f'model.{name}' for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        groups = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        return {f'model.{name}': group for name, group in groups.items()}.__getitem__


class HNETask(ClassificationTask):
    """Trains a hierarchical neural ensemble on the losses of its members, in place of timm's `ClassificationTask`.

    Everything else is as timm does it: EMA, AMP, gradient accumulation, `torch.compile`, DDP. Validation and
    checkpoints see the ensemble itself, so `timm.create_model(name, checkpoint_path=...)` loads them.

    Args:
        model: The ensemble to train.
        criterion: Loss for the ground truth, see `HNELoss`. Created from `criterion_kwargs` if None.
        criterion_kwargs: Arguments of timm's `create_classification_loss`.
        device: Device of the task.
        dtype: Data type of the task.
        verbose: Log what is trained.
        objective: Name of the training objective, see `HNELoss`.
        alpha: Weight of the distillation term, from 0 to 1.
        temperature: Temperature of the soft labels.

    The call returns a dict: `loss`, `output` (the mean logits of the full ensemble, shape (B, num_classes)), and the
    terms of the objective under their names.

    Raises:
        TypeError: `model` is no hierarchical ensemble, or an argument has the wrong type.
        ValueError: An argument is out of range, or the criterion does not fit.
    """

    def __init__(
            self,
            model: HierarchicalEnsemble,
            criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
            criterion_kwargs: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
            objective: str = 'hierarchical_codistillation',
            alpha: float = 0.5,
            temperature: float = 2.0,
    ):
        check_ensemble(model)
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.trainable_module = MemberLogits(model)
        self.criterion = HNELoss(objective, alpha, temperature, self.criterion).to(self.device)
        if self.verbose:
            _logger.info(f'HNETask: {model.ensemble_size} members, {self.criterion.extra_repr()}')

    def compile(
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs,
    ) -> nn.Module:
        """Compile the training forward and the ensemble that is validated, and return the latter."""
        self.eval_model = torch.compile(self.get_eval_model(), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> 'HNETask':
        """Wrap what is trained in DistributedDataParallel."""
        # timm's train.py names the device even if it is the CPU, which DDP refuses.
        return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters whose gradients are clipped, without the classifiers of all members if asked for."""
        model = unwrap_model(self.get_trainable_module()).model
        names = tuple(f'{name}.' for name in model.classifier_names) if exclude_head else ()
        return [parameter for name, parameter in model.named_parameters() if not name.startswith(names)]

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the ensemble, compiled if the task is, for validation and checkpoints."""
        resolved = super().get_eval_model(module=module, ema=ema)
        trainable = unwrap_model(resolved)
        return trainable.model if isinstance(trainable, MemberLogits) else resolved

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch.

        Args:
            input: Images, shape (B, C, H, W).
            target: Class indices (B,), or soft labels (B, num_classes) if the criterion takes them.
        """
        member_logits = self.trainable_module(input)
        return {**self.criterion(member_logits, target), 'output': member_logits.mean(dim=1)}
