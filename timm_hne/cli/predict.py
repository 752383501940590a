"""`timm-hne predict`: labels with probabilities for image files, at a fixed cost or within a time budget."""
import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.data import resolve_data_config
from timm.data.readers.img_extensions import is_img_extension

from ..checks import check_integer, check_number
from ..images import load_image
from ..models.create import create_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import read_results
from ..process import keep_freed_memory
from ..training.checkpoint import CheckpointWriter, RunCheckpoint
from ..tree import prefixes, validate_num_members
from .arguments import add_model_kwargs, model_kwargs


def _open_model(name: str, **kwargs) -> tuple[HierarchicalEnsemble, Sequence[str] | None]:
    """Return a model in evaluation mode and the names of its classes, if they are known.

    Args:
        name: File of a checkpoint, folder of a run or of a published model, or what timm's `create_model` takes.
        **kwargs: Further arguments of the model.
    """
    path = Path(name)
    if (path / CheckpointWriter.LAST).is_file():
        path /= CheckpointWriter.LAST
    if path.is_file():
        checkpoint = RunCheckpoint.read(path, 'model')
        model = checkpoint.create_model(**kwargs)
        # How images were prepared in training holds here too.
        data_config = {**checkpoint.data_config, 'in_chans': model.in_chans}
        model.pretrained_cfg.update(resolve_data_config(data_config, model=model))
        return model.eval(), checkpoint.args.get('label_names')
    model = create_ensemble(f'local-dir:{path}' if path.is_dir() else name, pretrained=True, **kwargs)
    return model.eval(), model.pretrained_cfg.get('label_names')


def _load_images(paths: Sequence[str], model: HierarchicalEnsemble) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield images by their names: the files that were named, then those of the folders.

    A file that was named must be readable, which is found out before the first image is yielded. In a folder there may
    be anything; what cannot be read is named and passed over.

    Raises:
        OSError: A file that was named is no image, or a folder holds none.
    """
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    found = {folder: sorted(p for p in folder.rglob('*') if is_img_extension(p.suffix.lower())) for folder in folders}
    for folder, files in found.items():
        if not files:
            raise OSError(f'folder {folder} holds no images.')
    yield from [(path, load_image(path, model)) for path in paths if Path(path) not in found]
    for file in (file for files in found.values() for file in files):
        try:
            image = load_image(file, model)
        except OSError as error:
            print(f'timm-hne predict: {error}; it is passed over.', file=sys.stderr)
            continue
        yield str(file), image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne predict`."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file, or folder of images')
    parser.add_argument(
        '--model', default='hne_resnet50_c8', metavar='NAME',
        help='a checkpoint, the folder of a training run or of a published model, a Hub model (hf-hub:user/name) or a '
             'registered model; default: %(default)s')
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
    model, names = _open_model(args.model, **model_kwargs(args))
    model = model.to(args.device)
    labels = names or [f'class {i}' for i in range(model.num_classes)]
    results = read_results(args.model, model) or {'members': []}
    calibration = {
        row['num_members']: (row['temperature'], row['usual_confidence'])
        for row in results['members'] if 'temperature' in row}
    unusual = 0
    if args.budget_ms is None:
        num_members = model.ensemble_size if args.num_members is None else args.num_members
        schedule, deadline = (validate_num_members(num_members, model.ensemble_size),), None
    else:
        schedule, deadline = prefixes(model.ensemble_size), args.budget_ms / 1000
    warm = False
    for path, image in _load_images(args.images, model):
        # A deadline goes by the times of past steps. The first pass, a slow one, is not recorded.
        for warm_up in () if warm else (None, math.inf, math.inf):
            for _ in model.anytime(image.to(args.device), schedule, warm_up):
                pass
        warm = True
        begin = time.perf_counter()
        for num_members, logits in zip(schedule, model.anytime(image.to(args.device), schedule, deadline)):  # noqa: B007
            pass
        temperature, usual = calibration.get(num_members, (1., 0.))
        top = logits[0].float().div(temperature).softmax(dim=-1).topk(min(args.top_k, model.num_classes))
        top = [tensor.tolist() for tensor in top]  # waits for the device
        milliseconds = 1000 * (time.perf_counter() - begin)
        print(f'{path}: {num_members} member{"s" * (num_members > 1)}, {milliseconds:.1f} ms')
        for probability, label in zip(*top):
            print(f'{probability:>8.1%}  {labels[label]}')
        if top[0][0] < usual:
            unusual += 1
            print(f'          unsure: 95 % of the images that the model was evaluated on get {usual:.1%} or more')
    if unusual:
        more = f' and {len(labels) - 20} more' if len(labels) > 20 else ''
        print(
            f'timm-hne predict: {unusual} image{"s" * (unusual > 1)} may show nothing that the model knows: '
            f'{", ".join(map(str, labels[:20]))}{more}.', file=sys.stderr)
