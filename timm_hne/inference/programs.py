"""The steps of an ensemble as ONNX programs: written, checked, and kept on disk.

A program takes the tensors that it needs of the frontier, by name, to the new members' logits and to the tensors that
it adds to the frontier. 'images' are the images, `features.B` is what block B still has to see of the block before it,
and an output has the name of what it replaces behind 'next.'. Whoever goes through the steps keeps a dictionary.
"""
import hashlib
import importlib.metadata
import inspect
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from timm.layers import AvgPool2dSame, Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..files import write_file
from ..models.ensemble import HierarchicalEnsemble
from ..models.frontier import Frontier, advance, first_frontier
from ..runtime import Session
from ..version import __version__

# Largest difference from the model's own logits and features that is accepted, relative to the largest of them.
TOLERANCE = 1e-4

_SAME_PADDING = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, AvgPool2dSame, MaxPool2dSame)
_VERSIONS = ('torch', 'timm', 'onnx', 'onnxscript')
_KEPT_DAYS = 30
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """One step as an ONNX program.

    Attributes:
        data: The serialised ONNX model.
        inputs: Names of the inputs.
        new: What the outputs are, in their order: 'logits', then names of tensors of the frontier.
        frontier: Names of the tensors that the frontier has after the step.
        image_size: Height and width of the only images that it is for; None if it is for all.
    """
    data: bytes
    inputs: tuple[str, ...]
    new: tuple[str, ...]
    frontier: tuple[str, ...]
    image_size: tuple[int, int] | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return output_names(self.new)

    def describe(self) -> dict:
        """Return what is to be known of the program beside itself, for JSON."""
        return {'inputs': self.inputs, 'new': self.new, 'frontier': self.frontier, 'image_size': self.image_size}


def output_names(new: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name if name == 'logits' else f'next.{name}' for name in new)


def _named_tensors(frontier: Frontier) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for block, features in enumerate(frontier):
        leaves = [leaf for leaf in tree_leaves(features) if leaf is not None]
        for index, leaf in enumerate(leaves):
            name = f'features.{block}' if block else 'images'
            named[name if len(leaves) == 1 else f'{name}.{index}'] = leaf
    return named


class _Step(nn.Module):
    """A step from tensors to tensors."""

    def __init__(self, model: HierarchicalEnsemble, start: int, stop: int, frontier: Frontier, new: tuple[str, ...]):
        super().__init__()
        self.model, self.start, self.stop, self.new = model, start, stop, new
        leaves, self.structure = tree_flatten(frontier)
        self.present = [leaf is not None for leaf in leaves]

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # one argument: PyTorch 2.9 fails at *tensors
        remaining = iter(tensors)
        frontier = tree_unflatten([next(remaining) if present else None for present in self.present], self.structure)
        logits, frontier = advance(self.model, frontier, self.start, self.stop)
        named = {'logits': logits, **_named_tensors(frontier)}
        return tuple(named[name] for name in self.new)


@torch.no_grad()
def frontier_tensors(model: HierarchicalEnsemble, x: Tensor, members: int) -> dict[str, Tensor]:
    """Return the tensors of the frontier of images `x` after some members, by the names that programs know them by."""
    frontier = first_frontier(model, x)
    if members:
        _, frontier = advance(model, frontier, 0, members)
    return _named_tensors(frontier)


def _examples(model: HierarchicalEnsemble, start: int, stop: int, batch_size: int, image_size: tuple[int, int]):
    """Return a frontier with which the step begins, and by their names what it computes and what it leaves behind."""
    generator = torch.Generator().manual_seed(batch_size)
    frontier = first_frontier(model, torch.randn(batch_size, model.in_chans, *image_size, generator=generator))
    if start:
        _, frontier = advance(model, frontier, 0, start)
    logits, following = advance(model, frontier, start, stop)
    old, left = _named_tensors(frontier), _named_tensors(following)
    new = {'logits': logits, **{name: tensor for name, tensor in left.items() if tensor is not old.get(name)}}
    return frontier, new, tuple(left)


def make_program(model: HierarchicalEnsemble, start: int, stop: int, image_size: tuple[int, int]) -> Program:
    """Write a step as an ONNX program and check it against the model, for one image and for several.

    Its height and width are free if the exporter leaves them free and another size gives the model's results too.

    Args:
        model: Folded ensemble on a CPU, in float32.
        start: Number of members evaluated before the step.
        stop: Number of members after it.
        image_size: Height and width in pixels.

    Raises:
        RuntimeError: The exporter cannot write the step, or what it wrote computes something else.
    """
    errors = []
    # Several layers whose padding depends on the size keep the exporter busy for hours.
    fixed = any(isinstance(module, _SAME_PADDING) for module in model.modules())
    for free in (False,) if fixed else (True, False):
        try:
            program = _write(model, start, stop, image_size, free)
            _compare(program, model, start, stop, image_size, (1, 3))
            if free:
                step = max(model.reductions)
                _compare(program, model, start, stop, (image_size[0] + step, image_size[1] + 2 * step), (2,))
            return program
        except Exception as error:
            errors.append(error)
    raise RuntimeError(
        f'The step from {start} to {stop} members cannot be exported for images of {image_size} pixels: {errors[-1]}'
    ) from errors[-1]


@torch.no_grad()
def _write(model: HierarchicalEnsemble, start: int, stop: int, image_size: tuple[int, int], free: bool) -> Program:
    from onnxscript import optimizer

    frontier, new, left = _examples(model, start, stop, 3, image_size)
    named = _named_tensors(frontier)
    step = _Step(model, start, stop, frontier, tuple(new)).eval()
    shapes = tuple({0: torch.export.Dim.DYNAMIC, **(_free_axes(tensor) if free else {})} for tensor in named.values())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch's exporter warns of itself
        exported = torch.export.export(step, (tuple(named.values()),), dynamic_shapes=(shapes,))
        onnx_program = torch.onnx.export(
            exported, input_names=list(named), output_names=list(output_names(tuple(new))), dynamo=True,
            verbose=False, optimize=False)
    # The slices of the weights that the step reads become the weights: every weight is in one step then.
    optimizer.fold_constants(onnx_program.model, input_size_limit=2 ** 40, output_size_limit=2 ** 40)
    optimizer.optimize(onnx_program.model)
    proto = onnx_program.model_proto
    read = {name for node in proto.graph.node for name in node.input}
    for entry in [entry for entry in proto.graph.input if entry.name not in read]:
        proto.graph.input.remove(entry)
    program = Program(
        b'', tuple(entry.name for entry in proto.graph.input), tuple(new), left, None if free else tuple(image_size))
    proto.metadata_props.add(key='timm_hne', value=json.dumps(program.describe()))
    return replace(program, data=proto.SerializeToString())


def _free_axes(tensor: Tensor) -> dict:
    """Return the axes that may be height and width; those of one pixel are fixed anyway."""
    return {axis: torch.export.Dim.AUTO for axis in (2, 3) if tensor.dim() == 4 and tensor.shape[axis] > 1}


@torch.no_grad()
def _compare(program: Program, model, start: int, stop: int, image_size: tuple[int, int], batch_sizes) -> None:
    session = Session(program.data, 1)
    for batch_size in batch_sizes:
        frontier, new, _ = _examples(model, start, stop, batch_size, image_size)
        named = _named_tensors(frontier)
        inputs = {name: named[name].contiguous().numpy() for name in program.inputs}
        for name, found in zip(program.new, session.run(inputs)):
            expected = new[name].numpy()
            if found.shape != expected.shape:
                raise RuntimeError(f'{name} has the shape {found.shape} instead of {expected.shape}')
            error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f'{name} differs from the model by {error:.2e} of its largest value, more than {TOLERANCE:.0e}')


def _read(data: bytes) -> Program:
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load_from_string(data).metadata_props}
    values = json.loads(properties['timm_hne'])
    size = values['image_size']
    return Program(data, *(tuple(values[key]) for key in ('inputs', 'new', 'frontier')), size and tuple(size))


def cache_folder() -> Path:
    """Return where programs are kept: `$TIMM_HNE_CACHE`, or `timm_hne` in the user's cache folder."""
    given = os.environ.get('TIMM_HNE_CACHE')
    if given:
        return Path(given)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_hne'


class ProgramStore:
    """The programs of one model: from the cache on disk, or made and put there.

    The cache goes by a digest of the weights, the structure, the code of the modules and the versions of what exports.
    Programs that nobody has used for 30 days are removed. A cache that cannot be read or written is done without.

    Args:
        model: Folded ensemble on a CPU, in float32.
        make: Makes a program, as `make_program` does.
        salt: What else the programs depend on.
    """

    def __init__(
            self,
            model: HierarchicalEnsemble,
            make: Callable[[HierarchicalEnsemble, int, int, tuple[int, int]], Program] = make_program,
            salt: str = '',
    ):
        self.model = model
        self._make = make
        self._salt = salt
        self._folder: Path | None = None

    def get(self, start: int, stop: int, image_size: tuple[int, int]) -> Program:
        """Return the program of a step for images of some size, which may be for other sizes too.

        Raises:
            RuntimeError: The exporter cannot write it.
        """
        if self._folder is None:
            self._folder = cache_folder() / self.digest()
            _remove_unused(self._folder)
        names = {None: f'{start}-{stop}.onnx', image_size: f'{start}-{stop}-{image_size[0]}x{image_size[1]}.onnx'}
        for name in names.values():
            try:
                return _read((self._folder / name).read_bytes())
            except FileNotFoundError:
                pass
            except Exception as error:  # damaged: it is made anew
                _logger.warning('The program %s cannot be read and is made anew: %s', self._folder / name, error)
        with torch.inference_mode(False):
            program = self._make(self.model, start, stop, image_size)
        try:
            write_file(self._folder / names[program.image_size], lambda path: path.write_bytes(program.data))
        except OSError as error:
            _logger.info('The cache of programs cannot be written: %s', error)
        return program

    def digest(self) -> str:
        """Return the digest of all that the programs are made from."""
        found = hashlib.sha256(f'{__version__} {self._salt}\n'.encode())
        for package in _VERSIONS:
            found.update(f'{package} {importlib.metadata.version(package)}\n'.encode())
        found.update(f'{self.model}\n{self.model.nodes} {self.model.ensemble_size}\n'.encode())
        for name, module in self.model.named_modules():
            # Where a base keeps what `repr` does not show: a number of heads, a way to pool, the code of a graph.
            plain = {
                key: value for key, value in sorted(vars(module).items()) if key not in _UNUSED and _is_plain(value)}
            found.update(f'{name} {type(module).__qualname__} {plain} {getattr(module, "code", "")}\n'.encode())
        kinds = {kind for module in self.model.modules() for kind in type(module).__mro__}
        files = {path for kind in kinds if (path := _source(kind))}
        for path in (*sorted(files), __file__, inspect.getfile(advance)):
            found.update(Path(path).read_bytes())
        tensors = {**self.model.state_dict(), **dict(self.model.named_buffers())}  # those that are not stored, too
        for name, tensor in sorted(tensors.items()):
            found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            found.update(tensor.detach().contiguous().numpy().tobytes())
        return found.hexdigest()[:32]


# What programs do not depend on: how many members are evaluated if nobody says so, how gradients are computed, names.
_UNUSED = (
    '_num_members', 'grad_checkpointing', 'pretrained_cfg', 'default_cfg', '_model_args', 'pretrained_model_args')


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    return value is None or isinstance(value, (bool, int, float, str))


def _source(kind: type) -> str | None:
    try:
        return None if kind.__module__.startswith('torch.') else inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None


def _remove_unused(folder: Path) -> None:
    """Mark a folder of the cache as used, and remove the folders beside it that have not been for long."""
    try:
        if folder.exists():
            os.utime(folder)
        for other in folder.parent.iterdir():
            # Only folders that are named as ours are: the cache may be a folder that others use too.
            ours = re.fullmatch('[0-9a-f]{32}', other.name) and other.is_dir()
            if ours and other.stat().st_mtime < time.time() - 86400 * _KEPT_DAYS:
                for path in other.glob('*.onnx'):
                    path.unlink()
                with suppress(OSError):  # it holds something else
                    other.rmdir()
    except OSError:
        pass
