"""Labels with probabilities for image files, with as many members as asked for or as a time budget allows."""
import argparse
import math
import time
from os import PathLike

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

from .checkpoints import create_ensemble
from .ensemble import HierarchicalEnsemble
from .tree import prefixes, validate_num_members

__all__ = ['load_image']


def load_image(path: str | PathLike, model: HierarchicalEnsemble) -> torch.Tensor:
    """Read an image, turn it upright, and prepare it as the configuration of a model says.

    Args:
        path: File in any format that Pillow reads, with 8 or 16 bits a channel.
        model: Model that timm's `create_model` has built.

    Returns:
        Normalised image (1, C, H, W).

    Raises:
        OSError: The file is missing, or no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith('I;16'):  # Pillow would clip 16 bits to 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ('I', 'F'):
                raise ValueError(f'nothing says which of its values is white (mode {image.mode})')
            image = image.convert('L' if model.in_chans == 1 else 'RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # whatever the decoders raise
        raise OSError(f'image {path} cannot be read: {error}') from error
    return create_transform(**resolve_model_data_config(model))(image).unsqueeze(0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne predict`."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file')
    parser.add_argument(
        '--model', default='hne_resnet50_c8', metavar='NAME',
        help='a registered model, a Hub model (hf-hub:user/name) or a published folder (local-dir:FOLDER); default: '
             '%(default)s')
    cost = parser.add_mutually_exclusive_group()
    cost.add_argument('--num-members', type=int, metavar='n', help='number of members (default: all)')
    cost.add_argument(
        '--budget-ms', type=float, metavar='t',
        help='milliseconds that the network may take for an image; as many members as fit, at least one')
    parser.add_argument('--top-k', type=int, default=5, metavar='k', help='labels to print (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def run(args: argparse.Namespace) -> None:
    """Print the most probable labels of every image.

    Raises:
        OSError: An image or the weights cannot be read.
        ValueError: An argument is out of range.
        RuntimeError: The model has no pretrained weights.
    """
    if args.top_k < 1:
        raise ValueError(f'top_k must be at least 1, got {args.top_k}.')
    if args.budget_ms is not None and not 0 < args.budget_ms < math.inf:
        raise ValueError(f'budget_ms must be positive and finite, got {args.budget_ms}.')
    model = create_ensemble(args.model, pretrained=True).to(args.device).eval()
    labels = model.pretrained_cfg.get('label_names') or [f'class {i}' for i in range(model.num_classes)]
    if args.budget_ms is None:
        num_members = model.ensemble_size if args.num_members is None else args.num_members
        schedule, deadline = (validate_num_members(num_members, model.ensemble_size),), None
    else:
        schedule, deadline = prefixes(model.ensemble_size), args.budget_ms / 1000
    images = [load_image(path, model) for path in args.images]

    # A deadline goes by the times of past steps. The first pass, a slow one, is not recorded.
    for warm_up in (None, math.inf, math.inf):
        for _ in model.anytime(images[0].to(args.device), schedule, warm_up):
            pass
    for path, image in zip(args.images, images):
        begin = time.perf_counter()
        for num_members, logits in zip(schedule, model.anytime(image.to(args.device), schedule, deadline)):  # noqa: B007
            pass
        top = logits[0].float().softmax(dim=-1).topk(min(args.top_k, model.num_classes))
        top = [tensor.tolist() for tensor in top]  # waits for the device
        milliseconds = 1000 * (time.perf_counter() - begin)
        print(f'{path}: {num_members} member{"s" * (num_members > 1)}, {milliseconds:.1f} ms')
        for probability, label in zip(*top):
            print(f'{probability:>8.1%}  {labels[label]}')
