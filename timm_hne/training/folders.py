"""Image folders: what timm's reader takes for a class, and what it must not."""
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from timm.data.dataset_factory import _search_split
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

__all__ = ['check_classes', 'classes_without_strays', 'find_folder', 'refuse_link_loops']

_logger = logging.getLogger(__name__)


def find_folder(root: str, split: str) -> Path:
    """Return the folder that timm reads for a split: 'val' also stands for 'validation', and so on."""
    return Path(_search_split(root, split))


def refuse_link_loops(folder: Path) -> None:
    """Make sure that no link below a folder leads back to a folder that contains it.

    timm would follow it for as long as the system lets it, and count the same images forty times.

    Raises:
        ValueError: There is such a link.
    """
    above = {str(folder): frozenset([os.path.realpath(folder)])}
    for parent, names, _ in os.walk(folder, followlinks=True):
        passed = above.pop(parent)
        for name in names:
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in passed:
                raise ValueError(f'folder {path} is a link to {real}, which contains it; remove the link.')
            above[path] = passed | {real}


def check_classes(reader: ReaderImageFolder, root: str, split: str, class_map: Mapping[str, int] | None) -> None:
    """Check that every folder of a split is a class that holds images.

    Args:
        reader: Reader of the split.
        root: Folder of the data.
        split: Name of the split.
        class_map: Labels of the classes, if they are those of another split.

    Raises:
        FileNotFoundError: There is no folder for the split.
        ValueError: A folder holds no images, or is none of the classes.
    """
    folder = Path(reader.root)
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    parts = [Path(path).relative_to(folder).parts for path, _ in reader.samples]
    filled = {first for first, *rest in parts if rest}
    # timm takes all images below the folder if it finds no folder of the split.
    if folder == Path(root) and not filled <= set(reader.class_to_idx):
        raise FileNotFoundError(f'data_dir {root} has no folder for the split {split!r}, only {sorted(folders)[:10]}.')
    empty = folders - filled
    unknown = sorted(empty - set(class_map)) if class_map is not None else []
    if unknown:
        raise ValueError(f'folders of {folder} are no classes of the training split: {", ".join(unknown[:10])}.')
    if empty:
        raise ValueError(f'class folders of {folder} hold no images: {", ".join(sorted(empty)[:10])}.')


def classes_without_strays(reader: ReaderImageFolder, class_map: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return the classes without the one that timm makes of images which lie in no class folder, and has no name.

    Args:
        reader: Reader of a split.
        class_map: Labels of the classes that the reader was given; if there are some, it has left such images out.

    Returns:
        The labels of the other classes, numbered from 0; None if nothing has to be changed.

    Raises:
        FileNotFoundError: There are no class folders at all.
    """
    folder, extensions = Path(reader.root), get_img_extensions(as_set=True)
    strays = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in extensions and not path.is_dir())
    if not strays:
        return None
    if class_map is not None:
        _logger.warning(
            f'{len(strays)} images in {folder} lie in no class folder and are left out: {", ".join(strays[:10])}')
        return None
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    names.remove('')
    if not names:
        raise FileNotFoundError(f'{folder} holds images, but no folders of classes with images.')
    return {name: label for label, name in enumerate(names)}
