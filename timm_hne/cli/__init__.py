"""The command line: `timm-hne COMMAND`, or `python -m timm_hne COMMAND`. A module for every command."""
import argparse
import difflib
import importlib
import sys

from ..version import __version__

# Command: (module that implements it with `add_arguments(parser)` and `run(args)`, help).
COMMANDS = {
    'demo': ('demo', 'train a small ensemble on real handwritten digits and show what it can do'),
    'train': ('train', 'train an ensemble by a recipe'),
    'cost': ('cost', 'print what n members cost in MACs and parameters'),
    'run': ('run', "run one of timm's scripts with the hne_* models and their loss"),
    'eval': ('evaluate', 'measure accuracy, diversity and calibration for every number of members'),
    'plot': ('plot', "draw the paper's figures and Table 1 from evaluations"),
    'predict': ('predict', 'print the labels of image files, or write those of a whole folder to a table'),
    'app': ('app', 'open a page to try a model in the browser'),
    'serve': ('serve', 'answer requests over HTTP, holding a latency'),
    'bench': ('bench', 'measure the latency of every number of members on this machine'),
    'export': ('export', 'write a folder that runs without PyTorch, or one program per number of members'),
    'publish': ('publish', 'publish a checkpoint on the Hugging Face Hub'),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Arguments after the program's name; those of the process if None.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog='timm-hne', description='Hierarchical Neural Ensembles for timm.')
    parser.add_argument('--version', action='version', version=f'timm-hne {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    options: list[str] = []
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        # Only the module of the command at hand is imported: some need optional packages.
        if argv and argv[0] == name:
            module = importlib.import_module(f'timm_hne.cli.{module}')
            module.add_arguments(command)
            command.set_defaults(run=module.run)
            options = [option for action in command._actions for option in action.option_strings]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].partition('=')[0], options, n=1, cutoff=0.6)
        parser.error(f'unknown argument {unknown[0]!r}' + (f', did you mean {nearest[0]!r}?' if nearest else '.'))
    try:
        args.run(args)
    except ImportError as error:
        extras = "pip install 'timm-hne[demo,plots,export,openvino,app,bulk,serve]'"
        parser.exit(1, f'timm-hne {args.command}: {error}. Optional packages come with {extras}.\n')
    except (ValueError, TypeError, OSError, RuntimeError, AssertionError) as error:  # timm asserts sizes of images
        # On one line, as a shell's user expects; PyTorch's messages have several.
        parser.exit(1, f'timm-hne {args.command}: {" ".join(str(error).split())}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'\ntimm-hne {args.command}: interrupted\n')
