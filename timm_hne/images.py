"""Opening image files and converting them, for training, evaluation and prediction alike."""
import io
import math
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PREFIXES,
    STRIPOFFSETS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
)
from timm.data.readers.img_extensions import is_img_extension

__all__ = ['UNREADABLE', 'convert_image', 'decoded_sizes', 'find_images', 'load_pixels', 'open_image']

MAX_PARTS = 65_536  # of a TIFF file whose sender is not trusted

# What Pillow's decoders raise on broken files, and `convert_image` on images that nothing says how to show.
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, struct.error, Image.DecompressionBombError)


def load_pixels(image: Image.Image) -> None:
    """Decode an image.

    Raises:
        OSError: Its file is damaged.
    """
    try:
        image.load()
    except (TypeError, ArithmeticError) as error:  # Pillow's, on damaged TIFF files
        raise OSError(f'it is damaged: {error}') from error


def decoded_sizes(image: Image.Image) -> list[tuple[int, int]]:
    """Return the size of an image, and that of all its tiles, of a TIFF file, which are decoded whole.

    Raises:
        OSError: Its file is damaged.
    """
    tags = getattr(image, 'tag_v2', {})
    if TILEWIDTH not in tags and TILELENGTH not in tags:
        return [image.size]
    try:
        tile = tags[TILEWIDTH], tags[TILELENGTH]
        return [image.size, tuple(math.ceil(side / part) * part for side, part in zip(image.size, tile))]
    except (LookupError, TypeError, ArithmeticError) as error:
        raise OSError(f'it is damaged: {error}') from error


def _check_parts(file: BinaryIO) -> None:
    """Refuse a TIFF file of more strips or tiles than images have: Pillow makes an object of each when it opens it."""
    head = file.read(16)
    if not head.startswith(tuple(PREFIXES)):
        return
    order, big = '<' if head.startswith(b'II') else '>', head[2] == 43  # as Pillow reads it
    try:
        file.seek(struct.unpack_from(f'{order}Q' if big else f'{order}L', head, 8 if big else 4)[0])
        number, = struct.unpack(f'{order}Q' if big else f'{order}H', file.read(8 if big else 2))
        entry = struct.Struct(f'{order}HHQ8x' if big else f'{order}HHL4x')
        entries = file.read(entry.size * min(number, 65_535))
    except (OverflowError, ValueError, struct.error):  # it is damaged, as Pillow is about to say
        return
    for tag, _, count in entry.iter_unpack(entries[:len(entries) // entry.size * entry.size]):
        if tag in (STRIPOFFSETS, TILEOFFSETS) and count > MAX_PARTS:
            raise ValueError(f'it has {count:,} strips or tiles, more than the {MAX_PARTS:,} that are allowed')


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Turn an image upright, as its EXIF data say, and convert it to 8 bits a channel.

    Of 12 or 16 bits the upper 8 are kept. Pillow's own `convert` would make all above 255 white.

    Args:
        image: Any image of Pillow's.
        mode: 'L' for grey, 'RGB' for colours.

    Raises:
        OSError: The file of the image is damaged.
        ValueError: The image has 32-bit integers or floating-point numbers, and nothing says which of them is white.
    """
    tags = getattr(image, 'tag_v2', {})  # of a TIFF file
    load_pixels(image)
    with suppress(Exception):  # damaged EXIF data, of which there are many, count as none
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow reads 16-bit PPM files, and before 11.2 PNG files, into 32-bit integers.
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')):
        bits = tags.get(BITSPERSAMPLE, (16,))[0]  # Pillow does not scale 12 of them, nor invert those whose 0 is white
        pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - pixels if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else pixels)
    elif image.mode in ('I', 'F'):
        raise ValueError(f'it has the mode {image.mode}, and nothing says which of its values is white')
    try:
        return image.convert(mode)
    except (AssertionError, TypeError, ArithmeticError) as error:  # Pillow's, without a palette for instance
        raise OSError(f'it is damaged: its colours cannot be converted, {str(error) or "they are missing"}') from error


def open_image(
        file: str | PathLike | BinaryIO,
        mode: str,
        check: Callable[[tuple[int, int]], None] | None = None,
        formats: Sequence[str] | None = None,
) -> Image.Image:
    """Read an image file and convert it as `convert_image` does.

    Args:
        file: Path, or an open file.
        mode: 'L' for grey, 'RGB' for colours.
        check: Is given width and height before anything is decoded, then those of what is decoded, which may be more,
            and raises what it will.
        formats: Formats that are tried, in Pillow's names; all if None.

    Raises:
        OSError, and all others of `UNREADABLE`: It cannot be read.
    """
    if check is not None:
        if isinstance(file, (str, PathLike)):
            with open(file, 'rb') as opened:
                return open_image(opened, mode, check, formats)
        if not file.seekable():  # a pipe
            file = io.BytesIO(file.read())
        _check_parts(file)
        file.seek(0)
    with Image.open(file, formats=formats) as image:
        if check is not None:
            for size in decoded_sizes(image):
                check(size)
        return convert_image(image, mode)


def find_images(folder: str | PathLike) -> list[Path]:
    """Return the image files in a folder and those below it, by timm's list of extensions, sorted.

    Raises:
        OSError: There are none.
    """
    found = (path for path in Path(folder).rglob('*') if is_img_extension(path.suffix.lower()))
    files = sorted(path for path in found if not path.is_dir())
    if not files:
        raise OSError(f'folder {folder} holds no images.')
    return files
