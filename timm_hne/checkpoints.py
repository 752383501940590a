"""Finding, checking and loading the checkpoints of training runs."""
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import load_state_dict
from timm.utils import load_checkpoint_metadata

from .ensemble import HierarchicalEnsemble
from .recipe import TrainConfig

__all__ = ['check_same_run', 'create_ensemble', 'find_checkpoint', 'load_checkpoint', 'load_weights', 'recipe_of']

_logger = logging.getLogger(__name__)

# Keys of a recipe that may change when a run is continued: they say where and how it runs, not what it computes.
_FREE_KEYS = ('data_dir', 'output_dir', 'resume', 'download', 'num_workers', 'device', 'log_interval', 'progress')


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a checkpoint was trained, from the arguments it holds: what was computed, and no path of a machine."""
    return {
        key: value for key, value in config.items()
        if key not in (*_FREE_KEYS, 'label_names') and not os.path.isabs(str(value))
    }


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
    # What timm's saver leaves under a temporary name if it is killed is no checkpoint yet.
    files = sorted(path for path in folder.glob('*.pth.tar') if path.name != 'tmp.pth.tar')
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


def check_same_run(checkpoint: Path, config: Mapping[str, Any], label_names: list[str] | None = None) -> None:
    """Check that a run can be continued by a configuration, with data of these classes if they are known.

    Raises:
        ValueError: They differ in what is computed.
    """
    args = load_checkpoint_metadata(str(checkpoint)).get('args')
    if args is None:
        raise ValueError(f'the run in {checkpoint.parent} cannot be continued, its checkpoint has no recipe.')
    before = {**asdict(TrainConfig()), **vars(args)}  # a key that is newer than the run had its default
    changed = [
        f'{name} was {before.get(name)!r} and is {value!r}'
        for name, value in config.items() if name not in _FREE_KEYS and before.get(name) != value
    ]
    if changed:
        raise ValueError(f'the run in {checkpoint.parent} cannot be continued, it differs: {"; ".join(changed)}.')
    if before.get('label_names') and label_names and before['label_names'] != label_names:
        raise ValueError(
            f'the run in {checkpoint.parent} cannot be continued with other classes, its own were '
            f'{", ".join(before["label_names"][:10])}, those of the data are {", ".join(label_names[:10])}.')
    if not config['in_memory'] and before['num_workers'] != config['num_workers']:
        _logger.warning(
            f'num_workers was {before["num_workers"]} and is {config["num_workers"]}: images are augmented differently '
            'from what they would have been.')


def load_checkpoint(path: str | os.PathLike, name: str | None = None) -> tuple[HierarchicalEnsemble, dict[str, Any]]:
    """Build the model of a checkpoint and load its weights, the averaged ones (EMA) if there are any.

    The sharing scheme, classes and image channels are read off the weights.

    Args:
        path: Checkpoint of this package's or timm's training, or a state dict, as a PyTorch or safetensors file.
        name: Name of the model; the one in the checkpoint if None.

    Returns:
        The model, and the arguments of its training as far as the checkpoint has them, with `epochs` being those done.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of this model.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint does not exist: {path}')
    try:
        state = load_state_dict(path)
        metadata = {} if path.endswith('.safetensors') else load_checkpoint_metadata(path)
    except Exception as error:  # whatever the readers of two formats make of junk
        raise ValueError(f'checkpoint {path} cannot be read: {error}') from error
    config = metadata.get('args') or {}
    config = dict(config if isinstance(config, dict) else vars(config))
    if 'epoch' in metadata:
        config['epochs'] = metadata['epoch'] + 1

    name = name or metadata.get('arch')
    if name is None:
        raise ValueError(f'checkpoint {path} does not say which model it is of, name it.')
    kwargs = {**(config.get('model_kwargs') or {}), 'global_pool': config.get('gp')}
    try:
        kwargs.update(_sizes(state, create_ensemble(name, device='meta', **kwargs)))
        model = create_ensemble(name, **kwargs)
        model.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f'checkpoint {path} is not one of {name}: it lacks the tensor {error}.') from error
    except (RuntimeError, ValueError) as error:
        # PyTorch goes on to name every tensor.
        reason = ' '.join(' '.join(str(error).splitlines()[:2]).split())
        recorded = f' It says that it is of {metadata["arch"]}.' if metadata.get('arch', name) != name else ''
        raise ValueError(f'checkpoint {path} is not one of {name}: {reason}{recorded}') from error
    return model, config


def create_ensemble(name: str, **kwargs) -> HierarchicalEnsemble:
    """Create a model by timm's `create_model` and make sure that it is a hierarchical ensemble.

    Raises:
        ValueError: It is none.
    """
    # timm's own models are refused before their weights are fetched.
    is_timms = timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('timm.')
    model = None if is_timms else timm.create_model(name, **kwargs)
    if not isinstance(model, HierarchicalEnsemble):
        raise ValueError(f'model must be a hierarchical ensemble, such as {timm.list_models("hne_*")}, got {name!r}.')
    return model


def _sizes(state: dict[str, torch.Tensor], model: HierarchicalEnsemble) -> dict[str, Any]:
    """Read arguments of a model off weights; `model` is one of the same architecture."""
    nodes = []
    for block in range(len(model.nodes)):
        key, weight = next((k, v) for k, v in model.state_dict().items() if k.startswith(f'blocks.{block}.'))
        channels = weight.shape[0] // model.nodes[block]
        count, rest = divmod(state[key].shape[0], channels)
        if rest or not count:
            raise ValueError(
                f'block {block} has {state[key].shape[0]} channels, which are not nodes of {channels} channels each.')
        nodes.append(count)
    return {
        'nodes': tuple(nodes),
        'num_classes': state[f'{model.pretrained_cfg["classifier"]}.weight'].shape[0] // nodes[-1],
        'in_chans': state[f'{model.pretrained_cfg["first_conv"]}.weight'].shape[1],
    }
