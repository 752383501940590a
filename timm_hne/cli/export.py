"""`timm-hne export`: one ONNX or torch.export program per number of members."""
import argparse
from pathlib import Path

from timm.models import safe_model_name

from ..inference.export import FORMATS, export
from ..models.anytime import validate_schedule
from ..models.create import create_ensemble
from ..training.checkpoint import load_checkpoint
from .arguments import add_model_arguments, input_size, model_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, in_chans=True)
    parser.add_argument('--num-members', type=int, nargs='+', help='numbers of members; 1, 2, 4, ..., N by default')
    parser.add_argument('--format', choices=list(FORMATS), default='onnx')
    parser.add_argument('--output', type=Path, default=Path(), metavar='DIR', help='the working directory by default')
    parser.add_argument('--checkpoint', metavar='PATH', help='weights to export; they say nodes, classes and channels')
    parser.add_argument('--pretrained', action='store_true', help='export the pretrained weights')


def run(args: argparse.Namespace) -> None:
    """Export a model, one file per number of members."""
    kwargs = model_kwargs(args)
    if args.checkpoint is None:
        model = create_ensemble(args.name, pretrained=args.pretrained, **kwargs)
    elif args.pretrained:
        raise ValueError('only one of --checkpoint and --pretrained may be given.')
    else:
        model, _ = load_checkpoint(args.checkpoint, args.name)
        for key, value in kwargs.items():
            found = getattr(model, key)
            if found != (tuple(value) if key == 'nodes' else value):
                raise ValueError(f'{key} must be that of the checkpoint, {found}, or left out, got {value}.')
    model.eval()
    image_size = input_size(args, model)
    schedule = validate_schedule(args.num_members, model.ensemble_size)
    args.output.mkdir(parents=True, exist_ok=True)
    for n in schedule:
        path = args.output / f'{safe_model_name(args.name)}_{n}{FORMATS[args.format]}'
        export(model, path, n, args.format, image_size)
        print(f'{path}  {n} members, {path.stat().st_size / 1e6:.1f} MB, checked')
