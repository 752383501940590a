"""`timm-hne run`: one of timm's scripts with the hne_* models and their loss."""
import argparse
import logging
import os

from ..training.launcher import run_script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne run`."""
    parser.add_argument('script', type=_script, metavar='SCRIPT', help="path of timm's train.py, validate.py, ...")
    parser.add_argument('arguments', nargs=argparse.REMAINDER, metavar='...', help='arguments of the script')


def _script(path: str) -> str:
    if not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f'no such file: {path!r}')
    return path


def run(args: argparse.Namespace) -> None:
    """Run the script."""
    # What benchmark.py counts by warns of modules that are never called: those of which some nodes alone are computed,
    # from a part of their weights, without a call of the module. They are counted all the same.
    logging.getLogger('fvcore.nn.jit_analysis').addFilter(lambda record: 'never called' not in record.getMessage())
    run_script(args.script, args.arguments)
