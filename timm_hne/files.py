"""Files that are either whole or not there."""
import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_file(path: str | os.PathLike, save: Callable[[Path], object]) -> None:
    """Let a function save a file under a temporary name, then rename it; nothing is left if it fails.

    Args:
        path: File to write; its folder is created. A device, such as /dev/null, is written to as it is.
        save: Function that writes to the path it is given, which ends like `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file() and not path.is_dir():
        save(path)
        return
    temporary = path.with_name(f'.{os.getpid()}.{threading.get_ident()}.{path.name}')
    try:
        save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 as `write_file` does."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def printable(path: str | os.PathLike) -> str:
    """Return a path, or a sentence with one in it, as text that any file can hold, whatever the bytes are."""
    return os.fsencode(path).decode('utf-8', 'backslashreplace')
