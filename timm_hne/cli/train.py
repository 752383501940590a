"""`timm-hne train`: train an ensemble by a recipe.

    timm-hne train --recipe cifar10_short.yaml --data-dir DATA --objective independent --epochs 3
    torchrun --nproc-per-node 3 -m timm_hne train --recipe imagenet.yaml --data-dir DATA

A recipe is a YAML file of keys, see timm_hne/training/recipe.py; each key is also an option here, which overrides the
recipe, but not what its phases have of their own.
"""
import argparse
import logging
from dataclasses import fields
from typing import Any, get_args

import yaml

from ..training.recipe import TrainConfig, read_recipe
from ..training.trainer import train
from .arguments import add_model_kwargs

_logger = logging.getLogger(__name__)


def _read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not YAML: {" ".join(str(error).split())}') from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne train`: a recipe, and its keys."""
    parser.add_argument('--recipe', default='', help='a YAML file, or the name of one in timm_hne/recipes')
    for key in fields(TrainConfig):
        option = '--' + key.name.replace('_', '-')
        if key.name == 'model_kwargs':
            add_model_kwargs(parser, argparse.SUPPRESS)
        elif key.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif str in (key.type, *get_args(key.type)):
            parser.add_argument(option, default=argparse.SUPPRESS)
        else:
            parser.add_argument(option, type=_read_value, default=argparse.SUPPRESS, metavar='YAML')


def read_config(args: argparse.Namespace) -> TrainConfig:
    """Merge the recipe and the options of the command line.

    Raises:
        OSError: There is no such recipe, or it cannot be read.
        TypeError: A value has the wrong type.
        ValueError: A recipe, a key or a value is wrong.
    """
    options = {key.name: getattr(args, key.name) for key in fields(TrainConfig) if hasattr(args, key.name)}
    recipe = read_recipe(args.recipe) if args.recipe else {}
    if 'model_kwargs' in options:  # adds to those of the recipe, as those of a phase do
        options['model_kwargs'] = {**(recipe.get('model_kwargs') or {}), **options['model_kwargs']}
    config = TrainConfig.from_dict({**recipe, **options})
    for name in options:
        numbers = [str(number) for number, phase in enumerate(config.phases, start=1) if name in phase]
        if numbers and name != 'model_kwargs':
            _logger.warning(f'{name} of the command line is not that of phase {", ".join(numbers)}, which has its own.')
    return config


def run(args: argparse.Namespace) -> None:
    """Train."""
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    # It lists the checkpoints by a metric that ours are not kept by, hence None.
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    result = train(read_config(args), keep_memory=True)
    print(f'checkpoint {result.checkpoint}, log {result.summary}')
