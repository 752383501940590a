"""Finding, checking and loading the checkpoints of training runs."""
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn as nn
from timm.models import load_state_dict
from timm.utils import load_checkpoint_metadata

__all__ = ['check_same_run', 'find_checkpoint', 'load_weights']

_logger = logging.getLogger(__name__)

# Keys of a recipe that may change when a run is continued: they say where and how it runs, not what it computes.
_FREE_KEYS = ('data_dir', 'output_dir', 'resume', 'download', 'num_workers', 'device', 'log_interval', 'progress')


def load_weights(model: nn.Module, path: str) -> None:
    """Load the weights of a checkpoint, the moving average if it has one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or its weights are those of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'initial_checkpoint does not exist: {path}')
    try:
        weights = load_state_dict(path)
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
    except Exception as error:  # whatever the readers of two formats make of junk
        raise ValueError(f'initial_checkpoint {path} is no checkpoint: {error}') from error
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    wrong = [
        f'{name} {found.get(name, "missing")}, not {expected.get(name, "there")}'
        for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise ValueError(
            f'initial_checkpoint {path} is of another architecture, other nodes or classes: {len(wrong)} tensors '
            f'differ, such as {"; ".join(wrong[:3])}.')
    model.load_state_dict(weights)


def find_checkpoint(folder: Path, resume: bool) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None if there is none.

    Raises:
        FileExistsError: There are checkpoints, but nobody asked to `resume`.
        RuntimeError: There are checkpoints, but none can be read.
    """
    files = sorted(folder.glob('*.pth.tar'))
    if files and not resume:
        raise FileExistsError(f'output_dir {folder} holds a run already; continue it with resume, or choose another.')
    readable = []
    for path in files:
        try:
            readable.append((load_checkpoint_metadata(str(path))['epoch'], path))
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            _logger.warning(f'checkpoint {path} cannot be read and is passed over: {error}')
    if files and not readable:
        raise RuntimeError(f'none of the {len(files)} checkpoints in output_dir {folder} can be read.')
    return max(readable)[1] if readable else None


def check_same_run(checkpoint: Path, config: Mapping[str, Any]) -> None:
    """Check that a run can be continued by a configuration.

    Raises:
        ValueError: They differ in what is computed.
    """
    before = vars(load_checkpoint_metadata(str(checkpoint))['args'])
    changed = [
        f'{name} was {before.get(name)!r} and is {value!r}'
        for name, value in config.items() if name not in _FREE_KEYS and before.get(name) != value
    ]
    if changed:
        raise ValueError(f'the run in {checkpoint.parent} cannot be continued, it differs: {"; ".join(changed)}.')
