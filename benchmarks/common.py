"""What the benchmarks share: a trained model with images, timing, the description of the machine, and files."""
import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_loader, resolve_data_config

from timm_hne import HierarchicalEnsemble
from timm_hne.files import write_text
from timm_hne.process import processor
from timm_hne.training.datasets import DigitsDataset, ImageSubset, open_dataset
from timm_hne.training.recipe import read_recipe

DIGITS_RECIPE = read_recipe('digits.yaml')
MODEL = DIGITS_RECIPE['model']
ALONE = 0.05  # seconds that each callable runs before it is timed


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose what `load_subject` loads."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument('--data-dir', help='folder of images with SPLIT/CLASS, for the packaged weights of --model')
    subject.add_argument('--checkpoint', help="weights of `timm-hne demo`, for its held-out digits")
    parser.add_argument('--split', default='test', help='folder of --data-dir, default test')
    parser.add_argument('--model', default=MODEL, help=f'model of the weights, default {MODEL}')


def load_images(
        args: argparse.Namespace, model: HierarchicalEnsemble, split: str, count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images (n, C, H, W) of a split with their classes (n,): all, or `count` by chance."""
    if args.checkpoint:
        dataset = DigitsDataset(train=split == 'train')
        config = {key: DIGITS_RECIPE[key] for key in ('img_size', 'mean', 'std')}
    else:
        dataset, config = open_dataset('', args.data_dir, split, model.in_chans), {}
    chosen = count and torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    loader = create_loader(
        ImageSubset(dataset, chosen, 'error', training=False),
        batch_size=500,
        use_prefetcher=False,
        persistent_workers=False,
        **resolve_data_config({**config, 'in_chans': model.in_chans}, model=model),
    )
    images, classes = zip(*loader)
    return torch.cat(images), torch.cat(classes)


def load_subject(args: argparse.Namespace) -> tuple[HierarchicalEnsemble, torch.Tensor, torch.Tensor]:
    """Return a trained model in evaluation mode, and what `load_images` returns of images that training never saw."""
    if args.checkpoint:
        model = timm.create_model(args.model, in_chans=1, checkpoint_path=args.checkpoint)
    else:
        model = timm.create_model(args.model, pretrained=True)
    return model.eval(), *load_images(args, model, args.split)


def paired_times(callables: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time callables in turn, so that a change in the machine's speed meets all of them alike.

    Before each timed call there are others that are not timed: the caches are then those of a process that does only
    this, and other libraries' threads have ceased to spin.

    Args:
        callables: What to time, by name. On an accelerator each must wait for its own result.
        repeats: Number of timed rounds.
        warmup: Number of rounds before these that are not timed.

    Returns:
        The seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for repeat in range(-warmup, repeats):
        for name, function in callables.items():
            begin = time.perf_counter()
            function()
            while time.perf_counter() < begin + ALONE:
                function()
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(elapsed)
    return seconds


def paired_medians(callables: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Time callables in turn as `paired_times` does and return the median seconds of each."""
    return {name: statistics.median(times) for name, times in paired_times(callables, repeats, warmup).items()}


def machine() -> dict[str, Any]:
    """Describe the processor, the threads in use and the versions of what computes."""
    description = {
        'cpu': processor(),
        'instructions': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
    }
    if torch.cuda.is_available():
        description['gpu'] = torch.cuda.get_device_name()
    return description


def describe_machine() -> str:
    """Return the description of the machine as one line of text."""
    return ', '.join(f'{key} {value}' for key, value in machine().items())


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines) + '\n'


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    write_text(path, json.dumps(value, indent=2) + '\n')
