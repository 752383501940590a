"""The process and the machine that this runs on. What changes the process is left to whoever owns it to call."""
import ctypes
import gc
import importlib.metadata
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .version import __version__


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where it is glibc.

    By default it returns large blocks to the system at once, and getting them back page by page takes a tenth to a
    quarter of the time of a training step on a CPU, and half of that of evaluating a large batch. Holds for the whole
    process.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 64 << 20)


_freeze_lock = threading.RLock()  # a collection may finalise a context in this very thread
_freezers = 0


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Let Python's garbage collector pass over everything that exists now (`gc.freeze`), until the context is left.

    A compiler leaves so many objects behind that a full collection stops all threads for most of a second. Contexts may
    overlap and be entered and left in any thread: the first one in freezes, the last one out unfreezes, which is all
    that Python offers, so objects that somebody else froze meanwhile are unfrozen too.
    """
    global _freezers
    with _freeze_lock:
        _freezers += 1
        if _freezers == 1:
            gc.collect()
            gc.freeze()
    try:
        yield
    finally:
        with _freeze_lock:
            _freezers -= 1
            if _freezers == 0:
                gc.unfreeze()


def processor() -> str:
    """Name the processor."""
    name, cpuinfo = platform.processor() or platform.machine(), Path('/proc/cpuinfo')
    if not cpuinfo.exists():
        return name
    lines = (line.split(':', 1) for line in cpuinfo.read_text().splitlines() if ':' in line)
    facts = {key.strip(): value.strip() for key, value in lines}
    # Arm processors have no name there, but numbers.
    codes = [facts[key] for key in ('CPU implementer', 'CPU part') if key in facts]
    return facts.get('model name') or ' '.join([name, *codes])


def installed_version(package: str) -> str:
    """Return the version of an installed package without importing it; 'unknown' if pip knows it by another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'


def environment(device: torch.device, mode: str = 'original') -> dict[str, str]:
    """Describe what latencies depend on: the hardware and the versions, that of the package that runs a mode too."""
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f'{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    versions = {'torch': torch.__version__, 'timm_hne': __version__}
    engine = mode.partition(',')[0]
    if engine in ('onnxruntime', 'openvino'):
        versions[engine] = installed_version(engine)
    return {'device': device.type, 'hardware': hardware, **versions}
