"""The checkpoints of training runs: the one place that knows what is in such a file.

They are files of timm's `CheckpointSaver`, so `timm.create_model(name, checkpoint_path=...)` loads them too.
"""
import argparse
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from timm.models import clean_state_dict, load_state_dict
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler, load_checkpoint_metadata

from ..models.create import create_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..models.grow import NOISE
from ..models.weights import load_grown, read_sizes
from ..pretrained import read_folder
from .recipe import FREE_KEYS, TrainConfig, image_preparation, in_phase, recipe_of, so_far
from .summary import Summary

__all__ = ['CheckpointWriter', 'RunCheckpoint', 'load_checkpoint']

_logger = logging.getLogger(__name__)

# What a run knows about its images, in the names of timm's `resolve_data_config`.
_DATA_KEYS = ('img_size', 'input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')

_UNFINISHED = 'tmp.pth.tar'  # what timm's saver is writing


def _with_lists(value: Any) -> Any:
    """Return a value as YAML and JSON read it back: with lists for tuples."""
    if isinstance(value, Mapping):
        return {key: _with_lists(entry) for key, entry in value.items()}
    return [_with_lists(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of this package's or timm's training, or weights alone.

    Attributes:
        path: The file.
        argument: What messages call the file.
        arch: Name of the model, None if the file does not say.
        epoch: Number of the last epoch that is in it, from 0; None if the file does not say.
        args: Arguments of the training by their names; empty if the file does not say.
    """
    path: Path
    argument: str = 'checkpoint'
    arch: str | None = None
    epoch: int | None = None
    args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike, argument: str = 'checkpoint') -> 'RunCheckpoint':
        """Read all but the tensors of a PyTorch or safetensors file, and check that the former is undamaged.

        Args:
            path: The file.
            argument: What messages call it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no checkpoint, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'{argument} does not exist: {path}')
        if path.suffix == '.safetensors':
            return cls(path, argument)
        checkpoint = cls._read_metadata(path, argument)
        checkpoint._check_sums()
        return checkpoint

    @classmethod
    def newest(cls, folder: Path, resume: bool) -> 'RunCheckpoint | None':
        """Return the newest undamaged checkpoint of the run in a folder, or None if it has none.

        Raises:
            FileExistsError: There are checkpoints, or the log of a run, but nobody asked to `resume`.
            RuntimeError: There are checkpoints, but all are damaged.
        """
        # What timm's saver leaves under its temporary name, if it is killed, is no checkpoint yet.
        files = sorted(path for path in folder.glob('[!.]*.pth.tar') if path.name != _UNFINISHED and path.is_file())
        if (files or (folder / Summary.NAME).exists()) and not resume:
            raise FileExistsError(
                f'output_dir {folder} holds a run already; continue it with resume, or choose another.')
        found = []
        for path in files:
            try:
                checkpoint = cls._read_metadata(path)
                found.append((checkpoint.epoch if checkpoint.epoch is not None else -1, path.name, checkpoint))
            except ValueError as error:
                _logger.warning(f'{error}; it is passed over.')
        for *_, checkpoint in sorted(found, reverse=True):
            try:
                checkpoint._check_sums()
                return checkpoint
            except ValueError as error:
                _logger.warning(f'{error}; it is passed over.')
        if files:
            raise RuntimeError(f'none of the {len(files)} checkpoints in output_dir {folder} can be read.')
        return None

    @classmethod
    def _read_metadata(cls, path: Path, argument: str = 'checkpoint') -> 'RunCheckpoint':
        open(path, 'rb').close()  # a file that may not be read is not damaged, and stops the run
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError('it is no checkpoint of PyTorch 1.6 or later, or is cut off')
            content = dict(load_checkpoint_metadata(str(path)))
            args = content.get('args') or {}
            args = dict(args if isinstance(args, Mapping) else vars(args))
        except Exception as error:  # whatever PyTorch makes of damaged files
            raise ValueError(f'{argument} {path} cannot be read: {error}') from error
        if args.get('in_memory'):  # older versions wrote what was not applied
            args |= {'color_jitter': 0., 'crop_pct': 1.}
        return cls(path, argument, content.get('arch'), content.get('epoch'), args)

    def _check_sums(self) -> None:
        """Raise a ValueError if a byte of the file has changed since it was written. PyTorch does not look."""
        try:
            with zipfile.ZipFile(self.path) as file:
                damaged = file.testzip()
                # An entry marked as a folder has no content for PyTorch, which then returns whatever is in memory.
                folders = [entry.filename for entry in file.infolist() if entry.external_attr & 0x10]
        except Exception as error:  # whatever Python's reader makes of damaged files
            raise ValueError(f'{self.argument} {self.path} cannot be read: {error}') from error
        if damaged is not None:
            raise ValueError(f'{self.argument} {self.path} cannot be read: the check sum of {damaged} is wrong')
        if folders:
            raise ValueError(f'{self.argument} {self.path} cannot be read: {folders[0]} is marked as a folder')

    @property
    def epochs_planned(self) -> int | None:
        """Number of epochs that the run is to have, None if the file does not say."""
        return self.args.get('epochs')

    @property
    def is_finished(self) -> bool:
        """Whether no epoch is left to do, as far as the file says."""
        return self.epoch is None or self.epoch + 1 >= (self.epochs_planned or 0)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the training, those of the last phase that is in it, with `epochs` being those done."""
        config, epochs = self.args, 0
        for phase in self.args.get('phases') or ():
            config = in_phase(self.args, phase)
            epochs += phase['epochs']
            if self.epoch is not None and self.epoch < epochs:
                break
        return {**config, **self._done}

    @property
    def _done(self) -> dict[str, int]:
        return {} if self.epoch is None else {'epochs': self.epoch + 1}

    @property
    def recipe(self) -> dict[str, Any]:
        """How the run was planned that the weights are of: what was computed, and no path of a machine."""
        return recipe_of({**self._done, **self.args})

    @property
    def data_config(self) -> dict[str, Any]:
        """How images were prepared for validation, as far as the file says, in timm's names."""
        prepared = {}
        if 'in_memory' in self.args:  # our trainer's
            prepared = image_preparation(self.args['in_memory'], self.args.get('crop_pct'))
        return {
            key: value for key, value in {**self.config, **prepared}.items() if key in _DATA_KEYS and value is not None}

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights, the moving average if there is one.

        Raises:
            ValueError: The file holds no weights.
            DigestError: The file is not the one that a `SHA256SUMS` beside it records.
        """
        safe = self.path.suffix == '.safetensors'
        data = read_folder(self.path.parent, (self.path.name,))[self.path.name] if safe else None
        try:
            weights = clean_state_dict(load(data)) if safe else load_state_dict(str(self.path))
            if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
                raise TypeError('it holds other things than tensors')
        except Exception as error:  # whatever the readers of two formats make of junk
            raise ValueError(f'{self.argument} {self.path} cannot be read: {error}') from error
        return weights

    def load_into(self, model: HierarchicalEnsemble, noise: float = NOISE, seed: int = 0) -> None:
        """Load the weights into a model, which may have more nodes, or fewer; see `timm_hne.models.weights.load_grown`.

        Args:
            model: Any `hne_*` model.
            noise: Standard deviation of the noise of copies, relative to the root mean square of a tensor.
            seed: Seed of the noise.

        Raises:
            ValueError: They are those of another model.
        """
        try:
            load_grown(model, self.weights(), noise, seed)
        except ValueError as error:
            raise ValueError(
                f'{self.argument} {self.path} is of another architecture, other nodes or classes: {error}') from error

    def create_model(self, name: str | None = None, **kwargs) -> HierarchicalEnsemble:
        """Build the model and load the weights. Nodes, classes and image channels are read off the weights.

        The names of the classes, if the file has them, are `label_names` of the model's `pretrained_cfg`.

        Args:
            name: Name of the model; the one in the file if None.
            **kwargs: Arguments of the model that the file does not say, or says otherwise.

        Raises:
            ValueError: The file does not say which model it is of, or is one of another model.
        """
        weights = self.weights()
        name = name or self.arch
        if name is None:
            raise ValueError(f'{self.argument} {self.path} does not say which model it is of, name it.')
        recorded = dict(self.config.get('model_kwargs') or {})
        if self.args.get('gp') is not None:  # timm's option --gp
            recorded['global_pool'] = self.args['gp']
        kwargs = {**recorded, **kwargs}
        assumed = {}
        if name.startswith('hne_from_timm'):
            size = self.config.get('input_size') or self.config.get('img_size')
            if size is not None and 'img_size' not in kwargs:
                assumed = {'img_size': size if isinstance(size, int) else tuple(size)[-2:]}
            kwargs['init'] = 'copy'  # all weights are replaced
        try:
            kwargs.update(read_sizes(weights, create_ensemble(name, device='meta', **kwargs, **assumed)))
            model = create_ensemble(name, **kwargs, **assumed)
            try:
                model.load_state_dict(weights)
            except RuntimeError:
                if not assumed:
                    raise
                # timm's train.py may have given --img-size to the images alone, of a base that takes any.
                model = create_ensemble(name, **kwargs)
                model.load_state_dict(weights)
        except KeyError as error:
            raise ValueError(f'{self.argument} {self.path} is not one of {name}: it lacks {error}.') from error
        except (RuntimeError, ValueError) as error:
            # PyTorch goes on to name every tensor.
            reason = ' '.join(' '.join(str(error).splitlines()[:2]).split())
            recorded = f' It says that it is of {self.arch}.' if self.arch not in (None, name) else ''
            raise ValueError(f'{self.argument} {self.path} is not one of {name}: {reason}{recorded}') from error
        # Those of the packaged weights of the architecture are others.
        model.pretrained_cfg.update(tag=None, label_names=self.args.get('label_names'))
        return model

    def check_same_run(self, config: TrainConfig, label_names: list[str] | None = None, world_size: int = 1) -> None:
        """Check that the run can be continued by a configuration, with data of these classes if they are known.

        Phases that have not begun may be others, and a phase whose learning rate is constant may end sooner or later.

        Raises:
            ValueError: They differ in what is computed.
        """
        folder = self.path.parent
        if not self.args:
            raise ValueError(f'the run in {folder} cannot be continued, its checkpoint has no recipe.')
        before = {**asdict(TrainConfig()), **self.args}  # a key that is newer than the run had its default
        after = asdict(config)
        done, wanted = (so_far(recipe, self.epoch) for recipe in (before, after))
        changed = [
            f'{name} was {before.get(name)!r} and is {after[name]!r}'
            for name in after
            if name not in FREE_KEYS and _with_lists(done.get(name)) != _with_lists(wanted[name])
        ]
        if changed:
            raise ValueError(f'the run in {folder} cannot be continued, it differs: {"; ".join(changed)}.')
        if before.get('label_names') and label_names and before['label_names'] != label_names:
            raise ValueError(
                f'the run in {folder} cannot be continued with other classes, its own were '
                f'{", ".join(before["label_names"][:10])}, those of the data are {", ".join(label_names[:10])}.')
        if before.get('world_size', world_size) != world_size:
            raise ValueError(
                f'the run in {folder} cannot be continued by {world_size} process(es), it has {before["world_size"]}, '
                f'each with batch_size {config.batch_size}: torchrun --nproc-per-node {before["world_size"]} ...')
        if not config.in_memory and before['num_workers'] != config.num_workers:
            _logger.warning(
                f'num_workers was {before["num_workers"]} and is {config.num_workers}: images are augmented '
                'differently from what they would have been.')

    def restore(self, task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: NativeScaler | None) -> int:
        """Load weights, optimizer and loss scaler, and return the epoch that comes next."""
        return resume_task_checkpoint(task, str(self.path), optimizer, scaler)

    def restore_average(self, task: TrainingTask) -> None:
        """Load the moving average into a task that has just set it up."""
        load_task_ema_checkpoint(task, str(self.path))


class CheckpointWriter:
    """Writes the checkpoints of a run: `last.pth.tar`, and those of the last two epochs, by timm's `CheckpointSaver`.

    Args:
        folder: Output folder of the run.
        model: The ensemble.
        task: The task that trains it.
        optimizer: Its optimizer.
        scaler: Its loss scaler, if it has one.
        config: Configuration of the run.
        label_names: Names of the classes, if the data tell.
        resumed: The checkpoint that the run goes on from, if any.
        world_size: Number of processes of the run.
    """
    LAST = 'last.pth.tar'

    def __init__(
            self,
            folder: Path,
            model: HierarchicalEnsemble,
            task: TrainingTask,
            optimizer: torch.optim.Optimizer,
            scaler: NativeScaler | None,
            config: TrainConfig,
            label_names: list[str] | None,
            resumed: RunCheckpoint | None,
            world_size: int = 1,
    ):
        self.folder = folder
        self.last = folder / self.LAST
        self._saver = CheckpointSaver(
            model,
            optimizer,
            args=argparse.Namespace(**asdict(config), label_names=label_names, world_size=world_size),
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=2,
            task=task,
        )
        if resumed is not None:
            self._saver.load_state_dict_from_checkpoint(str(resumed.path))

    def save(self, epoch: int) -> None:
        """Save the state after an epoch.

        Raises:
            OSError: The file cannot be written, for instance to a full disk. The checkpoints before it are kept.
        """
        try:
            self._saver.save_checkpoint(epoch)
        except (OSError, RuntimeError) as error:
            numbered = self.folder / f'checkpoint-{epoch}.pth.tar'
            if numbered.exists() and self.last.exists() and numbered.stat().st_size != self.last.stat().st_size:
                numbered.unlink()  # a copy that was cut short
            kept = f'The last whole one is kept: {self.last}' if self.last.exists() else 'There is none before it.'
            # All that PyTorch says of a full disk is where in its own code it has found out.
            reason = 'not all of it could be written' if str(error).startswith('[enforce fail') else error
            raise OSError(
                f'checkpoint {self.last} of epoch {epoch + 1} cannot be written, with '
                f'{shutil.disk_usage(self.folder).free / 1e6:.0f} MB free: {" ".join(str(reason).split()):.200}. {kept}'
            ) from error
        finally:
            (self.folder / _UNFINISHED).unlink(missing_ok=True)  # is there only if the saver was interrupted


def load_checkpoint(
        path: str | os.PathLike,
        name: str | None = None,
        **kwargs,
) -> tuple[HierarchicalEnsemble, dict[str, Any]]:
    """Build the model of a checkpoint and load its weights, the averaged ones (EMA) if there are any.

    The sharing scheme, classes and image channels are read off the weights.

    Args:
        path: Checkpoint of this package's or timm's training, or a state dict, as a PyTorch or safetensors file.
        name: Name of the model; the one in the checkpoint if None.
        **kwargs: Arguments of the model that the checkpoint does not say, or says otherwise.

    Returns:
        The model, and the arguments of its training as far as the checkpoint has them, with `epochs` being those done.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint of this model, or is damaged.
    """
    checkpoint = RunCheckpoint.read(path)
    return checkpoint.create_model(name, **kwargs), checkpoint.config
