"""Image data sets by their names: timm's, and scikit-learn's digits."""
import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from ..images import UNREADABLE, convert_image, open_image
from .folders import check_classes, classes_without_strays, find_folder, refuse_link_loops

__all__ = ['DIGITS', 'ImageSubset', 'UnreadableImageError', 'class_names_of', 'create_datasets', 'open_dataset']

DIGITS = 'digits'

# Kinds of timm's data sets, and the packages that they need.
_KINDS = {
    'torch': (),
    'hfds': ('datasets',),
    'hfids': ('datasets',),
    'tfds': ('tensorflow', 'tensorflow_datasets'),
    'wds': ('webdataset',),
}

# torchvision's sets of which timm takes the test images for whatever is no name of the training images.
_TWO_SPLITS = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'qmnist', 'fashion_mnist')
_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')

_MOST_UNREADABLE = 1000  # in a row: then it is not the images, but the disk


class UnreadableImageError(OSError):
    """An image of a data set cannot be read; the message names it."""

    def __init__(self, message: str):
        # What a worker process of a loader raises, PyTorch raises again with the worker's whole traceback as its
        # message. The message proper is what stands behind the name of this class at the end of it.
        super().__init__(message.rpartition(f'{__name__}.UnreadableImageError: ')[2].strip())


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
        for offset in range(min(len(self), _MOST_UNREADABLE)):
            found = (position + offset) % len(self)
            try:
                image, target = self._read(found)
            except UNREADABLE as error:
                if self.unreadable == 'error':
                    reason = ' '.join(str(error).split())
                    raise UnreadableImageError(f'cannot read image {self.filename(found)}: {reason}') from error
                self.bad[found] = True
                continue
            if offset and not self.training:
                target = -1
            return image if self.transform is None else self.transform(image), target
        if len(self) > _MOST_UNREADABLE:
            raise UnreadableImageError(
                f'cannot read {_MOST_UNREADABLE} images in a row, the last of them {self.filename(found)}.')
        raise UnreadableImageError(f'cannot read any of the {len(self)} images.')

    def _read(self, position: int):
        index = self.indices[position].item()
        if not isinstance(self.source, ImageDataset):
            return self.source[index]
        file, target, *_ = self.source.reader[index]
        with file:
            return open_image(file, self.source.input_img_mode), target

    def filename(self, position: int) -> str:
        """Name of an image, for messages."""
        index = self.indices[position].item()
        if isinstance(self.source, ImageDataset):
            return self.source.filename(index, absolute=True)
        return f'number {index}'

    def bad_files(self) -> list[str]:
        """Names of the unreadable images met so far."""
        return [self.filename(position) for position in self.bad.nonzero().flatten().tolist()]


class _ConvertingReader:
    """Reader of a stream that converts the images as the rest of this package does, not by Pillow's `convert` alone."""

    def __init__(self, reader: Any, mode: str):
        self.reader = reader
        self.mode = mode

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        for image, target in self.reader:
            yield convert_image(image, self.mode), target

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):  # asked for while a worker process unpickles this, before there is a reader
            raise AttributeError(name)
        return getattr(self.reader, name)


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
        ValueError: The name or the split is unknown, the folder is missing, the images have another number of channels,
            or a class folder holds no image, is no class, or has a link to a folder that contains it.
    """
    kind = _validate_name(name)
    if kind == 'torch' and name.rpartition('/')[2].lower() in _TWO_SPLITS and split not in _SPLITS:
        raise ValueError(f'split of dataset {name!r} must be one of {", ".join(_SPLITS)}, got {split!r}.')
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
            what = f'dataset {name!r}' if name else 'images, with a folder for each split and class'
            raise ValueError(f'data_dir must be the folder of {what}, got {root!r}. Give it by --data-dir.')
        if not kwargs.get('download') and kind != 'wds' and not Path(root).exists():
            raise FileNotFoundError(f'data_dir does not exist: {root}')
    if kind == '' and Path(root).is_dir():
        refuse_link_loops(find_folder(root, split))
    mode = 'L' if in_chans == 1 else 'RGB'
    try:
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            class_map=class_map,
            # Streams are converted here; the others by `ImageSubset`, which is told so by this argument.
            input_img_mode='' if kind in ('wds', 'hfids') else mode,
            **kwargs,
        )
    except AssertionError as error:
        raise ValueError(f'dataset {name!r} cannot be opened: {error}') from error
    except RuntimeError as error:
        raise FileNotFoundError(
            f'data_dir {root} holds no images of dataset {name!r}, split {split!r}: {error}') from error
    if kind == 'torch':  # torchvision's own, which timm's mode does not reach
        dataset.transform = partial(convert_image, mode=mode)
        if hasattr(dataset, 'loader'):  # of files; torchvision's would convert them
            dataset.loader = partial(open_image, mode=mode)
    elif isinstance(dataset, IterableImageDataset):
        dataset.reader = _ConvertingReader(dataset.reader, mode)
    elif isinstance(dataset.reader, ReaderImageFolder):
        check_classes(dataset.reader, root, split, class_map)
        classes = classes_without_strays(dataset.reader, class_map)
        if classes is not None:
            return open_dataset(name, root, split, in_chans, classes, **kwargs)
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
        # A folder of classes will do if a part of it is held out; else training and validation would be the same.
        if is_folder(dataset) and Path(dataset.reader.root) == Path(root) and not val_fraction:
            found = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
            raise FileNotFoundError(
                f'data_dir {root} has no folder for the split {split!r}, only {found[:10]}. Name the splits that there '
                'are by --train-split and --val-split, or hold out a part of the training images, --val-fraction 0.2.')
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
