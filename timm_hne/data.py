"""Image data sets for training: timm's by their names, and scikit-learn's digits; small images kept in memory."""
import importlib.util
import math
import operator
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .recipe import TrainConfig

__all__ = [
    'DIGITS',
    'ImageSubset',
    'MemoryLoader',
    'UnreadableImageError',
    'class_names_of',
    'create_datasets',
    'create_image_loader',
    'load_into_memory',
    'open_dataset',
    'seed_epoch',
]

DIGITS = 'digits'

# Kinds of timm's data sets, and the packages that they need.
_KINDS = {
    'torch': (),
    'hfds': ('datasets',),
    'hfids': ('datasets',),
    'tfds': ('tensorflow', 'tensorflow_datasets'),
    'wds': ('webdataset',),
}

# What Pillow raises on broken files.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed all global random generators for one epoch, so that a run can be continued at any epoch."""
    state = np.random.SeedSequence((seed, epoch, rank)).generate_state(2).tolist()
    random.seed(state[0])
    np.random.seed(state[0])
    torch.manual_seed(state[0] << 32 | state[1])


class UnreadableImageError(OSError):
    """An image of a data set cannot be read."""


class ImageSubset(Dataset):
    """Chosen images of a data set, with a stated behaviour on unreadable ones.

    Args:
        source: Data set of PIL images and class indices. timm's own replace an unreadable image without saying which;
            their readers are asked directly here.
        indices: Images to take; all if None.
        unreadable: 'error' raises. 'skip' returns the next readable image in its place.
        training: Whether a replacement keeps its label. In evaluation it gets the label -1, to be left out.

    `transform` is set by timm's `create_loader`.

    Raises:
        UnreadableImageError: An image cannot be read and must be.
    """

    def __init__(self, source: Dataset, indices: torch.Tensor | None, unreadable: str, training: bool):
        self.source = source
        self.indices = torch.arange(len(source)) if indices is None else indices
        self.unreadable = unreadable
        self.training = training
        self.transform = None
        # Shared with the worker processes of a loader, which are the ones that find out.
        self.bad = torch.zeros(len(self.indices), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int):
        for offset in range(len(self)):
            found = (position + offset) % len(self)
            try:
                image, target = self._read(found)
            except _UNREADABLE as error:
                if self.unreadable == 'error':
                    raise UnreadableImageError(f'cannot read image {self.filename(found)}: {error}') from error
                self.bad[found] = True
                continue
            if offset and not self.training:
                target = -1
            return image if self.transform is None else self.transform(image), target
        raise UnreadableImageError(f'cannot read any of the {len(self)} images.')

    def _read(self, position: int):
        index = self.indices[position].item()
        if not isinstance(self.source, ImageDataset):
            return self.source[index]
        file, target, *_ = self.source.reader[index]
        return Image.open(file).convert(self.source.input_img_mode), target

    def filename(self, position: int) -> str:
        """Name of an image, for messages."""
        index = self.indices[position].item()
        if isinstance(self.source, ImageDataset):
            return self.source.filename(index, absolute=True)
        return f'number {index}'

    def bad_files(self) -> list[str]:
        """Names of the unreadable images met so far."""
        return [self.filename(position) for position in self.bad.nonzero().flatten().tolist()]


class DigitsDataset(Dataset):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, of which a fixed fifth of each class is for testing."""

    classes = tuple('0123456789')

    def __init__(self, train: bool):
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("dataset 'digits' needs scikit-learn: pip install 'timm-hne[demo]'.") from error
        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        self.images, self.labels = split[0::2] if train else split[1::2]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_dataset(
        name: str,
        root: str | None,
        split: str,
        in_chans: int = 3,
        class_map: dict[str, int] | None = None,
        **kwargs,
) -> Dataset:
    """Open one split of a data set, for training or evaluation.

    Args:
        name: timm's name of a data set ('' for an image folder, 'torch/cifar10', 'hfds/...', 'wds/...'), or 'digits'.
        root: Folder of the data.
        split: Name of the split.
        in_chans: Channels of the images: 1 or 3.
        class_map: Labels of the classes of an image folder; by the order of their names if None.
        **kwargs: Further arguments of timm's `create_dataset`.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no images of the split.
        ImportError: The data set needs a package that is not installed.
        ValueError: The name is unknown, the folder is missing, the images have another number of channels, or a class
            folder holds no image or is no class.
    """
    kind = _validate_name(name)
    if kind == DIGITS:
        if in_chans != 1:
            raise ValueError(f'{DIGITS} are grey images, the model takes images of {in_chans} channels (in_chans).')
        if split not in ('train', 'validation', 'test'):
            raise ValueError(f'{DIGITS} have the splits train and test (also called validation), got {split!r}.')
        return DigitsDataset(train=split == 'train')
    for package in _KINDS.get(kind, ()):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'dataset {name!r} needs the package {package}: pip install {package}')
    if kind in ('', 'torch', 'wds'):
        if not root:
            raise ValueError(f'data_dir must be the folder of dataset {name!r}, got {root!r}.')
        if not kwargs.get('download') and kind != 'wds' and not Path(root).exists():
            raise FileNotFoundError(f'data_dir does not exist: {root}')
    if class_map is not None:
        kwargs['class_map'] = class_map
    mode = 'L' if in_chans == 1 else 'RGB'
    try:
        dataset = create_dataset(name, root=root, split=split, input_img_mode=mode, **kwargs)
    except AssertionError as error:
        raise ValueError(f'dataset {name!r} cannot be opened: {error}') from error
    except RuntimeError as error:
        raise FileNotFoundError(
            f'data_dir {root} holds no images of dataset {name!r}, split {split!r}: {error}') from error
    if kind == 'torch':  # torchvision's own, which timm's mode does not reach
        dataset.transform = operator.methodcaller('convert', mode)
    if isinstance(getattr(dataset, 'reader', None), ReaderImageFolder):
        _check_folder(dataset.reader, root, split, class_map)
    return dataset


def _validate_name(name: str) -> str:
    """Return the kind of a data set: '' for a folder, 'digits', or the part of timm's name before the slash."""
    if name in ('', DIGITS):
        return name
    # timm takes all names that it does not know for image folders.
    kind, slash, rest = name.partition('/')
    if not slash or not rest or kind.lower() not in _KINDS:
        raise ValueError(
            f"dataset must be '' for an image folder, {DIGITS!r}, or a name that begins with "
            f'{", ".join(f"{kind}/" for kind in _KINDS)}, such as torch/cifar10, got {name!r}.')
    return kind.lower()


def _check_folder(reader: ReaderImageFolder, root: str, split: str, class_map: dict[str, int] | None) -> None:
    folder = Path(reader.root)
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    filled = {Path(path).relative_to(folder).parts[0] for path, _ in reader.samples}
    # timm takes all images below the folder if it finds no folder of the split.
    if folder == Path(root) and not filled <= set(reader.class_to_idx):
        raise FileNotFoundError(f'data_dir {root} has no folder for the split {split!r}, only {sorted(folders)[:10]}.')
    empty = folders - filled
    unknown = sorted(empty - set(class_map)) if class_map is not None else []
    if unknown:
        raise ValueError(f'folders of {folder} are no classes of the training split: {", ".join(unknown[:10])}.')
    if empty:
        raise ValueError(f'class folders of {folder} hold no images: {", ".join(sorted(empty)[:10])}.')


def create_datasets(
        name: str,
        root: str | None,
        train_split: str,
        val_split: str,
        val_fraction: float = 0.,
        max_train_images: int | None = None,
        unreadable: str = 'error',
        download: bool = False,
        in_chans: int = 3,
        batch_size: int = 1,
        seed: int = 0,
) -> tuple[Dataset, Dataset, list[str] | None]:
    """Open the training and the validation images.

    Args:
        name: timm's name of a data set ('' for an image folder, 'torch/cifar10', 'hfds/...', 'wds/...'), or 'digits'.
        root: Folder of the data.
        train_split: Name of the training split.
        val_split: Name of the split to evaluate on.
        val_fraction: If not 0, evaluate on this part of the training split instead, and train on the rest of it.
        max_train_images: Train on so many images only.
        unreadable: 'error' or 'skip', see `ImageSubset`.
        download: Fetch the data set if timm can.
        in_chans: Channels of the images: 1 or 3.
        batch_size: Hint for data sets that are streams.
        seed: Seed of the choice of images.

    Returns:
        Training images, validation images, and the names of the classes if the data set knows them.

    Raises:
        FileNotFoundError: The folder, or the folder of a split, does not exist.
        ImportError: The data set needs a package that is not installed.
        ValueError: The name is unknown, a class folder holds no image, validation has a class that training has not, or
            no image is left for one of them.
    """
    def open_split(split: str, class_map: dict[str, int] | None = None) -> Dataset:
        dataset = open_dataset(
            name,
            root,
            split,
            in_chans,
            class_map,
            download=download,
            is_training=split == train_split,
            batch_size=batch_size,
            seed=seed,
        )
        # In evaluation a folder of classes will do; here, training and validation would be the same images.
        if is_folder(dataset) and Path(dataset.reader.root) == Path(root):
            found = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
            raise FileNotFoundError(f'data_dir {root} has no folder for the split {split!r}, only {found[:10]}.')
        return dataset

    def is_folder(dataset: Dataset) -> bool:
        return isinstance(getattr(dataset, 'reader', None), ReaderImageFolder)

    source = open_split(train_split)
    streamed = isinstance(source, IterableDataset)
    if streamed and (val_fraction or max_train_images):
        raise ValueError(f'val_fraction and max_train_images cannot be used with the streamed data set {name!r}.')

    indices = held_out = None
    if val_fraction or max_train_images:
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        held_out, indices = order.tensor_split([round(val_fraction * len(order))])
        indices = indices[:max_train_images]
    if val_fraction:
        val = ImageSubset(source, held_out, unreadable, training=False)
    else:
        val = open_split(val_split, source.reader.class_to_idx if is_folder(source) else None)
        val = val if streamed else ImageSubset(val, None, unreadable, training=False)
    if not streamed and not (len(val) and (indices is None or len(indices))):
        purpose = 'train on' if len(val) else 'evaluate'
        raise ValueError(f'val_fraction {val_fraction} of {len(source)} images leaves none to {purpose}.')
    train = source if streamed else ImageSubset(source, indices, unreadable, training=True)
    return train, val, class_names_of(source)


def class_names_of(dataset: Dataset) -> list[str] | None:
    """Return the names of the classes of a data set, in their order; None if it does not tell, as streams do not."""
    if getattr(dataset, 'classes', None):
        return [str(name) for name in dataset.classes]
    indices = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    return sorted(indices, key=indices.get) if indices else None


def load_into_memory(
        dataset: ImageSubset,
        img_size: int,
        resize: bool = False,
        num_workers: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode all images once.

    Args:
        dataset: Images of one size. Unreadable ones are left out.
        img_size: Height and width to have.
        resize: Resize images of another size (bilinear).
        num_workers: Processes that decode.

    Returns:
        Images (n, C, img_size, img_size) as uint8, and their labels (n,).

    Raises:
        ValueError: The images differ in size, or have another size and are not to be resized.
    """
    batches = []
    loader = DataLoader(dataset, batch_size=512, num_workers=num_workers, collate_fn=_collate_arrays)
    for images, labels in loader:
        if len({image.shape for image in images}) > 1 or (batches and images[0].shape != batches[0][0].shape[1:]):
            raise ValueError('in_memory needs images of one size, these differ; set in_memory to false.')
        batches.append((np.stack(images), labels))
    images = torch.from_numpy(np.concatenate([images for images, _ in batches]))
    images = (images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)).contiguous()
    labels = torch.tensor([label for _, labels in batches for label in labels])
    keep = ~dataset.bad
    images, labels = images[keep], labels[keep]
    height, width = images.shape[-2:]
    if (height, width) != (img_size, img_size):
        if not resize:
            raise ValueError(
                f'the images are {height}x{width}, the model takes {img_size}x{img_size}: is this the data set of the '
                'recipe? Give img_size to resize them.')
        parts = [
            F.interpolate(part.float(), size=(img_size, img_size), mode='bilinear', antialias=True)
            for part in images.split(4096)
        ]
        images = torch.cat(parts).round().clamp(0, 255).to(torch.uint8)
    return images, labels


def _collate_arrays(batch: list) -> tuple[list[np.ndarray], list[int]]:
    return [np.asarray(image) for image, _ in batch], [label for _, label in batch]


class MemoryLoader:
    """Batches of images that lie in memory, augmented and normalised a batch at a time on their device.

    In training, the paper's augmentation for CIFAR: zero padding, a random crop of the original size, and a random
    horizontal flip. Order and augmentation are a function of seed and epoch. With several processes, batch `k` of all
    of them together is what one process would see as its batch `k` of the joint size.

    Args:
        images: (n, C, H, W), uint8
        labels: (n,)
        batch_size: Images in a batch of one process. An incomplete last batch is left out in training.
        mean: Mean of each channel, images being in 0..1.
        std: Standard deviation of each channel.
        training: Shuffle and augment.
        crop_padding: Pixels of padding on each side.
        hflip: Probability of a flip.
        seed: Seed of the order and the augmentation.
        device: Where the images are kept and the batches made.
        rank: Number of this process.
        world_size: Number of processes.

    Iterating gives images (B, C, H, W), float32 and channels_last, and labels (B,).

    Raises:
        ValueError: There are not enough images for one training batch.
    """

    def __init__(
            self,
            images: torch.Tensor,
            labels: torch.Tensor,
            batch_size: int,
            mean: tuple[float, ...],
            std: tuple[float, ...],
            training: bool = False,
            crop_padding: int = 0,
            hflip: float = 0.,
            seed: int = 0,
            device: torch.device | str = 'cpu',
            rank: int = 0,
            world_size: int = 1,
    ):
        if training and len(labels) < batch_size * world_size:
            raise ValueError(
                f'batch_size {batch_size} (times {world_size} processes) exceeds the {len(labels)} training images.')
        # The layout of channels_last, of which a crop copies whole pixels.
        self.pixels = images.permute(0, 2, 3, 1).contiguous().to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.scale = 1 / (255 * torch.tensor(std, device=device))
        self.shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)
        self.training = training
        self.crop_padding = crop_padding
        self.hflip = hflip
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        if self.training:
            return len(self.labels) // size
        # Without collectives in evaluation, processes may have different numbers of batches.
        return math.ceil((len(self.labels) - self.rank * self.batch_size) / size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count = len(self.labels)
        starts = [(batch * self.world_size + self.rank) * self.batch_size for batch in range(len(self))]
        if not self.training:
            for start in starts:
                chosen = slice(start, start + self.batch_size)
                yield self._normalize(self.pixels[chosen]), self.labels[chosen]
            return
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1).item()
        generator = torch.Generator().manual_seed(state)
        order = torch.randperm(count, generator=generator).to(self.device)
        offsets = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator).to(self.device)
        flips = (torch.rand(count, generator=generator) < self.hflip).to(self.device)
        for start in starts:
            part = slice(start, start + self.batch_size)
            chosen = order[part]
            yield self._normalize(self._crop_flip(self.pixels[chosen], offsets[part], flips[part])), self.labels[chosen]

    def _crop_flip(self, pixels: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
        count, height, width, _ = pixels.shape
        padding = self.crop_padding
        pixels = F.pad(pixels, [0, 0, padding, padding, padding, padding])
        rows = torch.arange(height, device=self.device) + offsets[:, :1]
        columns = torch.arange(width, device=self.device).expand(count, width)
        columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:]
        batch = torch.arange(count, device=self.device)[:, None, None]
        return pixels[batch, rows[:, :, None], columns[:, None, :]]

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.shift, pixels.float(), self.scale).permute(0, 3, 1, 2)


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
            crop_padding=config.crop_padding,
            hflip=config.hflip,
            seed=config.seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    loader = create_loader(
        dataset,
        input_size=(config.in_chans, config.img_size, config.img_size),
        batch_size=config.batch_size,
        is_training=training,
        scale=config.scale,
        hflip=config.hflip,
        color_jitter=config.color_jitter or None,
        interpolation='random' if training else 'bilinear',
        crop_pct=config.crop_pct,
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
