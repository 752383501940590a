"""Arguments that several commands share."""
import argparse

import yaml
from timm.utils import ParseKwargs

from ..checks import check_integer
from ..models.ensemble import HierarchicalEnsemble


def add_model_arguments(parser: argparse.ArgumentParser, in_chans: bool = False) -> None:
    """Add the name of a model and the arguments that it is built with."""
    parser.add_argument('name', help='a registered model, e.g. hne_resnet50_c16')
    parser.add_argument('--base', metavar='NAME', help='timm model whose stages hne_from_timm is made of')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--nodes', type=int, nargs='+', help='nodes of each block, for another tree')
    if in_chans:
        parser.add_argument('--in-chans', type=int)
    add_model_kwargs(parser)
    add_img_size(parser)


class _Arguments(ParseKwargs):
    """Reads NAME=VALUE ... as timm's scripts do, or a YAML mapping."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) == 1 and values[0].startswith('{'):
            try:
                setattr(namespace, self.dest, yaml.safe_load(values[0]))
            except yaml.YAMLError as error:
                parser.error(f'argument {option_string}: {values[0]!r} is not YAML: {" ".join(str(error).split())}')
            return
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes NAME=VALUE, such as base=resnet50 nodes=1,1,2,4,8, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_model_kwargs(parser: argparse.ArgumentParser, default: object = None) -> None:
    """Add `--model-kwargs NAME=VALUE ...`, which holds any argument of a model."""
    parser.add_argument(
        '--model-kwargs', nargs='*', default=default, action=_Arguments, metavar='NAME=VALUE',
        help='further arguments of the model, e.g. base=resnet50 nodes=1,1,2,4,8, or one YAML mapping')


def model_kwargs(args: argparse.Namespace) -> dict:
    """Return the arguments of the model that were given."""
    given = {name: getattr(args, name, None) for name in ('base', 'num_classes', 'nodes', 'in_chans')}
    kwargs = {**(args.model_kwargs or {}), **{name: value for name, value in given.items() if value is not None}}
    name = getattr(args, 'name', None) or getattr(args, 'model', None)
    # Some bases are built for a size; weights are of one already.
    if name == 'hne_from_timm' and getattr(args, 'img_size', None) and not getattr(args, 'checkpoint', None):
        kwargs.setdefault('img_size', (args.img_size[0], args.img_size[-1]))
    return kwargs


def add_img_size(parser: argparse.ArgumentParser, default: str = "the model's own") -> None:
    """Add `--img-size`; `default` says what holds without it."""
    parser.add_argument(
        '--img-size', type=int, nargs='+', metavar='PIXELS',
        help=f'height and width of the images, or one number for both (default: {default})')


def input_size(args: argparse.Namespace, model: HierarchicalEnsemble) -> tuple[int, int, int]:
    """Return the channels, height and width of images: those of `--img-size`, or the model's own.

    Raises:
        ValueError: `--img-size` is not one or two positive numbers.
    """
    sizes = model.pretrained_cfg['input_size'][1:] if args.img_size is None else args.img_size
    if len(sizes) > 2:
        raise ValueError(f'img_size must be one or two numbers of pixels, got {sizes}.')
    for size in sizes:
        check_integer('img_size', size, 1)
    return model.in_chans, sizes[0], sizes[-1]
