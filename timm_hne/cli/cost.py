"""`timm-hne cost`: what n members cost in MACs and parameters."""
import argparse
import logging

from ..evaluation.cost import cost_table
from ..models.create import create_ensemble
from ..tree import prefixes
from .arguments import add_model_arguments, input_size, model_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne cost`."""
    add_model_arguments(parser)
    parser.add_argument('--all', action='store_true', help='every number of members, not only the powers of two')


def run(args: argparse.Namespace) -> None:
    """Print the cost table of a model."""
    model = create_ensemble(args.name, device='meta', **model_kwargs(args))
    _, *img_size = input_size(args, model)
    logging.getLogger('fvcore').setLevel(logging.ERROR)

    print(f'{args.name}: nodes {model.nodes}, {model.num_classes} classes, {img_size[0]}x{img_size[1]} pixels')
    print(f'{"members":>7}  {"MACs":>14}  {"parameters":>12}  {"of n networks":>13}  {"Eq. 8":>6}')
    for row in cost_table(model, tuple(img_size)):
        if args.all or row.num_members in prefixes(model.ensemble_size):
            print(
                f'{row.num_members:>7}  {row.macs:>14,}  {row.params:>12,}  {row.ratio:>13.1%}  '
                f'{row.predicted_ratio:>6.1%}')
