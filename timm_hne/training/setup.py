"""What a run is built of: its data and its model, checked against each other before any epoch."""
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from torch.utils.data import Dataset, IterableDataset

from ..models.ensemble import HierarchicalEnsemble
from ..models.weights import load_grown
from .checkpoint import RunCheckpoint
from .datasets import create_datasets
from .memory_loader import collate
from .recipe import TrainConfig, image_preparation
from .scheduler import create_scheduler
from .trackers import BestCheckpoint

__all__ = ['check_phases', 'create_optimizer', 'create_trained_model', 'open_data']


def open_data(config: TrainConfig) -> tuple[Dataset, Dataset, list[str] | None, int]:
    """Open the images of a run.

    Returns:
        Training images, validation images, the names of the classes if the data tell, and their number.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: They do not fit the configuration.
    """
    train_set, val_set, label_names = create_datasets(
        config.dataset,
        config.data_dir,
        config.train_split,
        config.val_split,
        val_fraction=config.val_fraction,
        max_train_images=config.max_train_images,
        unreadable=config.unreadable,
        download=config.download,
        in_chans=config.in_chans,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    if isinstance(train_set, IterableDataset):
        _check_streamed(config)
    num_classes = len(label_names) if label_names else config.num_classes
    if num_classes is None:
        raise ValueError(f'num_classes must be given for the data set {config.dataset!r}, which does not tell.')
    if config.num_classes not in (None, num_classes):
        raise ValueError(
            f'the recipe is for {config.num_classes} classes (num_classes), the data have {num_classes}: '
            f'dataset {config.dataset!r} in {config.data_dir}.')
    return train_set, val_set, label_names, num_classes


def _check_streamed(config: TrainConfig) -> None:
    """Refuse what cannot be done with a data set that is a stream."""
    for _, part in config.split():
        for name, wrong, allowed, reason in (
                ('in_memory', part.in_memory, 'false', ''),
                ('unreadable', part.unreadable != 'skip', 'skip', ', whose reader passes over what it cannot read'),
                ('num_workers', not part.num_workers, 'at least 1', ', or a resumed run would see other images'),
                ('batch_size', part.batch_size != config.batch_size, f'{config.batch_size} in all phases',
                 ', which is opened with it'),
        ):
            if wrong:
                raise ValueError(
                    f'{name} must be {allowed} for the streamed data set {config.dataset!r}{reason}, '
                    f'got {getattr(part, name)}.')


def check_phases(config: TrainConfig, num_classes: int, train_set: Dataset, world_size: int) -> None:
    """Refuse phases that cannot follow each other, which would else be found out when the ones before are trained.

    Args:
        config: Configuration of a run.
        num_classes: Number of classes of the data.
        train_set: Training images.
        world_size: Number of processes.

    Raises:
        TypeError: A phase has arguments that its optimizer does not take.
        ValueError: The images of a phase are fewer than one update takes, or of another size than it keeps in memory,
            its tree cannot grow out of the one before, its optimizer or its schedule is none, or the last has no
            `best_members`.
    """
    before = None
    for number, (_, part) in enumerate(config.split(), start=1):
        used = part.batch_size * part.grad_accum_steps * world_size
        if not isinstance(train_set, IterableDataset) and used > len(train_set):
            where = f'in phase {number}' if config.phases else '(--batch-size)'
            raise ValueError(
                f'batch_size {part.batch_size} * grad_accum_steps {part.grad_accum_steps} * {world_size} process(es) '
                f'exceeds the {len(train_set)} training images: give a smaller batch_size {where}.')
        model = _create_model(part, num_classes, device='meta')
        if before is not None and part.in_memory and part.img_size is None:
            collate([train_set[0]], resolve_data_config(model=model)['input_size'][-1], resize=False)
        create_scheduler(create_optimizer(model, part), part, updates_per_epoch=1)
        if before is not None:
            load_grown(model, before.state_dict(), part.grow_noise)
        before = model
    BestCheckpoint(config.best_members, {}).check(before.ensemble_size)


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of a recipe, by timm."""
    return create_optimizer_v2(
        model,
        opt=config.opt,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        filter_bias_and_bn=config.filter_bias_and_bn,
        **config.opt_kwargs,
    )


def _create_model(config: TrainConfig, num_classes: int, **kwargs) -> nn.Module:
    overlay = {name: getattr(config, name) for name in ('mean', 'std') if getattr(config, name) is not None}
    if config.img_size is not None:  # which decides the sizes of some bases
        overlay['input_size'] = (config.in_chans, config.img_size, config.img_size)
    if kwargs.get('pretrained'):
        kwargs.update(grow_noise=config.grow_noise, grow_seed=config.seed)
    model = create_model(
        config.model,
        num_classes=num_classes,
        in_chans=config.in_chans,
        pretrained_cfg_overlay=overlay,
        **{**kwargs, **config.model_kwargs},
    )
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(
            f'objective {config.objective!r} needs a hierarchical ensemble as its model, {config.model!r} is a '
            f'{type(model).__name__}. Other models are trained by timm\'s own train.py.')
    return model


def create_trained_model(
        config: TrainConfig,
        num_classes: int,
        weights: Mapping[str, torch.Tensor] | None = None,
        resumed: bool = False,
) -> tuple[HierarchicalEnsemble, TrainConfig]:
    """Create the model, and complete the configuration by what follows from it.

    Args:
        config: Configuration of the run, or of a phase of it.
        num_classes: Number of classes of the data.
        weights: Weights of the same tree or a smaller one to start from, those of the phase before.
        resumed: Load no weights to start from, a checkpoint of the run has its own.
    """
    model = _create_model(config, num_classes, pretrained=config.pretrained and weights is None and not resumed)
    if weights is not None:
        load_grown(model, weights, config.grow_noise, config.seed)
    elif config.initial_checkpoint and not resumed:
        checkpoint = RunCheckpoint.read(config.initial_checkpoint, 'initial_checkpoint')
        checkpoint.load_into(model, config.grow_noise, config.seed)
    data_config = resolve_data_config({'in_chans': config.in_chans, 'crop_pct': config.crop_pct}, model=model)
    for name in ('mean', 'std'):
        if config.in_chans == 1 and getattr(config, name) is None:  # timm adds up the weights of the channels
            data_config[name] = (fmean(data_config[name]),)
        if len(data_config[name]) != config.in_chans:
            raise ValueError(f'{name} must have {config.in_chans} value(s), as in_chans, got {data_config[name]}.')
    return model, replace(
        config,
        num_classes=num_classes,
        img_size=data_config['input_size'][-1],
        crop_pct=image_preparation(config.in_memory, data_config['crop_pct'])['crop_pct'],
        mean=data_config['mean'],
        std=data_config['std'],
    )
