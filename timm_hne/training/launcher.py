"""Trains hierarchical ensembles with timm's own scripts, unmodified.

`timm-hne run PATH/train.py [timm's arguments] [--hne-...]` runs a script as `python PATH/train.py` would, except that
`timm.task.ClassificationTask` creates an `HNETask` for hierarchical ensembles, and that the script's parser knows the
HNE options. Other models get timm's own task; scripts that create no task (validate.py, benchmark.py, inference.py,
onnx_export.py) run as they are.

`python PATH/train.py --device-modules timm_hne.training` does the same from inside the script. The options can then be
set in the file of `--config` only.

How it works. timm's train.py has no place to plug a task in: it imports the classes of `timm.task` by their names and
calls them. So while such a script runs, those names stand for functions that look at the model first (`_create_task`).
With `--device-modules`, the script has imported the names already when this package is imported, and they are replaced
in the script itself. Nothing is changed in a process that does neither, and nothing stays changed after the script.
"""
import argparse
import inspect
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import timm.task
import torch
import torch.nn as nn

from ..models.ensemble import HierarchicalEnsemble
from .losses import OBJECTIVES, HNELoss
from .task import HNETask, StockTaskWarning

_OPTIONS = {name: inspect.signature(HNETask).parameters[name].default for name in ('objective', 'alpha', 'temperature')}
_TASKS = {
    name: task for name in timm.task.__all__
    if inspect.isclass(task := getattr(timm.task, name)) and issubclass(task, timm.task.TrainingTask)
}
_WRONG_SCRIPT = (
    '{} does not train with timm.task.ClassificationTask, which HNETask takes the place of. Use the train.py of timm '
    f'1.0.23 or later, best that of the installed timm {timm.__version__}: '
    f'https://github.com/huggingface/pytorch-image-models/blob/v{timm.__version__}/train.py'
)


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script of timm, with `HNETask` for hierarchical ensembles.

    Args:
        path: Path of the script.
        arguments: Its command line.

    Raises:
        SystemExit: The script exits or fails, it does not fit the installed timm, or the HNE options are wrong, or are
            given for a model that is no hierarchical ensemble.
    """
    sys.argv = [path, *arguments]
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # last: beside timm's scripts there is another timm
    with _injected(), warnings.catch_warnings():
        try:
            runpy.run_path(path, run_name='__main__')
        except Exception as error:
            if isinstance(error, ImportError) and (error.name or '').partition('.')[0] == 'timm':
                raise SystemExit(
                    f'error: {path} does not fit the installed timm {timm.__version__} ({error}). Use the '
                    f'script of that version: https://github.com/huggingface/pytorch-image-models/tree/v{timm.__version__}'
                ) from error
            # Any other error of the script, or of what it calls, is reported as `python SCRIPT` would.
            traceback.print_exc()
            raise SystemExit(1) from None


@contextmanager
def _injected() -> Iterator[None]:
    """Within, a script that imports timm's tasks gets `_create_task`, and its parser gets the HNE options."""
    stock_parse = argparse.ArgumentParser.parse_known_args
    options: dict[str, Any] = {}
    replaced = {name: partial(_create_task, task, options) for name, task in _TASKS.items()}
    extended = set()

    def parse_known_args(parser, args=None, namespace=None):
        script = vars(sys.modules['__main__'])
        injected = any(value is replaced['ClassificationTask'] for value in script.values())
        # All parsers at the first call: train.py parses --config, and checks that file, before anything else.
        for candidate in (parser, *script.values()):
            if (
                    injected and isinstance(candidate, argparse.ArgumentParser)
                    and candidate.get_default('model') is not None and candidate not in extended
            ):
                _add_options(candidate)
                extended.add(candidate)
        parsed, rest = stock_parse(parser, args, namespace)
        if parser in extended:
            try:
                options.update(_read_options(parsed))
            except (TypeError, ValueError) as error:
                parser.error(str(error))
        elif 'epochs' in parsed and 'model' in parsed and (
                _is_ensemble_name(parsed.model) or any(argument.startswith('--hne-') for argument in rest)):
            parser.exit(2, f'error: {_WRONG_SCRIPT.format(sys.argv[0])}\n')
        return parsed, rest

    vars(timm.task).update(replaced)
    argparse.ArgumentParser.parse_known_args = parse_known_args
    try:
        yield
    finally:
        vars(timm.task).update(_TASKS)
        argparse.ArgumentParser.parse_known_args = stock_parse


def _add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Hierarchical neural ensembles', 'For hne_* models only.')
    group.add_argument(
        '--hne-objective', choices=OBJECTIVES,
        help=f'Training objective (default: {_OPTIONS["objective"]})')
    group.add_argument(
        '--hne-alpha', type=float, metavar='ALPHA',
        help=f'Weight of the distillation term, from 0 to 1 (default: {_OPTIONS["alpha"]})')
    group.add_argument(
        '--hne-temperature', type=float, metavar='T',
        help=f'Temperature of the soft labels (default: {_OPTIONS["temperature"]})')


def _read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the HNE options that are set. If they hold for the run, write the others into `args`, to be saved.

    Raises:
        TypeError: An option is of a wrong type.
        ValueError: An option is out of range.
    """
    given = {name: getattr(args, f'hne_{name}', None) for name in _OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ('alpha', 'temperature'):
        if isinstance(given.get(name), str):  # as YAML reads 5e-1
            given[name] = float(given[name])
    HNELoss(**given)
    plain = not getattr(args, 'kd_model_name', None) and getattr(args, 'task', 'classification') == 'classification'
    if plain and _is_ensemble_name(args.model):
        vars(args).update({f'hne_{name}': given.get(name, default) for name, default in _OPTIONS.items()})
    return given


def _is_ensemble_name(name: str) -> bool:
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('timm_hne.')


def _create_task(stock_task: Callable[..., nn.Module], options: dict[str, Any], *args, **kwargs) -> nn.Module:
    """Create a task as a script asks for it, or an `HNETask` in place of timm's `ClassificationTask` for an ensemble.

    Raises:
        SystemExit: HNE options were given, and the model or the task has no use for them.
    """
    # What is trained is the first parameter of all of timm's tasks, whatever its name.
    model = args[0] if args else kwargs.get(next(iter(inspect.signature(stock_task).parameters)))
    if isinstance(model, torch.jit.ScriptModule) and hasattr(model, 'ensemble_size'):
        raise SystemExit('error: HNETask cannot train a scripted ensemble. Use --torchcompile, not --torchscript.')
    if isinstance(model, HierarchicalEnsemble) and stock_task is _TASKS['ClassificationTask']:
        return HNETask(*args, **kwargs, **options)
    if options:
        given = ', '.join(f'--hne-{name}' for name in options)
        if isinstance(model, HierarchicalEnsemble):
            raise SystemExit(f'error: {given} cannot be used with {stock_task.__name__}, which knows no members.')
        raise SystemExit(
            f'error: {given} can be used with hierarchical ensembles (hne_* models) only, got {type(model).__name__}.')
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if isinstance(model, HierarchicalEnsemble) and is_first:
        warnings.warn(
            f"timm's {stock_task.__name__} trains {type(model).__name__} on the mean of its members alone: members "
            'are not trained on their own or distilled, and small ensembles will be poor. timm_hne.HNETask trains '
            'them all.',
            StockTaskWarning,
            stacklevel=2,
        )
    return stock_task(*args, **kwargs)


def inject_into_running_script(module: str) -> None:
    """Replace the tasks of a script whose `--device-modules` is what imports this module.

    Args:
        module: Name of the module that is being imported.
    """
    script = vars(sys.modules['__main__'])
    frame = inspect.currentframe()
    while frame is not None:
        args = frame.f_locals.get('args')
        if frame.f_globals is script and module in (getattr(args, 'device_modules', None) or ()):
            try:
                options = _read_options(args)
            except (TypeError, ValueError) as error:
                raise SystemExit(f'error: {error}') from error
            # The script has bound the names already.
            bound = {name: task for name, task in _TASKS.items() if script.get(name) is task}
            if 'ClassificationTask' in bound:
                script.update({name: partial(_create_task, task, options) for name, task in bound.items()})
            elif options or _is_ensemble_name(args.model):
                raise SystemExit(f'error: {_WRONG_SCRIPT.format(sys.argv[0])}')
            return
        frame = frame.f_back
