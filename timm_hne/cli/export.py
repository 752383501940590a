"""`timm-hne export`: a folder that runs without PyTorch, or one program per number of members."""
import argparse
from pathlib import Path

from timm.models import safe_model_name

from ..inference.deploy import export_folder
from ..inference.early_exit import CRITERIA, ExitPoint
from ..inference.export import FORMATS, export
from ..inference.latency import LatencyTable
from ..models.anytime import validate_schedule
from ..models.create import create_ensemble
from ..training.checkpoint import RunCheckpoint
from .arguments import add_model_arguments, input_size, model_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, in_chans=True)
    parser.add_argument('--num-members', type=int, nargs='+',
                        help='numbers of members; 1, 2, 4, ..., N by default. Weights of later members are left out')
    parser.add_argument('--format', choices=['folder', *FORMATS], default='folder',
                        help='a folder for timm_hne.runtime, or one file per number of members for other software')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='NAME by default; the working directory for single files')
    parser.add_argument('--checkpoint', metavar='PATH',
                        help='weights to export; they say nodes, classes, channels and image size')
    parser.add_argument('--pretrained', action=argparse.BooleanOptionalAction,
                        help='export the pretrained weights, the default without a checkpoint, or random ones')
    for name in ('mean', 'std'):
        parser.add_argument(f'--{name}', type=float, nargs='+', help=f"{name} of the channels of images")
    parser.add_argument('--threshold', type=float, help='threshold of early exit to recommend in the manifest')
    parser.add_argument('--criterion', choices=CRITERIA, default='confidence', help='criterion that it is of')
    parser.add_argument('--latency-table', metavar='PATH', help='latencies for the manifest, from timm-hne bench')


def run(args: argparse.Namespace) -> None:
    """Export a model."""
    kwargs, data_config = model_kwargs(args), {}
    if args.checkpoint is None:
        pretrained = args.pretrained is not False
        model = create_ensemble(args.name, pretrained=pretrained, **kwargs)
        if not pretrained:  # then they are not those of the tag
            model.pretrained_cfg['tag'] = None
    elif args.pretrained:
        raise ValueError('only one of --checkpoint and --pretrained may be given.')
    else:
        checkpoint = RunCheckpoint.read(args.checkpoint)
        sizes = {key: kwargs.pop(key) for key in ('nodes', 'num_classes', 'in_chans') if key in kwargs}
        model, data_config = checkpoint.create_model(args.name, **kwargs), checkpoint.data_config
        for key, value in sizes.items():
            found = getattr(model, key)
            if found != (tuple(value) if key == 'nodes' else value):
                raise ValueError(f'{key} must be that of the checkpoint, {found}, or left out, got {value}.')
    model.eval()
    if args.img_size is None and (size := trained_size(data_config)) is not None:
        args.img_size = size
    image_size = input_size(args, model)
    if args.format != 'folder':
        if any(getattr(args, name) is not None for name in ('mean', 'std', 'threshold', 'latency_table')):
            raise ValueError(
                f'mean, std, threshold and latency_table are for the manifest of a folder, got format {args.format!r}.')
        _export_files(args, model, image_size)
        return
    schedule = validate_schedule(args.num_members, model.ensemble_size)
    if schedule[-1] < model.ensemble_size:
        model = model.extract(schedule[-1])
    data_config |= {name: value for name in ('mean', 'std') if (value := getattr(args, name)) is not None}
    output = args.output or Path(safe_model_name(args.name))
    manifest = export_folder(
        model, output, image_size, schedule, data_config,
        None if args.threshold is None else ExitPoint(args.threshold, None, None, None),
        args.criterion,
        None if args.latency_table is None else LatencyTable.load(args.latency_table, other_hardware=True),
    )
    image = manifest['image']
    size = f'{image["height"]}x{image["width"]} pixels' + (' or any other size' if image['any_size'] else ' only')
    megabytes = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    print(f'{output}  {manifest["ensemble_size"]} members in {len(manifest["steps"])} steps, images of {size}, '
          f'{megabytes:.1f} MB, checked')


def trained_size(data_config: dict) -> list[int] | None:
    """Return the height and width of a checkpoint's images, as far as it says."""
    if data_config.get('input_size'):
        return list(data_config['input_size'][1:])
    size = data_config.get('img_size')
    return None if size is None else [size] if isinstance(size, int) else list(size)


def _export_files(args: argparse.Namespace, model, image_size: tuple[int, int, int]) -> None:
    schedule = validate_schedule(args.num_members, model.ensemble_size)
    output = args.output or Path()
    output.mkdir(parents=True, exist_ok=True)
    for n in schedule:
        path = output / f'{safe_model_name(args.name)}_{n}{FORMATS[args.format]}'
        export(model, path, n, args.format, image_size)
        print(f'{path}  {n} members, images of {image_size[1]}x{image_size[2]} pixels, '
              f'{path.stat().st_size / 1e6:.1f} MB, checked')
