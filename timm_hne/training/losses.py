"""Training objectives of hierarchical neural ensembles (sections 3.2 and 3.3 of the paper).

All of them work on member logits of shape (B, N, C): a batch of B images, N members, C classes. They are means over
the batch, and sums over the members (Eq. 9, 11) or over the prefixes (Eq. 10, 12). The paper's inner loss `l` is the
`criterion` where it compares with ground truth, and cross-entropy with soft labels where it distils.
"""
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import JsdCrossEntropy, TwoWayLoss

from ..checks import check_number
from ..prefix import prefix_means

OBJECTIVES = (
    'independent',
    'hierarchical',
    'independent+hierarchical',
    'codistillation',
    'hierarchical_codistillation',
)

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def independent_loss(member_logits: torch.Tensor, target: torch.Tensor, criterion: Criterion) -> torch.Tensor:
    """Return L_I, the sum of the members' own losses (Eq. 9).

    Args:
        member_logits: (B, N, C)
        target: Whatever `criterion` compares with: class indices (B,), or soft or binary labels (B, C).
        criterion: Loss of logits (M, C) and targets of M samples, a mean over the samples.
    """
    batch_size, num_terms, num_classes = member_logits.shape
    targets = target.unsqueeze(1).expand(batch_size, num_terms, *target.shape[1:])
    return num_terms * criterion(member_logits.reshape(-1, num_classes), targets.flatten(0, 1))


def hierarchical_loss(member_logits: torch.Tensor, target: torch.Tensor, criterion: Criterion) -> torch.Tensor:
    """Return L_H, the sum of the losses of all nested ensembles, the full one included (Eq. 10).

    The arguments are those of `independent_loss`.
    """
    return independent_loss(prefix_means(member_logits), target, criterion)


def codistillation_loss(member_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return L_D: every member learns from the full ensemble (Eq. 11).

    Args:
        member_logits: (B, N, C)
        temperature: Softens teacher and student alike; the loss is scaled by its square, so that the gradients keep
            their size (Hinton et al., 2015).
    """
    return _distillation_loss(member_logits, member_logits.mean(dim=1), temperature)


def hierarchical_codistillation_loss(member_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return L_HD: every smaller nested ensemble learns from the full one (Eq. 12). Zero for a single member.

    The arguments are those of `codistillation_loss`.
    """
    outputs = prefix_means(member_logits)
    return _distillation_loss(outputs[:, :-1], outputs[:, -1], temperature)


def _distillation_loss(students: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of students (B, K, C) with the soft labels of a teacher (B, C), summed over the students."""
    soft_labels = F.softmax(teacher.detach() / temperature, dim=-1)
    # The students share their labels, so their log-probabilities can be added first.
    log_probabilities = F.log_softmax(students / temperature, dim=-1).sum(dim=1)
    return -temperature ** 2 * (soft_labels * log_probabilities).sum(dim=-1).mean()


class HNELoss(nn.Module):
    """The loss of a hierarchical neural ensemble.

    ============================= ======================================= ==============
    objective                     loss                                    equations
    ============================= ======================================= ==============
    independent                   L_I                                     9
    hierarchical                  L_H                                     10
    independent+hierarchical      L_I + L_H                               9, 10
    codistillation                (1 - alpha) * L_I + alpha * L_D         9, 11
    hierarchical_codistillation   (1 - alpha) * L_I + alpha * L_HD        9, 12
    ============================= ======================================= ==============

    Half precision logits are raised to float32 first.

    Args:
        objective: One of the names above.
        alpha: Weight of the distillation term, from 0 to 1. The paper uses 0.5 on CIFAR and 0.75 on ImageNet.
        temperature: Temperature of the soft labels, above 0. The paper uses 2.
        criterion: Loss for the ground truth, which must be a mean over independent samples: any timm criterion but
            `JsdCrossEntropy` and `TwoWayLoss`. Cross-entropy by default.

    Shape:
        - member_logits: (B, N, C), from `model.forward_members(x)`
        - target: (B,) class indices of any integer type, or (B, C) soft or binary labels if the criterion takes them
        - output: a dict of scalars: `loss`, and the terms it is made of before their weighting, named `independent`,
          `hierarchical`, `codistillation` and `hierarchical_codistillation`

    Raises:
        TypeError: An argument, or an input of the call, has the wrong type.
        ValueError: An argument is out of range, the criterion does not fit, or the input shapes do not match.
    """

    def __init__(
            self,
            objective: str = 'hierarchical_codistillation',
            alpha: float = 0.5,
            temperature: float = 2.0,
            criterion: Criterion | None = None,
    ):
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f'objective must be one of {", ".join(OBJECTIVES)}, got {objective!r}.')
        self.objective = objective
        self.alpha = check_number('alpha', alpha, 0, 1)
        self.temperature = check_number('temperature', temperature, 0, above=True)
        self.criterion = _validate_criterion(nn.CrossEntropyLoss() if criterion is None else criterion)
        self.weights = {
            'independent': {'independent': 1},
            'hierarchical': {'hierarchical': 1},
            'independent+hierarchical': {'independent': 1, 'hierarchical': 1},
            'codistillation': {'independent': 1 - alpha, 'codistillation': alpha},
            'hierarchical_codistillation': {'independent': 1 - alpha, 'hierarchical_codistillation': alpha},
        }[objective]

    def extra_repr(self) -> str:
        return f'objective={self.objective!r}, alpha={self.alpha}, temperature={self.temperature}'

    def forward(self, member_logits: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        # What PyTorch's functions skip if nobody says otherwise.
        _validate_inputs(member_logits, target, getattr(self.criterion, 'ignore_index', -100))
        if member_logits.dtype in (torch.float16, torch.bfloat16):
            member_logits = member_logits.float()
        # Criteria take class indices of 64 bits and soft labels of the type of the logits.
        target = target.long() if target.ndim == 1 else target.to(member_logits.dtype)

        terms = {name: self._term(name, member_logits, target) for name in self.weights}
        # New tensors throughout: timm's train.py divides the loss in place, which must not reach the terms.
        return {'loss': sum(weight * terms[name] for name, weight in self.weights.items()), **terms}

    def _term(self, name: str, member_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if name == 'codistillation':
            return codistillation_loss(member_logits, self.temperature)
        if name == 'hierarchical_codistillation':
            return hierarchical_codistillation_loss(member_logits, self.temperature)
        supervised_loss = independent_loss if name == 'independent' else hierarchical_loss
        term = supervised_loss(member_logits, target, self.criterion)
        if term.ndim:
            raise ValueError(f'criterion must return a mean over the samples, got the shape {tuple(term.shape)}.')
        return term


def _validate_criterion(criterion: Criterion) -> Criterion:
    if not callable(criterion):
        raise TypeError(f'criterion must be a module or a function, got {criterion!r}.')
    if isinstance(criterion, (JsdCrossEntropy, TwoWayLoss)):
        raise ValueError(
            f'criterion must treat the samples of a batch independently, {type(criterion).__name__} relates them to '
            'each other, and an ensemble loss shows it all members in one batch. Use for instance CrossEntropyLoss, '
            'LabelSmoothingCrossEntropy, SoftTargetCrossEntropy or BinaryCrossEntropy.')
    # BinaryCrossEntropy(sum_classes=True) says 'none', sums over the classes and returns the mean over the samples.
    reduction = 'mean' if getattr(criterion, 'sum_classes', False) else getattr(criterion, 'reduction', 'mean')
    if reduction not in ('mean', 'batchmean'):
        raise ValueError(f"criterion must have reduction='mean' or 'batchmean', got {reduction!r}.")
    return criterion


def _validate_inputs(member_logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> None:
    for name, value in (('member_logits', member_logits), ('target', target)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f'{name} must be a tensor, got {type(value).__name__}.')
    shape = tuple(member_logits.shape)
    if len(shape) != 3:
        raise ValueError(
            f'member_logits must have the shape (batch, members, classes), got {shape}. '
            'model.forward_members(x) returns them; model(x) returns their mean.')
    if not member_logits.is_floating_point():
        raise TypeError(f'member_logits must be of a floating point type, got {member_logits.dtype}.')
    if not shape[0] or not shape[1]:
        raise ValueError(f'member_logits must have at least one image and one member, got the shape {shape}.')

    batch_size, _, num_classes = shape
    if target.ndim not in (1, 2) or target.shape[0] != batch_size:
        raise ValueError(
            f'target must have the shape ({batch_size},) or ({batch_size}, {num_classes}) to match member_logits of '
            f'shape {shape}, got {tuple(target.shape)}.')
    if target.ndim == 2:
        if target.shape[1] != num_classes:
            raise ValueError(f'target has {target.shape[1]} classes, member_logits have {num_classes}.')
    elif target.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f'target must hold integer class indices if it has one axis, got {target.dtype}.')
    # Reading the values of an accelerator's tensor would wait for it in every step.
    elif target.device.type == 'cpu' and not torch.compiler.is_compiling():
        lowest, highest = target.aminmax()
        if lowest < 0 or highest >= num_classes:
            wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
            if len(wrong):
                raise ValueError(
                    f'target holds class index {wrong[0].item()}, member_logits have {num_classes} classes (0 to '
                    f'{num_classes - 1}).')
