#!/usr/bin/env python3
"""Train a hierarchical neural ensemble by a recipe.

    python train_scripts/train.py --recipe cifar10_short.yaml --data-dir DATA --objective independent --epochs 3
    torchrun --nproc-per-node 3 train_scripts/train.py --recipe imagenet.yaml --data-dir DATA

A recipe is a YAML file of keys, see timm_hne/recipe.py; each key is also an option here, which overrides the recipe.
"""
import argparse
import difflib
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from timm_hne.recipe import TrainConfig
from timm_hne.trainer import train

RECIPES = Path(__file__).parent / 'recipes'


def read_recipe(name: str, folder: Path = RECIPES, above: tuple[Path, ...] = ()) -> dict:
    """Read a recipe from a path, or by its name in `train_scripts/recipes`.

    The key `base` names another recipe, beside it, whose keys it takes over; `above` are the recipes that led here.

    Raises:
        FileNotFoundError: There is no such recipe; the message lists those that there are.
        ValueError: The file holds no keys, or a recipe is its own base.
    """
    path = next((path for path in (Path(name), folder / name) if path.is_file()), None)
    if path is None:
        known = ', '.join(sorted(path.name for path in RECIPES.glob('*.yaml')))
        raise FileNotFoundError(f'there is no recipe {name!r}; {RECIPES} has {known}.')
    above = *above, path.resolve()
    if above[-1] in above[:-1]:
        raise ValueError(f'recipe {path} is its own base: {" -> ".join(step.name for step in above)}.')
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
    except yaml.YAMLError as error:
        raise ValueError(f'recipe {path} is not YAML: {_one_line(error)}') from error
    if not isinstance(recipe, dict):
        raise ValueError(f'recipe {path} must hold keys and values.')
    base = recipe.pop('base', None)
    return {**(read_recipe(base, path.parent, above) if base else {}), **recipe}


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())


def _read_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not YAML: {_one_line(error)}') from error


def parse_args(arguments: list[str] | None = None) -> TrainConfig:
    """Merge the recipe and the options of the command line.

    Raises:
        OSError: There is no such recipe, or it cannot be read.
        TypeError: A value has the wrong type.
        ValueError: A recipe, a key or a value is wrong.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', default='', help='a YAML file, or the name of one in train_scripts/recipes')
    for key in fields(TrainConfig):
        option = '--' + key.name.replace('_', '-')
        if key.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif str in (key.type, *get_args(key.type)):
            parser.add_argument(option, default=argparse.SUPPRESS)
        else:
            parser.add_argument(option, type=_read_value, default=argparse.SUPPRESS, metavar='YAML')
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = ['--recipe', *('--' + key.name.replace('_', '-') for key in fields(TrainConfig))]
        nearest = difflib.get_close_matches(unknown[0].partition('=')[0], options, n=1, cutoff=0.)[0]
        parser.error(f'unknown argument {unknown[0]!r}, did you mean {nearest!r}?')
    options = vars(known)
    recipe = options.pop('recipe')
    return TrainConfig.from_dict({**(read_recipe(recipe) if recipe else {}), **options})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        result = train(parse_args())
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f'train.py: {_one_line(error)}')
    except KeyboardInterrupt:
        print('train.py: interrupted', file=sys.stderr)
        sys.exit(130)
    print(f'checkpoint {result.checkpoint}, log {result.summary}')


if __name__ == '__main__':
    main()
