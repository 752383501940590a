"""Batches of images for training and evaluation: from memory, or by timm's loader."""
import random
from collections.abc import Iterable

import numpy as np
import torch
from timm.data import create_loader
from torch.utils.data import Dataset

from .memory_loader import MemoryLoader, load_into_memory
from .recipe import TrainConfig, image_preparation

__all__ = ['create_image_loader', 'seed_epoch']


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed all global random generators for one epoch, so that a run can be continued at any epoch."""
    state = np.random.SeedSequence((seed, epoch, rank)).generate_state(2).tolist()
    random.seed(state[0])
    np.random.seed(state[0])
    torch.manual_seed(state[0] << 32 | state[1])


def create_image_loader(
        dataset: Dataset,
        config: TrainConfig,
        training: bool,
        resize: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Create what yields batches of normalised images on a device: a `MemoryLoader`, or timm's loader.

    Args:
        dataset: Images from `create_datasets`.
        config: A configuration with `img_size`, `mean` and `std`.
        training: Shuffle, augment, and leave out an incomplete last batch.
        resize: In memory, resize images of another size than `img_size`.
        device: Device of the batches.
        rank: Number of this process.
        world_size: Number of processes.
    """
    if config.in_memory:
        images, labels = load_into_memory(dataset, config.img_size, resize, config.num_workers)
        return MemoryLoader(
            images,
            labels,
            config.batch_size,
            config.mean,
            config.std,
            training=training,
            crop_padding=config.crop_padding or 0,
            scale=config.scale if config.crop_padding is None else None,
            hflip=config.hflip,
            seed=config.seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    preparation = image_preparation(False, config.crop_pct)
    loader = create_loader(
        dataset,
        input_size=(config.in_chans, config.img_size, config.img_size),
        batch_size=config.batch_size,
        is_training=training,
        scale=config.scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        interpolation='random' if training else preparation['interpolation'],
        crop_pct=preparation['crop_pct'],
        crop_mode=preparation['crop_mode'],
        mean=config.mean,
        std=config.std,
        num_workers=config.num_workers,
        distributed=world_size > 1,
        pin_memory=device.type == 'cuda',
        device=device,
        # Workers that live longer than an epoch carry random states that no checkpoint has.
        persistent_workers=False,
    )
    if training and world_size > 1 and hasattr(loader.sampler, 'seed'):
        loader.sampler.seed = config.seed  # timm leaves it at 0
    return loader
