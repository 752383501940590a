#!/usr/bin/env python3
"""Train a hierarchical neural ensemble by a recipe.

    python train_scripts/train.py --recipe cifar10_short.yaml --data-dir DATA --objective independent --epochs 3
    torchrun --nproc-per-node 3 train_scripts/train.py --recipe imagenet.yaml --data-dir DATA

A recipe is a YAML file of keys, see timm_hne/recipe.py; each key is also an option here, which overrides the recipe.
"""
import argparse
import logging
from dataclasses import fields
from pathlib import Path

import yaml

from timm_hne.recipe import TrainConfig
from timm_hne.trainer import train

RECIPES = Path(__file__).parent / 'recipes'


def read_recipe(name: str, folder: Path = RECIPES) -> dict:
    """Read a recipe from a path, or by its name in `train_scripts/recipes`.

    The key `base` names another recipe, beside it, whose keys it takes over.

    Raises:
        FileNotFoundError: There is no such recipe; the message lists those that there are.
        ValueError: The file holds no keys.
    """
    path = next((path for path in (Path(name), folder / name) if path.is_file()), None)
    if path is None:
        known = ', '.join(sorted(path.name for path in RECIPES.glob('*.yaml')))
        raise FileNotFoundError(f'there is no recipe {name!r}; {RECIPES} has {known}.')
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, dict):
        raise ValueError(f'recipe {path} must hold keys and values.')
    base = recipe.pop('base', None)
    return {**(read_recipe(base, path.parent) if base else {}), **recipe}


def parse_args(arguments: list[str] | None = None) -> TrainConfig:
    """Merge the recipe and the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', default='', help='a YAML file, or the name of one in train_scripts/recipes')
    for key in fields(TrainConfig):
        option = '--' + key.name.replace('_', '-')
        if key.type is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif key.type is str:
            parser.add_argument(option, default=argparse.SUPPRESS)
        else:
            parser.add_argument(option, type=yaml.safe_load, default=argparse.SUPPRESS, metavar='YAML')
    options = vars(parser.parse_args(arguments))
    recipe = options.pop('recipe')
    return TrainConfig.from_dict({**(read_recipe(recipe) if recipe else {}), **options})


def main() -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    result = train(parse_args())
    print(f'checkpoint {result.checkpoint}, log {result.summary}')


if __name__ == '__main__':
    main()
