"""Small images kept in memory: decoded once, augmented a batch at a time."""
import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from .datasets import ImageSubset

__all__ = ['ImageSizeError', 'MemoryLoader', 'collate', 'load_into_memory']


class ImageSizeError(ValueError):
    """An image has another size than those that are kept in memory."""

    def __init__(self, message: str):
        # Without the traceback of a worker process, as `UnreadableImageError`.
        super().__init__(message.rpartition(f'{__name__}.ImageSizeError: ')[2].strip())


def load_into_memory(
        dataset: ImageSubset,
        img_size: int,
        resize: bool = False,
        num_workers: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode all images once.

    Args:
        dataset: Images. Unreadable ones are left out.
        img_size: Height and width to have.
        resize: Bring images of another size to this one as timm does in evaluation: scale the shorter side (bilinear),
            and cut off what the longer one has too much on both ends.
        num_workers: Processes that decode.

    Returns:
        Images (n, C, img_size, img_size) as uint8, and their labels (n,).

    Raises:
        ValueError: An image has another size, and none is to be resized.
    """
    join = partial(collate, img_size=img_size, resize=resize)
    images = labels = None
    start = 0
    for pixels, classes in DataLoader(dataset, batch_size=512, num_workers=num_workers, collate_fn=join):
        if images is None:
            # The layout of a `MemoryLoader`: there is one copy of the images at any time.
            shape = len(dataset), *pixels.shape[1:]
            images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            labels = torch.empty(len(dataset), dtype=torch.int64)
        images[start:start + len(pixels)] = pixels
        labels[start:start + len(pixels)] = classes
        start += len(pixels)
    if dataset.bad.any():
        images, labels = images[~dataset.bad], labels[~dataset.bad]
    return images, labels


def collate(batch: list, img_size: int, resize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Join images as `load_into_memory` keeps them."""
    images = []
    for image, _ in batch:
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if pixels.shape[1:] != (img_size, img_size):
            if not resize:
                height, width = pixels.shape[1:]
                raise ImageSizeError(
                    f'the images are {height}x{width}, the model takes {img_size}x{img_size}, and in_memory needs '
                    f'images of one size: is this the data set of the recipe? Give img_size (--img-size {img_size}) '
                    'to resize them, or leave them in their files (--no-in-memory).')
            pixels = _resize(pixels, img_size)
        images.append(pixels)
    return torch.stack(images), torch.tensor([label for _, label in batch])


def _resize(pixels: torch.Tensor, img_size: int) -> torch.Tensor:
    """Scale the shorter side of an image (C, H, W) of bytes, and cut off what the longer one has too much."""
    height, width = pixels.shape[1:]
    scaled = [max(img_size, int(img_size * side / min(height, width))) for side in (height, width)]
    top, left = (round((side - img_size) / 2) for side in scaled)
    pixels = F.interpolate(pixels[None].float(), size=scaled, mode='bilinear', antialias=True)[0]
    return pixels[:, top:top + img_size, left:left + img_size].round().clamp(0, 255).to(torch.uint8)


class MemoryLoader:
    """Batches of images that lie in memory, augmented and normalised a batch at a time on their device.

    In training, the paper's augmentation for CIFAR: zero padding, a random crop of the original size, and a random
    horizontal flip; or a random resized crop and a flip. Order and augmentation are a function of seed and epoch. With
    several processes, batch `k` of all of them together is what one process would see as its batch `k` of the joint
    size.

    Args:
        images: (n, C, H, W), uint8
        labels: (n,)
        batch_size: Images in a batch of one process. An incomplete last batch is left out in training.
        mean: Mean of each channel, images being in 0..1.
        std: Standard deviation of each channel.
        training: Shuffle and augment.
        crop_padding: Pixels of padding on each side.
        scale: Least and greatest area of a random resized crop, relative to the image; it replaces the padded crop.
            The aspect ratio is from 3/4 to 4/3, sides that would exceed the image are those of the image.
        hflip: Probability of a flip.
        seed: Seed of the order and the augmentation.
        device: Where the images are kept and the batches made.
        rank: Number of this process.
        world_size: Number of processes.

    Iterating gives images (B, C, H, W), float32 and channels_last, and labels (B,).
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
            scale: tuple[float, float] | None = None,
            hflip: float = 0.,
            seed: int = 0,
            device: torch.device | str = 'cpu',
            rank: int = 0,
            world_size: int = 1,
    ):
        # The layout of channels_last, of which a crop copies whole pixels.
        self.pixels = images.permute(0, 2, 3, 1).contiguous().to(device)
        self.labels = labels.to(device)
        self.batch_size = batch_size
        self.gain = 1 / (255 * torch.tensor(std, device=device))
        self.shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)
        self.training = training
        self.crop_padding = crop_padding
        self.scale = scale
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
        boxes = _random_boxes(count, self.scale, generator).to(self.device) if self.scale else None
        for start in starts:
            part = slice(start, start + self.batch_size)
            pixels, labels = self.pixels[order[part]], self.labels[order[part]]
            if boxes is None:
                pixels = self._crop_flip(pixels, offsets[part], flips[part])
            else:
                pixels = _resized_crop(pixels, boxes[part], flips[part])
            yield self._normalize(pixels), labels

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
        return torch.addcmul(self.shift, pixels.float(), self.gain).permute(0, 3, 1, 2)


def _random_boxes(count: int, scale: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Draw crops: width, height, and the left and the top margin, as parts of the image's sides, `(count, 4)`."""
    areas, ratios, left, top = torch.rand(4, count, generator=generator)
    areas = scale[0] + (scale[1] - scale[0]) * areas
    ratios = (4 / 3) ** (2 * ratios - 1)
    width, height = ((areas * ratio).sqrt().clamp(max=1) for ratio in (ratios, 1 / ratios))
    return torch.stack([width, height, (1 - width) * left, (1 - height) * top], dim=1)


def _resized_crop(pixels: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Scale crops of images (B, H, W, C) to the size of the images (bilinear), and mirror those of `flips`."""
    width, height, left, top = boxes.unbind(1)
    # `grid_sample` counts from -1 to 1 across the image.
    theta = pixels.new_zeros(len(pixels), 2, 3, dtype=torch.float32)
    theta[:, 0, 0], theta[:, 0, 2] = torch.where(flips, -width, width), 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    images = pixels.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode='border', align_corners=False)
    return images.permute(0, 2, 3, 1).contiguous()
