"""Evaluation: what the ensembles of the first n members are worth, for all n, in one pass over the data."""
import argparse
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader, resolve_data_config
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from .checkpoints import create_ensemble, load_checkpoint, recipe_of
from .cost import member_macs
from .data import ImageSubset, class_names_of, open_dataset
from .ensemble import HierarchicalEnsemble
from .files import write_text
from .memory import keep_freed_memory
from .metrics import EnsembleMetrics
from .tree import prefixes

__all__ = ['evaluate', 'plot_accuracy', 'to_markdown']

_logger = logging.getLogger(__name__)

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
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(f'model must be a hierarchical ensemble (timm_hne.HierarchicalEnsemble), got {type(model)}.')
    device = next(model.parameters()).device
    metrics = EnsembleMetrics(model.ensemble_size, device)
    img_size = None
    was_training = model.training
    model.eval()
    try:
        for images, target in tqdm(loader, desc='Evaluating', unit='batch', disable=not progress):
            images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                member_logits = model.forward_members(images, model.ensemble_size)
            metrics.update(member_logits, target)
            img_size = tuple(images.shape[-2:])
    finally:
        model.train(was_training)

    measured = metrics.compute()
    macs = member_macs(model, img_size)
    return {
        'model': (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__,
        'nodes': list(model.nodes),
        'num_images': metrics.num_images,
        'members': [{**row, 'macs': macs[row['num_members']]} for row in measured['members']],
        'member_top1': measured['member_top1'],
    }


def _open_images(
        name: str,
        root: str | None,
        split: str,
        model: HierarchicalEnsemble,
        label_names: Sequence[str] | None,
) -> Dataset:
    dataset = open_dataset(name, root, split, model.in_chans)
    names = class_names_of(dataset)
    if names and len(names) != model.num_classes:
        raise ValueError(
            f'the model has {model.num_classes} classes, the split {split!r} of {name or root} has {len(names)}: '
            f'{", ".join(names[:10])}.')
    if names and label_names and names != list(label_names):
        _logger.warning(
            f'the model was trained on classes named {", ".join(label_names[:10])}, those of the data are '
            f'{", ".join(names[:10])}: they count as the same, in this order.')
    return dataset if isinstance(dataset, IterableDataset) else ImageSubset(dataset, None, 'error', training=False)


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


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draw top-1 accuracy against MACs as a PNG file; the powers of two are labelled.

    Args:
        rows: The `members` of an evaluation, or some of them.
        path: File to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'timm-hne[plots]'.") from error
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    macs = [row['macs'] / 1e6 for row in rows]
    axes.plot(macs, [row['top1'] for row in rows], marker='o')
    points = prefixes(max(row['num_members'] for row in rows))
    for row, x in zip(rows, macs):
        if row['num_members'] in points:
            label = f'n = {row["num_members"]}'
            axes.annotate(label, (x, row['top1']), (3, -12), textcoords='offset points')
    axes.set(xlabel='million MACs of one image', ylabel='top-1 accuracy (%)', xscale='log')
    ticks = [x for row, x in zip(rows, macs) if row['num_members'] in points]
    axes.set_xticks(ticks, [f'{x:.3g}' for x in ticks])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.16, y=0.15)
    axes.grid(alpha=0.3)
    # No version in the file: same results, same bytes.
    figure.savefig(path, format='png', dpi=120, metadata={'Software': None})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne eval`."""
    parser.add_argument(
        'model', nargs='?',
        help='a registered model (its pretrained weights are used unless there is a checkpoint) or a Hub model '
             '(hf-hub:user/name); the one in the checkpoint if left out')
    parser.add_argument('--checkpoint', metavar='PATH', help="a checkpoint of this package's or timm's training")
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the data')
    parser.add_argument(
        '--dataset', default='', metavar='NAME',
        help="timm's name of a data set, e.g. torch/cifar10, or digits (default: an image folder)")
    parser.add_argument(
        '--data-name', metavar='NAME',
        help="name of the data in the results, by which plot.py finds the paper's: cifar10 or cifar100 (default: the "
             'name of the data set, or of the folder)')
    parser.add_argument('--split', default='validation', help='split of the data set (default: %(default)s)')
    parser.add_argument('--img-size', type=int, metavar='PIXELS', help='image size (default: as trained)')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--workers', type=int, default=2, help='processes that load images')
    parser.add_argument('--amp', action='store_true', help='mixed precision with bfloat16')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--output', metavar='PATH.json', type=Path,
        help='write the results there, and as Markdown to PATH.md beside it')


def run(args: argparse.Namespace) -> None:
    """Evaluate a model as the command line says.

    Raises:
        OSError: The data or the checkpoint is missing or unreadable.
        ValueError: An argument is wrong, or model, checkpoint and data do not fit each other.
    """
    if args.model is None and args.checkpoint is None:
        raise ValueError('model or --checkpoint must be given.')
    if args.batch_size < 1:
        raise ValueError(f'batch_size must be positive, got {args.batch_size}.')
    if args.output and args.output.suffix != '.json':
        raise ValueError(f'output must end in .json, got {str(args.output)!r}.')
    if args.checkpoint:
        model, config = load_checkpoint(args.checkpoint, args.model)
    else:
        model, config = create_ensemble(args.model, pretrained=True), {}
    device = torch.device(args.device)

    # What the training was told about its images holds here too.
    keys = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    data_args = {key: config[key] for key in keys if config.get(key) is not None}
    if args.img_size is not None:
        data_args.pop('input_size', None)
        data_args['img_size'] = args.img_size
    data_config = resolve_data_config({**data_args, 'in_chans': model.in_chans}, model=model)
    if len(data_config['mean']) != model.in_chans:
        raise ValueError(
            f'the model takes images of {model.in_chans} channels, but their mean and standard deviation are known '
            f'for {len(data_config["mean"])} only; its checkpoint does not hold them.')
    label_names = config.get('label_names') if args.checkpoint else model.pretrained_cfg.get('label_names')
    dataset = _open_images(args.dataset, args.data_dir, args.split, model, label_names)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.batch_size,
        use_prefetcher=False,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        pin_memory=device.type == 'cuda',
        persistent_workers=False,
        device=device,
    )
    model = model.to(device, memory_format=torch.channels_last)
    if device.type == 'cpu':
        keep_freed_memory()
    measured = evaluate(model, loader, torch.bfloat16 if args.amp else None, progress=True)

    objective = config.get('objective') or config.get('hne_objective')
    distilled = objective is not None and 'codistillation' in objective
    result = {
        'model': measured['model'],
        'nodes': measured['nodes'],
        'data': args.data_name or (args.dataset.rpartition('/')[2] or Path(args.data_dir).resolve().name).lower(),
        'split': args.split,
        'num_images': measured['num_images'],
        'objective': objective,
        'alpha': config.get('alpha', config.get('hne_alpha')) if distilled else None,
        'epochs': config.get('epochs'),
        'seed': config.get('seed'),
        'recipe': {key: value for key, value in recipe_of(config).items() if key != 'seed'},
        'members': measured['members'],
        'member_top1': measured['member_top1'],
    }
    if args.output:
        write_text(args.output, json.dumps(result, indent=1) + '\n')
        write_text(args.output.with_suffix('.md'), to_markdown(result))
    print(to_markdown(result), end='')
