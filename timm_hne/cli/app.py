"""`timm-hne app`: a page to try a model in the browser."""
import argparse

from ..inference.engines import ENGINES
from ..process import keep_freed_memory
from ..serving.classifier import Classifier
from .arguments import add_model_kwargs, model_kwargs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne app`."""
    parser.add_argument(
        'model', nargs='?', default='hne_resnet50_c8', metavar='MODEL',
        help='a checkpoint, the folder of a training run, of a published or of an exported model, a Hub model '
             '(hf-hub:user/name) or a registered model; default: %(default)s, whose weights come with the package')
    add_model_kwargs(parser)
    parser.add_argument(
        '--engine', choices=['auto', *ENGINES, 'none'], default='eager',
        help='what runs the model; all but eager and none may write programs for minutes at the first start (default: '
             '%(default)s; an exported folder has its own)')
    parser.add_argument(
        '--device', default='auto', help='default: a GPU if there is one, the CPU for an exported folder')
    parser.add_argument(
        '--host', default='127.0.0.1', metavar='ADDRESS',
        help="address to bind to, '0.0.0.0' for everyone who reaches this machine (default: %(default)s)")
    parser.add_argument('--port', type=int, help='default: the first free one from 7860')
    parser.add_argument('--open', action='store_true', help='open the page in a browser')


def run(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ImportError: Gradio is not installed.
        OSError: The weights cannot be read, or the port is taken.
        ValueError: An argument is wrong.
        RuntimeError: The model has no pretrained weights.
    """
    try:
        from ..serving.page import build, launch
    except ModuleNotFoundError as error:
        if error.name != 'gradio':
            raise
        raise ImportError("the page needs gradio: pip install 'timm-hne[app]'") from error
    if not args.device.startswith('cuda'):
        keep_freed_memory()
    classifier = Classifier.open(args.model, args.engine, args.device, **model_kwargs(args))
    print(f'timm-hne app: preparing {args.model} ...', flush=True)
    blocks = build(classifier, args.model)
    print(f'timm-hne app: {launch(blocks, args.host, args.port, args.open)} (Ctrl+C ends it)', flush=True)
    blocks.block_thread()
