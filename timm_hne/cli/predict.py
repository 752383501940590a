"""`timm-hne predict`: labels with probabilities for image files, at a fixed cost or within a time budget."""
import argparse
import math
import time

import torch

from ..checks import check_integer, check_number
from ..images import load_image
from ..models.create import create_ensemble
from ..process import keep_freed_memory
from ..tree import prefixes, validate_num_members
from .arguments import add_model_kwargs, model_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne predict`."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file')
    parser.add_argument(
        '--model', default='hne_resnet50_c8', metavar='NAME',
        help='a registered model, a Hub model (hf-hub:user/name) or a published folder (local-dir:FOLDER); default: '
             '%(default)s')
    add_model_kwargs(parser)
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
    check_integer('top_k', args.top_k, 1)
    if args.budget_ms is not None:
        check_number('budget_ms', args.budget_ms, 0, above=True)
    if torch.device(args.device).type == 'cpu':
        keep_freed_memory()
    model = create_ensemble(args.model, pretrained=True, **model_kwargs(args)).to(args.device).eval()
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
