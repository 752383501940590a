#!/usr/bin/env python3
"""Gradients of convolutions on a CPU, as PyTorch computes them and as `timm_hne/models/convolution.py` does.

    python benchmarks/gradients.py [--cases hne_mobilenetv2_075_e8:64 ...] [--output FILE]

For each model and image size: a training step (forward, loss, backward, optimiser) in float32 with the one and the
other, in turn, and the backward pass of each convolution that is computed in the other way. One thread, as in
`timm-hne train` with a process for each core.
"""
import argparse
import shlex
import sys
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from common import describe_machine, machine, markdown_table, paired_medians, write_json, write_text
from train import Step

from timm_hne.models import layers
from timm_hne.models.convolution import convolve_in_training, has_slow_gradient
from timm_hne.process import keep_freed_memory
from timm_hne.training.task import HNETask

RESULTS = Path(__file__).parents[1] / 'docs' / 'results'


def never(*_) -> bool:
    return False


def measure_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace) -> dict:
    """Seconds of a training step."""
    task = HNETask(model, device=torch.device('cpu'), verbose=False)
    step = Step(task, torch.device('cpu'), False, torch.channels_last)

    def plain() -> None:
        with mock.patch.object(layers, 'has_slow_gradient', never):
            step(*batch)

    return paired_medians({'conv2d': plain, 'ours': lambda: step(*batch)}, args.repeats, args.warmup)


def find_convolutions(model: torch.nn.Module, images: torch.Tensor) -> dict[tuple, int]:
    """Return how often the model has each of the convolutions that are computed in the other way."""
    found: dict[tuple, int] = {}

    def watch(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...], groups: int) -> bool:
        if has_slow_gradient(x, weight, stride, groups):
            key = tuple(x.shape), tuple(weight.shape), groups
            found[key] = found.get(key, 0) + 1
        return False

    with mock.patch.object(layers, 'has_slow_gradient', watch):
        model.train()(images)
    return found


def measure_convolution(image: tuple, kernel: tuple, groups: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the backward pass of one convolution."""
    x = torch.randn(image).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(kernel, requires_grad=True)
    outputs = {
        'conv2d': F.conv2d(x, weight, padding=kernel[-1] // 2, groups=groups),
        'ours': convolve_in_training(x, weight, groups),
    }
    grad = torch.randn_like(outputs['conv2d'])
    return paired_medians({
        name: lambda y=y: torch.autograd.grad(y, (x, weight), grad, retain_graph=True) for name, y in outputs.items()
    }, args.repeats, args.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--cases', nargs='+', metavar='MODEL:PIXELS',
        default=['hne_mobilenetv2_075_e8:64', 'hne_mobilenetv2_075_e8:96', 'hne_resnet50_c8:32'])
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--output', type=Path, default=RESULTS / 'gradients', help='path without suffix')
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []

    def add(name: str, size: int, what: str, count: int, seconds: dict[str, float]) -> None:
        rows.append({
            'model': name, 'pixels': size, 'what': what, 'number': count, 'conv2d, ms': 1e3 * seconds['conv2d'],
            'ours, ms': 1e3 * seconds['ours'], 'conv2d / ours': seconds['conv2d'] / seconds['ours']})
        print(rows[-1], flush=True)

    for case in args.cases:
        name, size = case.split(':')[0], int(case.split(':')[1])
        model = timm.create_model(name, num_classes=200).to(memory_format=torch.channels_last)
        images = torch.randn(args.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        add(name, size, 'step', 1, measure_step(model, (images, torch.arange(args.batch_size) % 200), args))
        for (image, kernel, groups), count in find_convolutions(model, images).items():
            what = f'{kernel[1]}->{kernel[0] // groups}, {groups} groups, {image[2]}x{image[3]}, kernel {kernel[2]}'
            add(name, size, what, count, measure_convolution(image, kernel, groups, args))
    command = f'python benchmarks/gradients.py {shlex.join(sys.argv[1:])}'.strip()
    table = markdown_table(list(rows[0]), [
        [f'{value:.2f}' if isinstance(value, float) else str(value) for value in row.values()] for row in rows])
    title = '# Gradients of convolutions on a CPU'
    text = f'{title}\n\nMachine: {describe_machine()}.\n\nWritten by `{command}`.\n\n{table}'
    write_text(args.output.with_suffix('.md'), text)
    write_json(args.output.with_suffix('.json'), {'command': command, 'machine': machine(), 'results': rows})


if __name__ == '__main__':
    main()
