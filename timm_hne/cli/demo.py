"""The two-minute demonstration: train, save, reload, and turn the cost up and down, on real handwritten digits."""
import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.utils import setup_default_logging
from torch.utils.benchmark import Timer

from ..evaluation.evaluate import evaluate
from ..evaluation.plots import plot_accuracy
from ..files import write_file, write_text
from ..models.ensemble import HierarchicalEnsemble
from ..training.datasets import DigitsDataset, ImageSubset
from ..training.memory_loader import MemoryLoader, load_into_memory
from ..training.recipe import TrainConfig, read_recipe
from ..training.trainer import train
from ..tree import prefixes


def demo_config(output_dir: Path) -> TrainConfig:
    """The demo's training: hierarchical co-distillation on scikit-learn's digits, scaled from 8x8 to 16x16 pixels."""
    return TrainConfig.from_dict({**read_recipe('digits.yaml'), 'output_dir': str(output_dir), 'resume': True})


def measure(model: HierarchicalEnsemble, config: TrainConfig) -> list[dict[str, Any]]:
    """Evaluate a trained model on the held-out digits, and time it.

    Returns:
        For n = 1, 2, 4, ..., N the metrics of `evaluate` and `latency_ms`, the median for one image on this machine.
    """
    digits = ImageSubset(DigitsDataset(train=False), None, 'error', training=False)
    images, labels = load_into_memory(digits, config.img_size, resize=True)
    loader = MemoryLoader(images, labels, 120, config.mean, config.std)
    rows = {row['num_members']: row for row in evaluate(model, loader)['members']}
    image = next(iter(loader))[0][:1]
    with torch.inference_mode():
        for n in prefixes(model.ensemble_size):
            variables = dict(model=model, image=image, n=n)
            timer = Timer('model(image, n)', globals=variables, num_threads=torch.get_num_threads())
            rows[n]['latency_ms'] = 1000 * timer.blocked_autorange(min_run_time=0.5).median
    return [rows[n] for n in prefixes(model.ensemble_size)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne demo`."""
    parser.add_argument(
        '--output', type=Path, default=Path('output/demo'), metavar='DIR',
        help='where weights, logs and the plot go (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    """Train, save, reload and measure an ensemble.

    Raises:
        ImportError: scikit-learn or matplotlib is not installed.
    """
    # Optional packages; better to miss them now than after the training.
    import matplotlib  # noqa: F401
    import sklearn  # noqa: F401

    setup_default_logging()
    logging.getLogger('timm.utils.checkpoint_saver').setLevel(logging.WARNING)
    started = time.perf_counter()
    config = demo_config(args.output)
    result = train(config, keep_memory=True)

    weights = args.output / 'model.safetensors'
    state = {name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}
    write_file(weights, lambda path: save_file(state, path))
    # All that a user of the weights needs is timm.
    model = timm.create_model(config.model, num_classes=10, in_chans=1, checkpoint_path=str(weights)).eval()

    rows = measure(model, config)
    print(f'\n{"members":>7}  {"accuracy":>8}  {"MACs":>12}  {"latency":>10}  {"diversity":>9}')
    for row in rows:
        print(
            f'{row["num_members"]:>7}  {row["top1"]:>7.2f}%  {row["macs"]:>12,}  {row["latency_ms"]:>7.2f} ms  '
            f'{row["logit_std"]:>9.3f}')
    figure = args.output / 'accuracy.png'
    write_file(figure, lambda path: plot_accuracy(rows, path))
    write_text(args.output / 'results.json', json.dumps(rows, indent=1) + '\n')
    # A run that was interrupted goes on where it was, and these are the seconds of the rest.
    done = config.epochs - len(result.history)
    rest = f' for what was left of an interrupted run, after {done} of {config.epochs} epochs' if done else ''
    print(
        f'\n{time.perf_counter() - started:.0f} s{rest}. Accuracy on 360 held-out digits; latency for one image on '
        f'this machine;\ndiversity: standard deviation of the logits over the members.\n\n'
        f'weights  {weights}\nplot     {figure}\nresults  {args.output / "results.json"}\nlog      {result.summary}')
