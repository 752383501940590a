"""`timm-hne serve`: a model behind HTTP, on Ray Serve."""
import argparse
import os
import shutil
import signal
import socket
import tempfile
import threading

from PIL import Image

from ..checks import check_integer, check_number
from ..inference.engines import ENGINES
from ..serving.classifier import Classifier

PROXY = 'timm_hne.serving.service:proxy_middlewares'


def _replicas(text: str) -> tuple[int, int]:
    low, _, high = text.partition(':')
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number or MIN:MAX, got {text!r}') from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise argparse.ArgumentTypeError(f'must be MIN:MAX with 1 <= MIN <= MAX, got {text!r}')
    return bounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-hne serve`."""
    parser.add_argument(
        'model', nargs='?', default='hne_resnet50_c8', metavar='MODEL',
        help='a checkpoint, the folder of a training run, of a published or of an exported model, a Hub model '
             '(hf-hub:user/name) or a registered model; default: %(default)s')
    parser.add_argument(
        '--latency-target', type=float, default=0.1, metavar='SECONDS',
        help='from a request to its answer; members fall to hold it (default: %(default)s)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s, this machine)')
    parser.add_argument('--port', type=int, default=8000, help='default: %(default)s')
    parser.add_argument(
        '--replicas', type=_replicas, default=(1, 1), metavar='MIN:MAX', help='number of processes (default: 1)')
    parser.add_argument(
        '--threads', type=int, metavar='n', help='threads of a replica (default: the cores over the most replicas)')
    parser.add_argument('--engine', choices=['auto', 'none', *ENGINES], default='auto')
    parser.add_argument('--min-members', type=int, default=1, metavar='n', help='members of an answer at least')
    parser.add_argument('--max-members', type=int, metavar='n', help='and at most (default: all)')
    parser.add_argument('--max-body', type=int, default=16, metavar='MIB', help='size of a body (default: %(default)s)')
    parser.add_argument(
        '--max-pixels', type=int, default=50, metavar='MILLIONS', help='pixels of an image (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted or terminated; what was accepted is answered first.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: The model cannot be opened, or the port is taken.
    """
    check_number('latency_target', args.latency_target, 0, above=True)
    check_integer('port', args.port, 1, 65535)
    check_integer('max_body', args.max_body, 1)
    check_integer('max_pixels', args.max_pixels, 1, 2 * Image.MAX_IMAGE_PIXELS // 1_000_000)  # Pillow refuses more
    threads = max(1, (os.cpu_count() or 1) // args.replicas[1]) if args.threads is None else args.threads
    check_integer('threads', threads, 1)
    # What is wrong with these is better heard now than from a process of Ray's.
    size = Classifier.open(args.model, 'none').ensemble_size
    most = size if args.max_members is None else check_integer('max_members', args.max_members, 1, size)
    check_integer('min_members', args.min_members, 1, most)
    try:
        family = socket.AF_INET6 if ':' in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        raise OSError(f'host {args.host} and port {args.port} cannot be listened on: {error.strerror}') from error
    folder = tempfile.mkdtemp(prefix='timm_hne_metrics_')
    # Read when Ray is imported, and by the processes that it starts.
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    os.environ.setdefault('RAY_worker_niceness', '0')  # Ray's 15 lets everybody else go first
    os.environ.update({
        'RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH': PROXY,
        # Otherwise Ray's own servers listen on all addresses; this is how it is on other systems than Linux.
        'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER': '0',
        # A surge is seen after a second, not after ten.
        'RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S': '1',
        'RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S': '1',
        'TIMM_HNE_METRICS_DIR': folder,
        'TIMM_HNE_MAX_BODY': str(args.max_body << 20),
    })
    stop = threading.Event()
    try:
        _serve(args, threads, stop)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serve(args: argparse.Namespace, threads: int, stop: threading.Event) -> None:
    import ray

    ray.init(
        address='local', include_dashboard=False, log_to_driver=False,
        num_cpus=max(os.cpu_count() or 1, threads * args.replicas[1]))
    # After Ray has started its processes, which must not put their own metrics beside ours.
    from ray import serve

    from ..serving.service import LOGGING, NAME, Settings, app

    settings = Settings(
        model=args.model, engine=args.engine, latency_target=args.latency_target, min_members=args.min_members,
        max_members=args.max_members, max_pixels=args.max_pixels * 1_000_000, threads=threads,
        min_replicas=args.replicas[0], max_replicas=args.replicas[1])
    try:
        serve.start(
            proxy_location='HeadOnly',
            http_options={'host': args.host, 'port': args.port, 'request_timeout_s': 60.},
            logging_config=LOGGING)
        serve.run(app(settings), name=NAME, route_prefix='/')
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        host = f'[{args.host}]' if ':' in args.host else args.host
        print(f'timm-hne serve: {args.model} at http://{host}:{args.port}/predict; Ctrl+C ends it.', flush=True)
        stop.wait()
        for number in (signal.SIGINT, signal.SIGTERM):  # whoever asks again does not want to wait
            signal.signal(number, signal.SIG_DFL)
        print('timm-hne serve: answering what was accepted ...', flush=True)
        serve.delete(NAME)  # waits until the replicas have answered; the proxy still stands meanwhile
    finally:
        serve.shutdown()
        ray.shutdown()
