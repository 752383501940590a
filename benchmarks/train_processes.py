#!/usr/bin/env python3
"""Images per second of training on a CPU: one process with all cores, or one process per core; with huge pages or not.

    python benchmarks/train_processes.py [--models hne_resnet50_c8 ...] [--output FILE]

All are `torchrun`'s processes with DDP (if there are several), train in bfloat16 on batches of the same joint size, and
are measured in turn, several times. The first member alone (`nodes` all 1) is what a tree may grow from. Huge pages are
those of glibc (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`), where the system gives them to who asks (`madvise`).
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from common import describe_machine, machine, markdown_table, write_json, write_text
from timm.utils import init_distributed_device

import timm_hne
from timm_hne.process import keep_freed_memory

RESULTS = Path(__file__).parents[1] / 'docs' / 'results'
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


def work(args: argparse.Namespace) -> None:
    """Train on one batch over and over, as one of the processes; the first prints the seconds of a step."""
    device = init_distributed_device(args)
    keep_freed_memory()
    torch.manual_seed(0)
    nodes = {'nodes': json.loads(args.nodes)} if args.nodes else {}
    model = timm.create_model(args.models[0], num_classes=10, **nodes)
    task = timm_hne.HNETask(model.to(memory_format=torch.channels_last), device=device, verbose=False).train()
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3, momentum=0.9, fused=True)
    if args.world_size > 1:
        task.prepare_distributed()
    count = args.batch_size // args.world_size
    images = torch.randn(count, 3, args.img_size, args.img_size).contiguous(memory_format=torch.channels_last)
    target = torch.arange(count) % 10
    seconds = []
    for _ in range(args.warmup + args.steps):
        begin = time.perf_counter()
        with torch.autocast('cpu', torch.bfloat16):
            loss = task(images, target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    if args.rank == 0:
        print(json.dumps(statistics.median(seconds[args.warmup:])))
    if args.distributed:
        dist.destroy_process_group()


def measure(args: argparse.Namespace, model: str, nodes: tuple[int, ...], processes: int, huge: bool) -> float:
    """Return the seconds of a step."""
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes), __file__,
        '--worker', '--models', model, '--nodes', json.dumps(nodes), '--img-size', str(args.img_size), '--batch-size',
        str(args.batch_size), '--steps', str(args.steps), '--warmup', str(args.warmup)]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in HUGE_PAGES}, **(HUGE_PAGES if huge else {}),
        'OMP_NUM_THREADS': str((os.cpu_count() or 1) // processes)}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['hne_resnet50_c8', 'hne_resnet50_c16'])
    parser.add_argument('--img-size', type=int, default=32)
    parser.add_argument('--batch-size', type=int, default=64, help='of all processes together')
    parser.add_argument('--steps', type=int, default=7)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--output', type=Path, default=RESULTS / 'train_processes', help='path without suffix')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--nodes', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.device = 'cpu'
        work(args)
        return
    cores = os.cpu_count() or 1
    if args.batch_size % cores:
        parser.error(f'--batch-size must be a multiple of the {cores} cores, got {args.batch_size}.')
    ways = {
        f'1 x {cores}': (1, False), f'1 x {cores}, huge pages': (1, True), f'{cores} x 1': (cores, False),
        f'{cores} x 1, huge pages': (cores, True)}
    results, rows = [], []
    for model in args.models:
        tree = timm.create_model(model).nodes
        for nodes in ((1,) * len(tree), tree):
            seconds = {way: [] for way in ways}
            for _ in range(args.repeats):
                for way, (processes, huge) in ways.items():
                    seconds[way].append(measure(args, model, nodes, processes, huge))
            speeds = {way: args.batch_size / statistics.median(some) for way, some in seconds.items()}
            first = speeds[next(iter(ways))]
            rows.append([
                model, 'one member' if nodes != tree else 'tree', *(f'{speed:.0f}' for speed in speeds.values()),
                *(f'{speed / first:.2f}' for speed in list(speeds.values())[1:])])
            print(rows[-1], flush=True)
            results.append({'model': model, 'nodes': nodes, 'images_per_second': speeds})
    header = ['model', 'nodes', *(f'{way}, images/s' for way in ways), *(f'{way} / first' for way in list(ways)[1:])]
    command = f'python benchmarks/train_processes.py {shlex.join(sys.argv[1:])}'.strip()
    text = (
        f'# Training on the cores of a CPU\n\nMachine: {describe_machine()}.\n\nProcesses x threads; batches of '
        f'{args.batch_size} images of {args.img_size} pixels, bfloat16. Written by `{command}`.\n\n'
        + markdown_table(header, rows))
    print(text)
    write_text(args.output.with_suffix('.md'), text)
    write_json(args.output.with_suffix('.json'), {'command': command, 'machine': machine(), 'results': results})


if __name__ == '__main__':
    main()
