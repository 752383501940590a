"""`timm-hne eval`: what the ensembles of the first n members are worth, on a data set."""
import argparse
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_loader, resolve_data_config
from torch.utils.data import Dataset, IterableDataset

from ..evaluation.evaluate import evaluate, to_markdown
from ..files import write_text
from ..models.create import create_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import state_digest
from ..process import keep_freed_memory
from ..training.checkpoint import RunCheckpoint
from ..training.datasets import DIGITS, ImageSubset, class_names_of, create_datasets, open_dataset
from .arguments import add_img_size, add_model_kwargs, input_size, model_kwargs

_logger = logging.getLogger(__name__)


@dataclass
class _Data:
    """The images to evaluate: those of the command line, and what it leaves out as in training."""
    name: str
    root: str | None
    split: str
    train_split: str = 'train'
    val_fraction: float = 0.
    seed: int = 0
    unreadable: str = 'error'

    @classmethod
    def choose(cls, args: argparse.Namespace, trained: Mapping[str, Any]) -> '_Data':
        """Choose the images.

        Args:
            args: The command line.
            trained: Arguments of the training, ours or timm's; empty if they are not known.
        """
        # A folder that is given is no folder of the digits, which need none.
        other = args.data_dir is not None and trained.get('dataset') == DIGITS
        name = args.dataset if args.dataset is not None else '' if other else trained.get('dataset') or ''
        if name != (trained.get('dataset') or ''):
            trained = {}
        unreadable = trained.get('unreadable') or cls.unreadable
        root = args.data_dir or trained.get('data_dir') or trained.get('data')
        if args.split is None and trained.get('val_fraction'):
            train_split, val_fraction, seed = (trained[key] for key in ('train_split', 'val_fraction', 'seed'))
            return cls(
                name, root, f'{train_split}, held out {val_fraction}', train_split, val_fraction, seed, unreadable)
        return cls(name, root, args.split or trained.get('val_split') or 'validation', unreadable=unreadable)

    def open(self, in_chans: int, class_map: dict[str, int] | None = None) -> Dataset:
        if not self.val_fraction:
            dataset = open_dataset(self.name, self.root, self.split, in_chans, class_map)
            if isinstance(dataset, IterableDataset):
                return dataset
            return ImageSubset(dataset, None, self.unreadable, training=False)
        _, held_out, _ = create_datasets(
            self.name, self.root, self.train_split, '', self.val_fraction, unreadable=self.unreadable,
            in_chans=in_chans, seed=self.seed)
        return held_out


class _Readable:
    """The batches of a loader without the images that could not be read, whose label is -1."""

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, target in self.loader:
            readable = target >= 0
            yield images[readable], target[readable]


def _open_images(data: _Data, model: HierarchicalEnsemble, label_names: Sequence[str] | None) -> Dataset:
    dataset = data.open(model.in_chans)
    names = class_names_of(getattr(dataset, 'source', dataset))
    if names and label_names and len(names) < len(label_names) and set(names) < set(label_names):
        # A split may lack images of some classes.
        dataset = data.open(model.in_chans, {name: label for label, name in enumerate(label_names)})
        names = class_names_of(getattr(dataset, 'source', dataset))
    if names and len(names) != model.num_classes:
        raise ValueError(
            f'the model has {model.num_classes} classes, the split {data.split!r} of {data.name or data.root} has '
            f'{len(names)}: {", ".join(names[:10])}.')
    if names and label_names and names != list(label_names):
        _logger.warning(
            f'the model was trained on classes named {", ".join(label_names[:10])}, those of the data are '
            f'{", ".join(names[:10])}: they count as the same, in this order.')
    return dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne eval`."""
    parser.add_argument(
        'model', nargs='?',
        help='a registered model (its pretrained weights are used unless there is a checkpoint) or a Hub model '
             '(hf-hub:user/name); the one in the checkpoint if left out')
    add_model_kwargs(parser)
    parser.add_argument('--checkpoint', metavar='PATH', help="a checkpoint of this package's or timm's training")
    parser.add_argument('--data-dir', metavar='DIR', help="folder of the data (default: the checkpoint's)")
    parser.add_argument(
        '--dataset', metavar='NAME',
        help="timm's name of a data set, e.g. torch/cifar10, or digits, or '' for an image folder (default: the "
             "checkpoint's, else an image folder)")
    parser.add_argument(
        '--data-name', metavar='NAME',
        help="name of the data in the results, by which `timm-hne plot` finds the paper's: cifar10 or cifar100 "
             '(default: the name of the data set, or of the folder)')
    parser.add_argument(
        '--split', help='split of the data set (default: what the checkpoint was validated on, else validation)')
    add_img_size(parser, 'as trained')
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
        checkpoint = RunCheckpoint.read(args.checkpoint)
        model = checkpoint.create_model(args.model, **model_kwargs(args))
        config, recipe, data_args = checkpoint.config, checkpoint.recipe, checkpoint.data_config
    else:
        model = create_ensemble(args.model, pretrained=True, **model_kwargs(args))
        config, recipe, data_args = {}, {}, {}
    device = torch.device(args.device)

    # How images were prepared for the validation in training holds here too.
    if args.img_size is not None:
        data_args['input_size'] = input_size(args, model)
    data_config = resolve_data_config({**data_args, 'in_chans': model.in_chans}, model=model)
    if len(data_config['mean']) != model.in_chans:
        raise ValueError(
            f'the model takes images of {model.in_chans} channels, but their mean and standard deviation are known '
            f'for {len(data_config["mean"])} only; its checkpoint does not hold them.')
    data = _Data.choose(args, config)
    dataset = _open_images(data, model, model.pretrained_cfg.get('label_names'))
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
    if data.unreadable == 'skip':
        loader = _Readable(loader)
    measured = evaluate(model, loader, torch.bfloat16 if args.amp else None, progress=True)
    if isinstance(dataset, ImageSubset) and (files := dataset.bad_files()):
        _logger.warning(f'{len(files)} unreadable images skipped, as in training: {", ".join(files[:10])}')

    # How many processes there were says how large their joint batch was.
    processes = {key: value for key, value in config.items() if key == 'world_size'}
    objective = config.get('objective') or config.get('hne_objective')
    distilled = objective is not None and 'codistillation' in objective
    result = {
        'model': measured['model'],
        'nodes': measured['nodes'],
        'weights_sha256': state_digest(model.state_dict()),
        'data': args.data_name or (data.name.rpartition('/')[2] or Path(data.root).resolve().name).lower(),
        'split': data.split,
        'input_size': [model.in_chans, *data_config['input_size'][1:]],
        'num_images': measured['num_images'],
        'objective': objective,
        'alpha': config.get('alpha', config.get('hne_alpha')) if distilled else None,
        'epochs': config.get('epochs'),
        'seed': config.get('seed'),
        'recipe': {key: value for key, value in {**recipe, **processes}.items() if key != 'seed'},
        'members': measured['members'],
        'member_top1': measured['member_top1'],
    }
    print(to_markdown(result), end='', flush=True)  # first: it must not be lost if the files cannot be written
    if args.output:
        write_text(args.output, json.dumps(result, indent=1) + '\n')
        write_text(args.output.with_suffix('.md'), to_markdown(result))
