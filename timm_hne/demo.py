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

from .data import DIGITS, DigitsDataset, ImageSubset, MemoryLoader, load_into_memory
from .ensemble import HierarchicalEnsemble
from .evaluate import evaluate, plot_accuracy
from .files import write_file, write_text
from .trainer import TrainConfig, train
from .tree import prefixes

MODEL = 'hne_resnet50_c8'
IMG_SIZE = 16
MEAN, STD = (0.3,), (0.35,)


def demo_config(output_dir: Path) -> TrainConfig:
    """The demo's training: hierarchical co-distillation on scikit-learn's digits, scaled from 8x8 to 16x16 pixels."""
    return TrainConfig(
        dataset=DIGITS,
        train_split='train',
        val_split='test',
        img_size=IMG_SIZE,
        in_chans=1,
        mean=MEAN,
        std=STD,
        in_memory=True,
        num_workers=0,
        hflip=0.,
        crop_padding=1,
        model=MODEL,
        epochs=12,
        batch_size=48,
        opt='adamw',
        lr=3e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        output_dir=str(output_dir),
        resume=True,
    )


def measure(model: HierarchicalEnsemble) -> list[dict[str, Any]]:
    """Evaluate a trained model on the held-out digits, and time it.

    Returns:
        For n = 1, 2, 4, ..., N the metrics of `evaluate` and `latency_ms`, the median for one image on this machine.
    """
    digits = ImageSubset(DigitsDataset(train=False), None, 'error', training=False)
    loader = MemoryLoader(*load_into_memory(digits, IMG_SIZE, resize=True), batch_size=120, mean=MEAN, std=STD)
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
    result = train(demo_config(args.output))

    weights = args.output / 'model.safetensors'
    state = {name: tensor.contiguous() for name, tensor in result.model.state_dict().items()}
    write_file(weights, lambda path: save_file(state, path))
    # All that a user of the weights needs is timm.
    model = timm.create_model(MODEL, num_classes=10, in_chans=1, checkpoint_path=str(weights)).eval()

    rows = measure(model)
    print(f'\n{"members":>7}  {"accuracy":>8}  {"MACs":>12}  {"latency":>10}  {"diversity":>9}')
    for row in rows:
        print(
            f'{row["num_members"]:>7}  {row["top1"]:>7.2f}%  {row["macs"]:>12,}  {row["latency_ms"]:>7.2f} ms  '
            f'{row["logit_std"]:>9.3f}')
    figure = args.output / 'accuracy.png'
    write_file(figure, lambda path: plot_accuracy(rows, path))
    write_text(args.output / 'results.json', json.dumps(rows, indent=1) + '\n')
    print(
        f'\n{time.perf_counter() - started:.0f} s. Accuracy on 360 held-out digits; latency for one image on this '
        f'machine;\ndiversity: standard deviation of the logits over the members.\n\n'
        f'weights  {weights}\nplot     {figure}\nresults  {args.output / "results.json"}\nlog      {result.summary}')
