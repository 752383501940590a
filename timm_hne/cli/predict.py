"""`timm-hne predict`: labels with probabilities for images, at a fixed cost or within a time budget, or as a table."""
import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..checks import check_integer, check_number
from ..files import printable
from ..images import find_images
from ..inference.engines import ENGINES
from ..process import keep_freed_memory
from ..serving.bulk import Bulk, local_rows, predict_folder, ray_rows
from ..serving.classifier import Classifier, ImageError
from ..tree import validate_num_members
from .arguments import add_model_kwargs, model_kwargs


def load_images(paths: Sequence[str], classifier: Classifier) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield images by their names: the files that were named, then those of the folders.

    A file that was named must be readable, which is found out before the first image is yielded. In a folder there may
    be anything; what cannot be read is named and passed over.

    Raises:
        OSError, ImageError: A file that was named is no image, or a folder holds none.
    """
    folders = [Path(path) for path in paths if Path(path).is_dir()]
    found = {folder: find_images(folder) for folder in folders}
    named = [path for path in paths if Path(path) not in found]
    once = {path: classifier.image(path) for path in named if not Path(path).is_file()}  # what comes through a pipe
    if len(named) > 1:  # read again later: all at once would need the memory
        for path in named:
            if path not in once:
                classifier.image(path)
    for path in named:
        yield path, once[path] if path in once else classifier.image(path)
    for file in (file for files in found.values() for file in files):
        try:
            image = classifier.image(file)
        except (OSError, ImageError) as error:
            print(f'timm-hne predict: {error}; it is passed over.', file=sys.stderr)
            continue
        yield str(file), image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne predict`."""
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image file, or folder of images')
    parser.add_argument(
        '--model', default='hne_mobilenetv2_075_e8', metavar='NAME',
        help='a checkpoint, the folder of a training run, of a published or of an exported model, a Hub model '
             '(hf-hub:user/name) or a registered model; default: %(default)s')
    add_model_kwargs(parser)
    cost = parser.add_mutually_exclusive_group()
    cost.add_argument('--num-members', type=int, metavar='n', help='number of members (default: all)')
    cost.add_argument(
        '--budget-ms', type=float, metavar='t',
        help='milliseconds that the network may take for an image; as many members as fit, at least one')
    parser.add_argument('--top-k', type=int, default=5, metavar='k', help='labels to print (default: %(default)s)')
    parser.add_argument(
        '--device', default='auto', help='default: a GPU if there is one, the CPU for an exported folder')
    parser.add_argument(
        '--engine', choices=['auto', 'none', *ENGINES],
        help="what runs the model; 'none' is the model as it is, the default, and 'auto' that of a table")
    table = parser.add_argument_group('a table of a whole folder')
    table.add_argument(
        '--output', metavar='PATH', help='.parquet or .csv to write; an interrupted command goes on when repeated')
    table.add_argument('--batch-size', type=int, metavar='n', help=f'default: {Bulk.batch_size}')
    table.add_argument('--workers', type=int, metavar='n', help='threads that load images, or processes of Ray')
    table.add_argument('--ray', action='store_true', help='compute by Ray Data, on the cluster of $RAY_ADDRESS if set')


def _write_table(args: argparse.Namespace) -> None:
    if len(args.images) != 1 or not Path(args.images[0]).is_dir():
        raise ValueError(f'images must be one folder for a table, got {" ".join(args.images)}.')
    if args.budget_ms is not None:
        raise ValueError('budget_ms is for images that are printed; a table takes num_members.')
    if args.workers is not None:
        check_integer('workers', args.workers, 1)
    bulk = Bulk(
        args.model, args.engine or 'auto', args.device, model_kwargs(args), args.num_members, args.top_k,
        Bulk.batch_size if args.batch_size is None else args.batch_size)
    bar = tqdm(unit='image')

    def progress(total: int, done: int):
        bar.total, bar.initial, bar.n = total, done, done
        bar.refresh()
        return bar.update

    with bar:
        rows = predict_folder(
            args.images[0], args.output, bulk, ray_rows if args.ray else local_rows, args.workers, progress=progress)
    print(f'{args.output}  {rows} images')


def run(args: argparse.Namespace) -> None:
    """Print the most probable labels of every image, or write them to a table.

    Raises:
        OSError: An image or the weights cannot be read.
        ValueError: An argument is out of range.
        RuntimeError: The model has no pretrained weights.
    """
    check_integer('top_k', args.top_k, 1)
    if args.budget_ms is not None:
        check_number('budget_ms', args.budget_ms, 0, above=True)
    if not args.device.startswith('cuda'):
        keep_freed_memory()
    if args.output is not None:
        _write_table(args)
        return
    for name, given in (('batch_size', args.batch_size), ('workers', args.workers), ('ray', args.ray or None)):
        if given is not None:
            raise ValueError(f'{name} is for a table (--output), got {given}.')
    classifier = Classifier.open(args.model, args.engine or 'none', args.device, **model_kwargs(args))
    labels = classifier.class_names
    unusual = 0
    if args.budget_ms is None:
        num_members = classifier.ensemble_size if args.num_members is None else args.num_members
        schedule, deadline = (validate_num_members(num_members, classifier.ensemble_size),), None
    else:
        schedule, deadline = classifier.prefixes, args.budget_ms / 1000
    warm = False
    for path, image in load_images(args.images, classifier):
        if not warm:  # a deadline goes by the times of past steps
            classifier.warm_up(schedule=schedule)
            warm = True
        begin = time.perf_counter()
        for num_members, logits in classifier.anytime(image[None], schedule, deadline):  # noqa: B007
            pass
        top = classifier.top(logits[0], num_members, args.top_k)
        milliseconds = 1000 * (time.perf_counter() - begin)
        print(f'{printable(path)}: {num_members} member{"s" * (num_members > 1)}, {milliseconds:.1f} ms')
        for label in top:
            print(f'{label.probability:>8.1%}  {label.name}')
        usual = classifier.usual_confidence(num_members)
        if top[0].probability < usual:
            unusual += 1
            print(f'          unsure: 95 % of the images that the model was evaluated on get {usual:.1%} or more')
    if unusual:
        more = f' and {len(labels) - 20} more' if len(labels) > 20 else ''
        print(
            f'timm-hne predict: {unusual} image{"s" * (unusual > 1)} may show nothing that the model knows: '
            f'{", ".join(map(str, labels[:20]))}{more}.', file=sys.stderr)
