"""What n members cost in time on the machine at hand, and how many fit in a budget."""
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks import check_integer, check_number
from ..evaluation.cost import member_macs, resolve_input_size
from ..files import write_text
from ..models.anytime import check_ready, validate_schedule
from ..models.ensemble import HierarchicalEnsemble
from ..process import environment
from ..tree import validate_nodes
from .optimize import OptimizedEnsemble


def _describe(model: HierarchicalEnsemble | OptimizedEnsemble) -> dict[str, Any]:
    """Return what a table says about the model that it is of."""
    plain = _plain(model)
    return {
        'model': (getattr(plain, 'pretrained_cfg', None) or {}).get('architecture') or type(plain).__name__,
        'mode': getattr(model, 'mode', 'original'),
        'nodes': tuple(model.nodes),
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
    }


def _plain(model: HierarchicalEnsemble | OptimizedEnsemble) -> HierarchicalEnsemble:
    return model.model if isinstance(model, OptimizedEnsemble) else model


def _count_macs(model: HierarchicalEnsemble | OptimizedEnsemble, img_size: tuple[int, int]) -> dict[int, int]:
    # An exported ensemble has no layers to count; it knows what it costs.
    return model.macs if hasattr(model, 'macs') else member_macs(_plain(model), img_size)


def _checked(values: dict[str, Any]) -> 'LatencyTable':
    """Return the table that a file holds; a TypeError, KeyError or ValueError says what is wrong with it."""
    for name in ('model', 'mode', 'dtype'):
        if not isinstance(values[name], str):
            raise TypeError(f'{name} must be text, got {values[name]!r}')
    place = values['environment']
    if not isinstance(place['device'], str) or not all(isinstance(value, str) for value in place.values()):
        raise TypeError(f'environment must be texts, got {place!r}')
    torch.device(place['device'])
    nodes = validate_nodes(values['nodes'])
    channels, height, width = (check_integer('input_size', size, 1) for size in values['input_size'])
    macs = {
        check_integer('num_members', int(n), 1, nodes[-1]): check_integer(f'macs[{n}]', count, 1)
        for n, count in values['macs'].items()
    }
    latency_ms = {
        check_integer('batch_size', int(size), 1): {
            int(n): check_number(f'latency_ms[{size}][{n}]', ms, 0, above=True) for n, ms in row.items()
        }
        for size, row in values['latency_ms'].items()
    }
    if not macs or not latency_ms:
        raise ValueError('it has no rows')
    if any(row.keys() != macs.keys() for row in latency_ms.values()):
        raise ValueError('its rows are not of the same numbers of members')
    return LatencyTable(
        values['model'], values['mode'], nodes, (channels, height, width), values['dtype'], place, macs, latency_ms)


@dataclass(frozen=True)
class LatencyTable:
    """Median latencies of a model on one machine.

    Attributes:
        model: Name of the architecture, or of the class if timm's `create_model` has not built the model.
        mode: What ran: 'original' is the model as it is, the others are engines, `OptimizedEnsemble.mode`.
        nodes: Number of nodes of each block of the model.
        input_size: Channels, height and width of the images.
        dtype: Type that was computed in, e.g. 'float32'.
        environment: Hardware and versions that the latencies hold for.
        macs: MACs of one image, per number of members.
        latency_ms: Milliseconds of one batch, per batch size, then per number of members.
    """
    model: str
    mode: str
    nodes: tuple[int, ...]
    input_size: tuple[int, int, int]
    dtype: str
    environment: dict[str, str]
    macs: dict[int, int]
    latency_ms: dict[int, dict[int, float]]

    @classmethod
    def measure(
            cls,
            model: HierarchicalEnsemble | OptimizedEnsemble,
            input_size: tuple[int, int, int] | None = None,
            batch_sizes: Sequence[int] = (1, 32),
            device: torch.device | str | None = None,
            num_members: Sequence[int] | None = None,
            repeats: int = 15,
    ) -> 'LatencyTable':
        """Time a model: for every batch size all numbers of members in turn, `repeats` times.

        Args:
            model: Any hierarchical ensemble in evaluation mode, what `optimize_for_inference` returned, or a
                `timm_hne.serving.ExportedEnsemble`.
            input_size: Channels, height and width; the model's own if None.
            batch_sizes: Numbers of images of a batch.
            device: Where to measure; the model is moved there. Where it is if None.
            num_members: Increasing numbers of members; 1, 2, 4, ..., N if None.
            repeats: Number of timed rounds.

        Raises:
            TypeError: An argument is of a wrong type.
            ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        """
        check_ready(model)
        num_members = validate_schedule(num_members, model.ensemble_size)
        if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Sequence):
            raise TypeError(f'batch_sizes must be a sequence of integers, got {batch_sizes!r}.')
        if not batch_sizes:
            raise ValueError(f'batch_sizes must hold at least one number, got {batch_sizes!r}.')
        batch_sizes = tuple(check_integer('batch_sizes', size, 1) for size in batch_sizes)
        check_integer('repeats', repeats, 1)
        input_size = resolve_input_size(model, input_size)
        if device is not None:
            model = model.to(device)
        weight = next(model.parameters())
        macs = _count_macs(model, input_size[1:])
        image_dtype = model.output_dtype if isinstance(model, OptimizedEnsemble) else weight.dtype
        latency_ms: dict[int, dict[int, float]] = {}
        # The largest first: what an optimised model measures, it measures with the first batches it meets.
        for batch_size in sorted(batch_sizes, reverse=True):
            x = torch.randn(batch_size, *input_size, device=weight.device, dtype=image_dtype)
            seconds: dict[int, list[float]] = {n: [] for n in num_members}
            with torch.no_grad():
                for repeat in range(-2, repeats):
                    for n in num_members:
                        begin = time.perf_counter()
                        model(x, num_members=n)
                        if weight.is_cuda:
                            torch.cuda.synchronize(weight.device)
                        if repeat >= 0:
                            seconds[n].append(time.perf_counter() - begin)
            latency_ms[batch_size] = {n: 1000 * statistics.median(times) for n, times in seconds.items()}
        described = _describe(model)
        return cls(
            **described,
            input_size=input_size,
            environment=environment(weight.device, described['mode']),
            macs={n: macs[n] for n in num_members},
            latency_ms={batch_size: latency_ms[batch_size] for batch_size in batch_sizes},
        )

    def members_for(
            self,
            latency_ms: float | None = None,
            batch_size: int = 1,
            macs: float | None = None,
            input_size: Sequence[int] | None = None,
    ) -> int:
        """Return the largest number of members that fits in a budget.

        Args:
            latency_ms: Milliseconds a batch may take.
            batch_size: Number of images of the batch. Between two that were measured the larger counts.
            macs: MACs an image may take, instead of `latency_ms`.
            input_size: Channels, height and width of the images, to make sure that the table is about such images.

        Raises:
            TypeError: The budget is not a number, or `batch_size` not an integer.
            ValueError: Not exactly one of `latency_ms` and `macs` is given, not even the fewest members fit,
                `batch_size` exceeds what was measured, or `input_size` is not the table's.
        """
        if (latency_ms is None) == (macs is None):
            raise ValueError(f'exactly one of latency_ms and macs must be given, got {latency_ms!r} and {macs!r}.')
        if input_size is not None and tuple(input_size) != self.input_size:
            raise ValueError(f'input_size must be that of the table, {self.input_size}, got {tuple(input_size)}.')
        name, budget, costs = 'macs', macs, self.macs
        if latency_ms is not None:
            check_integer('batch_size', batch_size, 1, max(self.latency_ms))
            measured = min(size for size in self.latency_ms if size >= batch_size)
            name, budget, costs = 'latency_ms', latency_ms, self.latency_ms[measured]
        check_number(name, budget, min(costs.values()))
        return max(n for n, cost in costs.items() if cost <= budget)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        write_text(path, json.dumps(vars(self), indent=2) + '\n')

    @classmethod
    def load(
            cls,
            path: str | Path,
            other_hardware: bool = False,
            model: HierarchicalEnsemble | OptimizedEnsemble | None = None,
    ) -> 'LatencyTable':
        """Read a table.

        Args:
            path: A file that `save` wrote.
            other_hardware: Accept a table that was measured on other hardware or with other versions.
            model: Model that the table is to be used with, to make sure that it is of such a model, in the same mode.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is no table, or one of other hardware or versions, or of another model.
        """
        try:
            table = _checked(json.loads(Path(path).read_text()))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f'path must be a latency table, {path} is none: {error!r}.') from error
        device = torch.device(table.environment['device'])
        if not other_hardware:
            available = device.type != 'cuda' or (device.index or 0) < torch.cuda.device_count()
            here = environment(device, table.mode) if available else {'device': 'cpu'}
            other = [key for key in {**table.environment, **here} if here.get(key) != table.environment.get(key)]
            if other:
                raise ValueError(
                    f'path must be a table of this machine unless other_hardware=True; {path} was measured with '
                    f'{({key: table.environment.get(key) for key in other})}, here it is '
                    f'{({key: here.get(key) for key in other})}.')
        if model is not None:
            found = {**_describe(model), 'input_size': (model.in_chans, *table.input_size[1:])}
            if found['mode'] == 'auto':  # not decided yet
                del found['mode']
            other = {key: value for key, value in found.items() if getattr(table, key) != value}
            if not other:  # another width, or other classes
                macs = _count_macs(model, table.input_size[1:])
                other = {} if table.macs.items() <= macs.items() else {'macs': macs}
            if other:
                raise ValueError(
                    f'path must be a table of such a model; {path} was measured with '
                    f'{({key: getattr(table, key) for key in other})}, the model has {other}.')
        return table

    def __str__(self) -> str:
        lines = [
            ', '.join(self.environment.values()),
            f'{self.model}, {self.mode}, {self.dtype}, input {self.input_size}, nodes {self.nodes}',
        ]
        sizes = ''.join(f'  {f"batch {size} [ms]":>14}  {"ratio":>6}' for size in self.latency_ms)
        lines.append(f'{"members":>7}  {"MACs":>14}  {"ratio":>6}{sizes}')
        first = min(self.macs)
        for n, macs in self.macs.items():
            cells = ''.join(f'  {row[n]:>14.2f}  {row[n] / row[first]:>6.2f}' for row in self.latency_ms.values())
            lines.append(f'{n:>7}  {macs:>14,}  {macs / self.macs[first]:>6.2f}{cells}')
        return '\n'.join(lines)
