"""Evaluation: what the ensembles of the first n members are worth, for all n, in one pass over the data."""
from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from .cost import member_macs
from .metrics import EnsembleMetrics

__all__ = ['evaluate', 'to_markdown']

# Head of a column and format of a value, for every metric of the report.
_COLUMNS = {
    'num_members': ('Members n', '{}'),
    'macs': ('MACs', '{:,}'),
    'top1': ('Top-1 (%)', '{:.2f}'),
    'top5': ('Top-5 (%)', '{:.2f}'),
    'logit_std': ('Std of logits', '{:.4f}'),
    'nll': ('NLL', '{:.4f}'),
    'brier': ('Brier', '{:.4f}'),
    'ece': ('ECE', '{:.4f}'),
}


@torch.inference_mode()
def evaluate(
        model: HierarchicalEnsemble,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        amp_dtype: torch.dtype | None = None,
        progress: bool = False,
) -> dict[str, Any]:
    """Measure every prefix of an ensemble; each image runs through the model once.

    Args:
        model: Any `hne_*` model. It is evaluated on the device where it is, in evaluation mode.
        loader: Batches of normalised images (B, C, H, W) and class indices (B,).
        amp_dtype: Type of automatic mixed precision, e.g. `torch.bfloat16`; none if None.
        progress: Show a progress bar.

    Returns:
        model: Name of the architecture, or of the class if timm's `create_model` has not built the model.
        nodes: Nodes of each block.
        num_images: Number of images.
        members: For n = 1..N the metrics of `EnsembleMetrics.compute`, and `macs`, those of one image.
        member_top1: Each member's own accuracy, percent.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
        ValueError: There are no images, a label is not one of the model's classes, or the logits are not finite.
    """
    check_ensemble(model)
    device = next(model.parameters()).device
    metrics = EnsembleMetrics(model.ensemble_size, device)
    img_size = None
    was_training = {module: module.training for module in model.modules()}  # some of them may be frozen
    model.eval()
    try:
        for images, target in tqdm(loader, desc='Evaluating', unit='batch', disable=not progress):
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                member_logits = model.forward_members(images, model.ensemble_size)
            metrics.update(member_logits, target)
            img_size = tuple(images.shape[-2:])
    finally:
        for module, training in was_training.items():
            module.training = training

    measured = metrics.compute()
    macs = member_macs(model, img_size)
    return {
        'model': (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        'nodes': list(model.nodes),
        'num_images': metrics.num_images,
        'members': [{**row, 'macs': macs[row['num_members']]} for row in measured['members']],
        'member_top1': measured['member_top1'],
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Render an evaluation as a Markdown table, one row per number of members."""
    plain = {key: value for key, value in result.items() if not isinstance(value, (list, dict))}
    facts = [f'{key.replace("_", " ")}: {value}' for key, value in plain.items()]
    facts.insert(1, f'nodes: {tuple(result["nodes"])}')
    heads = [head for head, _ in _COLUMNS.values()] + ['Top-1 of member n alone (%)']
    lines = [', '.join(facts), '', f'| {" | ".join(heads)} |', f'|{" ---: |" * len(heads)}']
    for row, own in zip(result['members'], result['member_top1']):
        values = [form.format(row[key]) for key, (_, form) in _COLUMNS.items()]
        lines.append(f'| {" | ".join([*values, f"{own:.2f}"])} |')
    return '\n'.join(lines) + '\n'
