"""`timm-hne bench`: the latency of every number of members on this machine."""
import argparse
from pathlib import Path

import torch
from timm.models import safe_model_name

from ..inference.engines import ENGINES
from ..inference.latency import LatencyTable
from ..inference.optimize import optimize_for_inference
from ..models.create import create_ensemble
from ..process import keep_freed_memory
from .arguments import add_model_arguments, input_size, model_kwargs

# What `--mode` of version 0.1 named.
MODES = {'compiled': 'inductor', 'folded': 'eager', 'original': 'none'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument('--num-members', type=int, nargs='+', help='numbers of members; 1, 2, 4, ..., N by default')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'], default='float32')
    parser.add_argument('--engine', choices=['auto', *ENGINES, 'none'],
                        help="what runs the optimised model; 'none' is the model as it is (default: auto)")
    parser.add_argument('--mode', choices=list(MODES), help='former name of --engine')
    parser.add_argument('--output', metavar='PATH', help='NAME-latency.json by default')


def run(args: argparse.Namespace) -> None:
    """Measure a latency table, print it and save it."""
    torch.manual_seed(0)  # the same weights every time, so that their programs are in the cache
    model = create_ensemble(args.name, **model_kwargs(args)).eval()
    image_size = input_size(args, model)
    dtype = getattr(torch, args.dtype)
    model = model.to(args.device)
    if torch.device(args.device).type == 'cpu':
        keep_freed_memory()
    if args.mode and args.engine:
        raise ValueError('only one of --engine and --mode, its former name, may be given.')
    engine = MODES[args.mode] if args.mode else args.engine or 'auto'
    model = model.to(dtype) if engine == 'none' else optimize_for_inference(model, engine=engine, dtype=dtype)
    output = Path(args.output or f'{safe_model_name(args.name)}-latency.json')
    output.parent.mkdir(parents=True, exist_ok=True)
    table = LatencyTable.measure(
        model, image_size, args.batch_size, num_members=args.num_members, repeats=args.repeats)
    print(table)
    if engine == 'auto':
        print(f'engine {model.mode}: {model.reason}')
    table.save(output)
    print(f'saved to {output}')
