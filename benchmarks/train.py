#!/usr/bin/env python3
"""Images per second of training, against the paper's implementation, in one run.

    python benchmarks/train.py [--models hne_resnet50_c8 hne_resnet50_c16] [--device cuda] [--output FILE]

A step is forward, loss (hierarchical co-distillation), backward and optimiser. The paper's network replicates feature
maps and its loss loops over the members; it starts from the same weights, and the first losses must agree. It is run in
the memory format of its time and in ours, channels_last. On a CPU the trainer makes the C library keep freed memory
(`timm_hne/process.py`), which speeds up every network; `as it was` is the paper's network before that.
"""
import argparse
import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import describe_machine, machine, markdown_table, paired_medians, write_json, write_text
from paper import PaperNetwork

from timm_hne.process import keep_freed_memory
from timm_hne.training.losses import HNELoss
from timm_hne.training.memory_loader import MemoryLoader
from timm_hne.training.task import HNETask
from timm_hne.tree import prefixes

PAPER = 'paper'
AS_IT_WAS = 'paper, as it was'
RESULTS = Path(__file__).parents[1] / 'docs' / 'results'
LOSS_SHAPE = (256, 16, 1000)  # images, members, classes


def loop_loss(member_logits: torch.Tensor, target: torch.Tensor, alpha: float = 0.5, temperature: float = 2.):
    """Hierarchical co-distillation of Eq. 9 and 12 as one would write it down: a loop over members and prefixes."""
    members = member_logits.unbind(dim=1)
    independent = sum(F.cross_entropy(logits, target) for logits in members)
    teacher = F.softmax(member_logits.mean(dim=1).detach() / temperature, dim=1)
    distillation = 0
    for count in prefixes(len(members))[:-1]:
        student = torch.stack(members[:count]).mean(dim=0)
        distillation = distillation - (teacher * F.log_softmax(student / temperature, dim=1)).sum(dim=1).mean()
    return (1 - alpha) * independent + alpha * temperature ** 2 * distillation


class PaperTask(nn.Module):
    """The paper's network and the loop over its members."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = PaperNetwork(model)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        return {'loss': loop_loss(self.network.forward_members(images).float(), target)}


class Step:
    """One training step on a batch; returns the loss."""

    def __init__(self, task: nn.Module, device: torch.device, amp: bool, memory_format: torch.memory_format):
        self.task = task.train()
        # What the recipes use.
        self.optimizer = torch.optim.SGD(
            task.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=isinstance(task, HNETask))
        self.device = device
        self.amp = amp
        self.memory_format = memory_format

    def __call__(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.task(images, target)['loss']
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def waiting(function: Callable, device: torch.device, *args) -> Callable:
    """Wait for the device after a call."""
    def call():
        result = function(*args)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return result

    return call


def create_steps(name: str, device: torch.device, amp: bool, compiled: bool) -> dict[str, Step]:
    """Create the steps to compare, from equal weights."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    steps = {}
    for label in (PAPER, f'{PAPER}, channels_last', 'eager', *(['compiled'] if compiled else [])):
        other = timm.create_model(name)
        other.load_state_dict(model.state_dict())
        memory_format = torch.contiguous_format if label == PAPER else torch.channels_last
        task = PaperTask(other) if label.startswith(PAPER) else HNETask(other, device=device, verbose=False)
        task.to(device, memory_format=memory_format)
        if label == 'compiled':
            task.compile()
        steps[label] = Step(task, device, amp, memory_format)
    return steps


def measure_as_it_was(name: str, device: torch.device, amp: bool, args: argparse.Namespace) -> float:
    """Seconds of a step of the paper's network, to be measured before the C library keeps freed memory."""
    step = create_steps(name, device, amp, compiled=False)[PAPER]
    batch = torch.randn(args.batch_size, 3, 32, 32, device=device), torch.arange(args.batch_size, device=device) % 10
    return paired_medians({PAPER: waiting(step, device, *batch)}, args.repeats, args.warmup)[PAPER]


def measure(name: str, device: torch.device, amp: bool, args: argparse.Namespace, as_it_was: float) -> dict:
    """Compare the steps of one model in one precision."""
    steps = create_steps(name, device, amp, args.compile)
    pixels = torch.randint(0, 256, (4 * args.batch_size, 3, 32, 32), dtype=torch.uint8)
    loader = MemoryLoader(
        pixels, torch.arange(len(pixels)) % 10, args.batch_size, (0.5,) * 3, (0.25,) * 3, training=True,
        crop_padding=4, hflip=0.5, device=device)
    batch = next(iter(loader))
    losses = {label: step(*batch).item() for label, step in steps.items()}
    if max(losses.values()) - min(losses.values()) > (0.05 if amp else 1e-3) * losses[PAPER]:
        raise RuntimeError(f'the implementations disagree about the first loss: {losses}')
    seconds = paired_medians(
        {label: waiting(step, device, *batch) for label, step in steps.items()}, args.repeats, args.warmup)

    best = min(seconds, key=seconds.get)
    seconds = {AS_IT_WAS: as_it_was, **seconds}

    def epoch(step: Callable) -> None:
        for images, target in loader:
            step(images, target)

    both = paired_medians({
        'loader': waiting(epoch, device, lambda *_: None),
        'step': waiting(lambda: [steps[best](*batch) for _ in range(len(loader))], device),
        'loader and step': waiting(epoch, device, steps[best]),
    }, max(args.repeats // 2, 1))
    return {
        'model': name,
        'precision': 'bfloat16' if amp else 'float32',
        'batch_size': args.batch_size,
        'images_per_second': {label: args.batch_size / value for label, value in seconds.items()},
        'speedup': {label: as_it_was / value for label, value in seconds.items()},
        'with_loader': {'step': best, **{label: len(loader) * args.batch_size / t for label, t in both.items()}},
        'loss_share': measure_loss(device, args.repeats) / (min(seconds.values()) / args.batch_size * LOSS_SHAPE[0]),
    }


@functools.cache
def measure_loss(device: torch.device, repeats: int) -> float:
    """Seconds of the loss of a batch of `LOSS_SHAPE`, forward and backward."""
    criterion = HNELoss().to(device)
    logits = torch.randn(LOSS_SHAPE, device=device, requires_grad=True)
    target = torch.randint(LOSS_SHAPE[2], LOSS_SHAPE[:1], device=device)

    def run():
        criterion(logits, target)['loss'].backward()
        logits.grad = None

    return paired_medians({'loss': waiting(run, device)}, max(repeats, 5), 2)['loss']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['hne_resnet50_c8', 'hne_resnet50_c16'])
    parser.add_argument('--precisions', nargs='+', default=['float32', 'bfloat16'], choices=['float32', 'bfloat16'])
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--warmup', type=int, default=1)
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--output', type=Path, default=RESULTS / 'train', help='path of the results, without suffix')
    args = parser.parse_args()
    device = torch.device(args.device)
    cases = [(name, device, dtype == 'bfloat16', args) for name in args.models for dtype in args.precisions]
    before = [measure_as_it_was(*case) for case in cases]
    if device.type == 'cpu':
        keep_freed_memory()
    results = [measure(*case, as_it_was) for case, as_it_was in zip(cases, before)]
    labels = list(results[0]['images_per_second'])
    speeds, ratios = [f'{label}, images/s' for label in labels], [f'{label} / first' for label in labels[1:]]
    header = ['model', 'precision', *speeds, *ratios, 'loader', 'step', 'both', 'loss %']
    table = markdown_table(header, [
        [
            result['model'],
            result['precision'],
            *(f'{result["images_per_second"][label]:.1f}' for label in labels),
            *(f'{result["speedup"][label]:.2f}' for label in labels[1:]),
            *(f'{result["with_loader"][key]:.1f}' for key in ('loader', 'step', 'loader and step')),
            f'{100 * result["loss_share"]:.2f}',
        ]
        for result in results
    ])
    print(table)
    if args.output:
        command = f'python benchmarks/train.py {shlex.join(sys.argv[1:])}'.strip()
        text = f'# Training steps\n\nMachine: {describe_machine()}.\n\nWritten by `{command}`.\n\n{table}'
        write_text(args.output.with_suffix('.md'), text)
        write_json(args.output.with_suffix('.json'), {
            'command': command, 'machine': machine(), 'loss_shape': LOSS_SHAPE, 'results': results})


if __name__ == '__main__':
    main()
