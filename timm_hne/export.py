"""Programs for other run-times: one ONNX or torch.export file per number of members."""
import argparse
import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import safe_model_name

from .checkpoints import create_ensemble, load_checkpoint
from .cost import resolve_input_size
from .ensemble import HierarchicalEnsemble
from .files import write_file
from .inference import check_ready, validate_schedule
from .optimize import optimize_for_inference

FORMATS = {'onnx': '.onnx', 'torch.export': '.pt2'}

# Largest difference of logits from the model's own that is accepted, relative to the largest logit.
TOLERANCE = 1e-4


def _onnx_logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _export_logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    return torch.export.load(path).module()(x)


def export(
        model: HierarchicalEnsemble,
        path: str | Path,
        num_members: int,
        format: str = 'onnx',
        input_size: Sequence[int] | None = None,
) -> Path:
    """Export the first n members as a program of their own, and check it against the model.

    The program takes images `(B, C, H, W)`, for any B, to logits `(B, num_classes)`. It holds no weight of a node that
    the n members do not use, and batch normalisation is folded.

    Args:
        model: Any `hne_*` model in single precision and evaluation mode.
        path: File to write.
        num_members: Number of members n.
        format: 'onnx' (needs onnx, onnxscript and onnxruntime) or 'torch.export'.
        input_size: Channels, height and width; the model's own if None.

    Returns:
        The path.

    Raises:
        TypeError: `num_members` is not an integer, or `model` is no `hne_*` model, or an optimised one.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        RuntimeError: The program's logits differ from the model's; no file is left then.
    """
    if not isinstance(model, HierarchicalEnsemble):
        raise TypeError(f'model must be an hne_* model, not an optimised one, got {type(model).__name__}.')
    check_ready(model)
    if format not in FORMATS:
        raise ValueError(f'format must be one of {", ".join(FORMATS)}, got {format!r}.')
    input_size = resolve_input_size(model, input_size)
    path = Path(path)
    prefix = model.extract(num_members).cpu().float()
    prefix = optimize_for_inference(prefix, compile=False, keep_memory=False).uncompiled()
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        # Of the exporter's own making.
        warnings.simplefilter('ignore', FutureWarning)
        warnings.simplefilter('ignore', DeprecationWarning)
        expected = copy.deepcopy(model).cpu().float()(images, num_members)
        program = torch.export.export(prefix, (images,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))

        def save(temporary: Path) -> None:
            if format == 'onnx':
                onnx_program = torch.onnx.export(
                    program, input_names=['images'], output_names=['logits'], dynamo=True, verbose=False)
                onnx_program.save(temporary, external_data=False)
            else:
                torch.export.save(program, temporary)
            for batch in (images, images[:1]):
                logits = (_onnx_logits if format == 'onnx' else _export_logits)(temporary, batch)
                error = ((logits - expected[:len(batch)]).abs().max() / expected.abs().max()).item()
                if not error <= TOLERANCE:
                    raise RuntimeError(
                        f'The {format} program of {num_members} members differs from the model by {error:.2e} of the '
                        f'largest logit, more than {TOLERANCE:.0e}.')

        write_file(path, save)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', help='a registered model, e.g. hne_resnet50_c16')
    parser.add_argument('--num-members', type=int, nargs='+', help='numbers of members; 1, 2, 4, ..., N by default')
    parser.add_argument('--format', choices=list(FORMATS), default='onnx')
    parser.add_argument('--output', type=Path, default=Path(), metavar='DIR', help='the working directory by default')
    parser.add_argument('--checkpoint', metavar='PATH', help='weights to export; they say nodes, classes and channels')
    parser.add_argument('--pretrained', action='store_true', help='export the pretrained weights')
    parser.add_argument('--img-size', type=int, nargs='+', metavar='PIXELS', help='height and width, or one for both')
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--in-chans', type=int)
    parser.add_argument('--nodes', type=int, nargs='+', help='nodes of each block')


def run(args: argparse.Namespace) -> None:
    """Export a model, one file per number of members."""
    kwargs = {'num_classes': args.num_classes, 'in_chans': args.in_chans, 'nodes': args.nodes}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
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
    input_size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise ValueError(f'img_size must be one or two numbers of pixels, got {args.img_size}.')
        input_size = (model.in_chans, args.img_size[0], args.img_size[-1])
    schedule = validate_schedule(args.num_members, model.ensemble_size)
    args.output.mkdir(parents=True, exist_ok=True)
    for n in schedule:
        path = args.output / f'{safe_model_name(args.name)}_{n}{FORMATS[args.format]}'
        export(model, path, n, args.format, input_size)
        print(f'{path}  {n} members, {path.stat().st_size / 1e6:.1f} MB, checked')
