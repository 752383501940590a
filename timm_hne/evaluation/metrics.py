"""What an ensemble is worth: accuracy, diversity, calibration and uncertainty, all from member logits.

Member logits have the shape (B, N, C): B images, N members, C classes; `model.forward_members(x)` returns them. The
first n members of an ensemble are an ensemble too (Eq. 5 of the paper), so one pass over the data serves all n.
"""
import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator

from ..prefix import prefix_means

__all__ = [
    'EnsembleMetrics',
    'brier_score',
    'calibration_gaps',
    'logit_std',
    'mutual_information',
    'nested_logits',
    'predictive_entropy',
    'variation_ratio',
]

# Temperatures among which the one of the least NLL is taken, and how finely confidences at each of them are counted.
TEMPERATURES = tuple(2 ** (step / 8) for step in range(-16, 25))  # 0.25 to 8
CONFIDENCE_BINS = 200
UNUSUAL = 0.05  # share of the images that were evaluated whose confidence counts as unusually low

# Equal-width bins of the confidence, as in Guo et al. (2017), "On Calibration of Modern Neural Networks".
CALIBRATION_BINS = 15


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    _check_tensor('logits', logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_tensor(name: str, value: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f'{name} must be a tensor, got {type(value).__name__}.')


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


def nested_logits(member_logits: torch.Tensor) -> torch.Tensor:
    """Return the outputs of the ensembles of the first n members, for n = 1..N (Eq. 5).

    Shape:
        - member_logits: (B, N, C)
        - output: (B, N, C), the mean of the first n members at index n - 1
    """
    return prefix_means(_full_precision(member_logits), range(1, member_logits.shape[1] + 1))


def logit_std(member_logits: torch.Tensor) -> torch.Tensor:
    """Return the diversity of the first n members: the standard deviation of their logits, mean over the classes.

    The mean of this over a test set is the "Std" of the paper (section 4.2, Fig. 4 and 5). It is the deviation of
    exactly these n members, not an estimate for a larger population, hence 0 for one member.

    Shape:
        - member_logits: (B, N, C)
        - output: (B, N), that of the first n members at index n - 1
    """
    member_logits = _full_precision(member_logits)
    sizes = range(1, member_logits.shape[1] + 1)
    return torch.stack([member_logits[:, :n].std(dim=1, correction=0).mean(dim=-1) for n in sizes], dim=1)


def brier_score(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the squared distance between predicted probabilities and one-hot labels, from 0 to 2 (Brier, 1950).

    Shape:
        - logits: (B, N, C)
        - target: (B,), class indices
        - output: (B, N)
    """
    _check_tensor('target', target)
    one_hot = F.one_hot(target, logits.shape[-1]).unsqueeze(1)
    return (_full_precision(logits).softmax(dim=-1) - one_hot).square().sum(dim=-1)


def calibration_gaps(logits: torch.Tensor, target: torch.Tensor, num_bins: int = CALIBRATION_BINS) -> torch.Tensor:
    """Return how much more confident than right the predictions are, summed over the images in each confidence bin.

    The expected calibration error is the sum over the bins of the absolute values, over the number of images
    (Guo et al., 2017). Gaps of batches can be added.

    Shape:
        - logits: (B, N, C)
        - target: (B,), class indices
        - output: (N, num_bins)
    """
    _check_tensor('target', target)
    confidence, prediction = _full_precision(logits).softmax(dim=-1).max(dim=-1)
    gap = confidence - (prediction == target[:, None]).to(confidence.dtype)
    bins = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    return gap.new_zeros(logits.shape[1], num_bins).scatter_add_(1, bins.T, gap.T)


def predictive_entropy(member_logits: torch.Tensor) -> torch.Tensor:
    """Return the total uncertainty: the entropy in nats of the members' mean probabilities, from 0 to log C.

    The mean is that of probabilities, as in Bayesian model averaging, so that `mutual_information` is a part of this
    entropy. The ensemble's own output is the mean of the logits.

    Shape:
        - member_logits: (B, N, C)
        - output: (B,)
    """
    return _entropy(_full_precision(member_logits).softmax(dim=-1).mean(dim=1))


def mutual_information(member_logits: torch.Tensor) -> torch.Tensor:
    """Return the members' disagreement: predictive entropy less their mean own entropy, in nats.

    It is from 0, where all members predict the same probabilities, to log min(C, N) (epistemic uncertainty; Depeweg et
    al., 2018, "Decomposition of Uncertainty in Bayesian Deep Learning").

    Shape:
        - member_logits: (B, N, C)
        - output: (B,)
    """
    probabilities = _full_precision(member_logits).softmax(dim=-1)
    return (_entropy(probabilities.mean(dim=1)) - _entropy(probabilities).mean(dim=1)).clamp(min=0)


def variation_ratio(member_logits: torch.Tensor) -> torch.Tensor:
    """Return the fraction of members that do not vote for the class with the most votes, from 0 to 1 - 1 / min(C, N).

    Shape:
        - member_logits: (B, N, C)
        - output: (B,)
    """
    _check_tensor('member_logits', member_logits)
    votes = F.one_hot(member_logits.argmax(dim=-1), member_logits.shape[-1]).sum(dim=1)
    return 1 - votes.amax(dim=-1) / member_logits.shape[1]


class EnsembleMetrics:
    """Accumulates the metrics of the ensembles of the first n members, for all n at once, over batches of any size.

    Sums are kept in float64 (float32 on MPS, which has no float64).

    Args:
        ensemble_size: Number of members, N.
        device: Device of the member logits.
    """

    def __init__(self, ensemble_size: int, device: torch.device | str = 'cpu'):
        device = torch.device(device)
        self.ensembles = [ClassificationEvaluator(device) for _ in range(ensemble_size)]
        self.members = [ClassificationEvaluator(device) for _ in range(ensemble_size)]
        self.dtype = torch.float32 if device.type == 'mps' else torch.float64
        self.std = torch.zeros(ensemble_size, dtype=self.dtype, device=device)
        self.brier = torch.zeros_like(self.std)
        self.gaps = torch.zeros(ensemble_size, CALIBRATION_BINS, dtype=self.dtype, device=device)
        self.tempered_nll = torch.zeros(len(TEMPERATURES), ensemble_size, dtype=self.dtype, device=device)
        self.confidences = torch.zeros(len(TEMPERATURES), ensemble_size, CONFIDENCE_BINS, device=device)

    @property
    def num_images(self) -> int:
        """Number of images seen."""
        return self.ensembles[0].num_samples

    @torch.no_grad()
    def update(self, member_logits: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch.

        Args:
            member_logits: Logits of all members (B, N, C), of any floating point type.
            target: Class indices (B,).

        Raises:
            TypeError: An argument is no tensor, or `target` holds no integers.
            ValueError: The shapes do not match, or a class index is not from 0 to C - 1.
        """
        _check_tensor('member_logits', member_logits)
        _check_tensor('target', target)
        shape = tuple(member_logits.shape)
        if len(shape) != 3 or shape[1] != len(self.ensembles):
            raise ValueError(f'member_logits must have the shape (B, {len(self.ensembles)}, C), got {shape}.')
        if tuple(target.shape) != shape[:1]:
            raise ValueError(f'target must have the shape ({shape[0]},), got {tuple(target.shape)}.')
        if not shape[0]:
            return
        if target.is_floating_point():
            raise TypeError(f'target must hold class indices, got {target.dtype}.')
        target = target.long()
        lowest, highest = target.aminmax()
        if lowest < 0 or highest >= shape[2]:
            wrong = int(lowest if lowest < 0 else highest)
            raise ValueError(f'target holds class {wrong}, the model has {shape[2]} classes (0 to {shape[2] - 1}).')

        member_logits = member_logits.to(self.dtype)
        logits = nested_logits(member_logits)
        for n, (ensemble, member) in enumerate(zip(self.ensembles, self.members)):
            ensemble.update(logits[:, n], target)
            member.update(member_logits[:, n], target)
        self.std += logit_std(member_logits).sum(dim=0)
        self.brier += brier_score(logits, target).sum(dim=0)
        self.gaps += calibration_gaps(logits, target)
        for index, temperature in enumerate(TEMPERATURES):
            log_probabilities = (logits / temperature).log_softmax(dim=-1)
            self.tempered_nll[index] -= log_probabilities[torch.arange(len(target)), :, target].sum(dim=0)
            bins = log_probabilities.amax(dim=-1).exp().mul(CONFIDENCE_BINS).long().clamp(0, CONFIDENCE_BINS - 1).T
            self.confidences[index].scatter_add_(1, bins, torch.ones_like(bins, dtype=self.confidences.dtype))

    def compute(self) -> dict[str, list]:
        """Return the metrics of all images so far.

        Returns:
            members: For n = 1..N a dict of `num_members`, `top1` and `top5` (percent; top5 counts all classes if there
                are fewer), `logit_std`, `nll` (nats), `brier` (0 to 2) and `ece` (0 to 1). `temperature` is that
                of the least NLL (Guo et al., 2017) in steps of 9 %; `usual_confidence` is the confidence
                (0 to 1) at it that 95 % of the images reach.
            member_top1: Each member's own accuracy, percent.

        Raises:
            ValueError: There were no images, or the logits were not finite.
        """
        if not self.num_images:
            raise ValueError('There are no images to evaluate.')
        members = []
        std, brier = (total.div(self.num_images).tolist() for total in (self.std, self.brier))
        ece = self.gaps.abs().sum(dim=1).div(self.num_images).tolist()
        best = self.tempered_nll.argmin(dim=0)
        for n, ensemble in enumerate(self.ensembles):
            summary = ensemble.compute()
            below = self.confidences[best[n], n].cumsum(dim=0)
            members.append({
                'num_members': n + 1,
                'top1': summary['top1'],
                'top5': summary['top5'],
                'logit_std': std[n],
                'nll': summary['loss'],
                'brier': brier[n],
                'ece': ece[n],
                'temperature': round(TEMPERATURES[best[n]], 3),
                'usual_confidence': int((below <= UNUSUAL * self.num_images).sum()) / CONFIDENCE_BINS,
            })
        if not torch.isfinite(torch.tensor([[*row.values()] for row in members])).all():
            raise ValueError('The logits of the model are not finite.')
        return {'members': members, 'member_top1': [member.compute()['top1'] for member in self.members]}
