"""What n members cost in time on the machine at hand, and how many fit in a budget."""
import argparse
import json
import math
import numbers
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import safe_model_name

from .checkpoints import create_ensemble
from .cost import member_macs, resolve_input_size
from .ensemble import HierarchicalEnsemble
from .files import write_text
from .inference import check_ready, validate_schedule
from .optimize import OptimizedEnsemble, optimize_for_inference
from .version import __version__


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


def environment(device: torch.device) -> dict[str, str]:
    """Describe what latencies depend on: the hardware and the versions."""
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f'{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
    return {'device': device.type, 'hardware': hardware, 'torch': torch.__version__, 'timm_hne': __version__}


def _describe(model: HierarchicalEnsemble | OptimizedEnsemble) -> dict[str, Any]:
    """Return what a table says about the model that it is of."""
    plain, mode = model, 'original'
    if isinstance(model, OptimizedEnsemble):
        plain, mode = model.model, 'compiled' if model.compile_programs else 'folded'
    return {
        'model': (getattr(plain, 'pretrained_cfg', None) or {}).get('architecture') or type(plain).__name__,
        'mode': mode,
        'nodes': tuple(model.nodes),
        'dtype': str(next(model.parameters()).dtype).removeprefix('torch.'),
    }


def _plain(model: HierarchicalEnsemble | OptimizedEnsemble) -> HierarchicalEnsemble:
    return model.uncompiled() if isinstance(model, OptimizedEnsemble) else model


def _positive(number: float, kind: type) -> float:
    if isinstance(number, bool) or not isinstance(number, kind) or not 0 < number < math.inf:
        raise ValueError(f'{number!r} is not a positive number')
    return number


@dataclass(frozen=True)
class LatencyTable:
    """Median latencies of a model on one machine.

    Attributes:
        model: Name of the architecture, or of the class if timm's `create_model` has not built the model.
        mode: 'original' for the model as it is, 'compiled' for what `optimize_for_inference` returned, 'folded' for
            that without compilation.
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
            model: Any `hne_*` model in evaluation mode, or what `optimize_for_inference` returned.
            input_size: Channels, height and width; the model's own if None.
            batch_sizes: Numbers of images of a batch.
            device: Where to measure; the model is moved there. Where it is if None.
            num_members: Increasing numbers of members; 1, 2, 4, ..., N if None.
            repeats: Number of timed rounds.

        Raises:
            TypeError: `num_members`, `batch_sizes` or `input_size` is not a sequence of integers.
            ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        """
        check_ready(model)
        num_members = validate_schedule(num_members, model.ensemble_size)
        if not isinstance(batch_sizes, Sequence):
            raise TypeError(f'batch_sizes must be a sequence of integers, got {batch_sizes!r}.')
        batch_sizes = tuple(batch_sizes)
        if not batch_sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in batch_sizes):
            raise ValueError(f'batch_sizes must be positive integers, at least one, got {batch_sizes}.')
        if repeats < 1:
            raise ValueError(f'repeats must be at least 1, got {repeats}.')
        input_size = resolve_input_size(model, input_size)
        if device is not None:
            model = model.to(device)
        weight = next(model.parameters())
        macs = member_macs(_plain(model), input_size[1:])
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
        return cls(
            **_describe(model),
            input_size=input_size,
            environment=environment(weight.device),
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
            TypeError: The budget is not a number.
            ValueError: Not exactly one of `latency_ms` and `macs` is given, not even the fewest members fit,
                `batch_size` exceeds what was measured, or `input_size` is not the table's.
        """
        if (latency_ms is None) == (macs is None):
            raise ValueError(f'exactly one of latency_ms and macs must be given, got {latency_ms!r} and {macs!r}.')
        if input_size is not None and tuple(input_size) != self.input_size:
            raise ValueError(f'input_size must be that of the table, {self.input_size}, got {tuple(input_size)}.')
        for name, budget in (('latency_ms', latency_ms), ('macs', macs)):
            if budget is not None and (isinstance(budget, bool) or not isinstance(budget, numbers.Real)):
                raise TypeError(f'{name} must be a number, got {budget!r}.')
        name, budget, costs = 'macs', macs, self.macs
        if latency_ms is not None:
            measured = [size for size in self.latency_ms if size >= batch_size]
            if batch_size < 1 or not measured:
                raise ValueError(f'batch_size must be from 1 to {max(self.latency_ms)}, got {batch_size}.')
            name, budget, costs = 'latency_ms', latency_ms, self.latency_ms[min(measured)]
        fitting = [n for n, cost in costs.items() if cost <= budget]
        if not fitting:
            raise ValueError(f'{name} must be at least {min(costs.values()):.6g}, got {budget}.')
        return max(fitting)

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
            values: dict[str, Any] = json.loads(Path(path).read_text())
            table = cls(
                model=values['model'],
                mode=values['mode'],
                nodes=tuple(values['nodes']),
                input_size=tuple(values['input_size']),
                dtype=values['dtype'],
                environment=dict(values['environment']),
                macs={int(n): _positive(macs, int) for n, macs in values['macs'].items()},
                latency_ms={
                    int(size): {int(n): _positive(ms, numbers.Real) for n, ms in row.items()}
                    for size, row in values['latency_ms'].items()
                },
            )
            if not table.macs or not table.latency_ms:
                raise ValueError('it has no rows')
            if any(row.keys() != table.macs.keys() for row in table.latency_ms.values()):
                raise ValueError('its rows are not of the same numbers of members')
            device = torch.device(table.environment['device'])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f'path must be a latency table, {path} is none: {error!r}.') from error
        if not other_hardware:
            available = device.type == 'cpu' or torch.cuda.is_available()
            here = environment(device) if available else {'device': 'cpu'}
            other = [key for key in {**table.environment, **here} if here.get(key) != table.environment.get(key)]
            if other:
                raise ValueError(
                    f'path must be a table of this machine unless other_hardware=True; {path} was measured with '
                    f'{({key: table.environment.get(key) for key in other})}, here it is '
                    f'{({key: here.get(key) for key in other})}.')
        if model is not None:
            found = {**_describe(model), 'input_size': (model.in_chans, *table.input_size[1:])}
            other = {key: value for key, value in found.items() if getattr(table, key) != value}
            if not other:  # another width, or other classes
                macs = member_macs(_plain(model), table.input_size[1:])
                other = {'macs': macs} if any(macs[n] != table.macs[n] for n in table.macs) else {}
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', help='a registered model, e.g. hne_resnet50_c16')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='height and width, or one for both')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--nodes', type=int, nargs='+', help='nodes of each block')
    parser.add_argument('--num-members', type=int, nargs='+', help='numbers of members; 1, 2, 4, ..., N by default')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32')
    parser.add_argument('--mode', choices=['compiled', 'folded', 'original'], default='compiled',
                        help='optimised and compiled; optimised only; or the model as it is')
    parser.add_argument('--output', metavar='PATH', help='NAME-latency.json by default')


def run(args: argparse.Namespace) -> None:
    """Measure a latency table, print it and save it."""
    kwargs = {'num_classes': args.num_classes, 'nodes': args.nodes}
    model = create_ensemble(args.name, **{key: value for key, value in kwargs.items() if value is not None}).eval()
    input_size = model.pretrained_cfg['input_size']
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise ValueError(f'img_size must be one or two numbers of pixels, got {args.img_size}.')
        input_size = (model.in_chans, args.img_size[0], args.img_size[-1])
    dtype = getattr(torch, args.dtype)
    model = model.to(args.device)
    if args.mode == 'original':
        model = model.to(dtype)
    else:
        model = optimize_for_inference(model, compile=args.mode == 'compiled', dtype=dtype)
    output = Path(args.output or f'{safe_model_name(args.name)}-latency.json')
    output.parent.mkdir(parents=True, exist_ok=True)
    table = LatencyTable.measure(
        model, input_size, args.batch_size, num_members=args.num_members, repeats=args.repeats)
    print(table)
    table.save(output)
    print(f'saved to {output}')
