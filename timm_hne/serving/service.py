"""The service on Ray Serve: `timm-hne serve`, or `serve run timm_hne.serving.service:app` on a cluster."""
import ipaddress
import os

import ray
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve._private import replica
from starlette.middleware import Middleware

from ..inference.runner import AdaptiveRunner
from ..process import keep_freed_memory
from .classifier import MAX_PIXELS, Classifier
from .guard import BodyGuard
from .http import create_app
from .metrics import Refusals

NAME = 'hne'

# Bytes of a body at most. The proxy reads bodies before it knows which application they are for.
MAX_BODY = 'TIMM_HNE_MAX_BODY'

# A line for each request in Ray's log files takes a tenth of a replica's time.
LOGGING = {'enable_access_log': False}


class Settings(BaseModel):
    """What the service may be told, on the command line of `serve run` or under `args` of its config file.

    Attributes:
        model: What `Classifier.open` takes.
        engine: What runs it; see `optimize_for_inference`.
        latency_target: Seconds from the request to the answer.
        min_members: Number of members that an answer has at least.
        max_members: Number of members that an answer has at most; all if None.
        max_batch_size: Number of requests of a batch at most.
        max_pixels: Number of pixels of an image at most.
        min_replicas: Number of replicas at least.
        max_replicas: Number of replicas at most.
        threads: Number of threads, and so of cores, of a replica.
        target_ongoing_requests: Number of requests in a replica above which there shall be more replicas.
        upscale_delay: Seconds that it must be above.
        downscale_delay: Seconds that it must be below.
    """
    model_config = ConfigDict(extra='forbid')

    model: str = 'hne_resnet50_c8'
    engine: str = 'auto'
    latency_target: float = Field(0.1, gt=0)
    min_members: int = Field(1, ge=1)
    max_members: int | None = Field(None, ge=1)
    max_batch_size: int = Field(32, ge=1)
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(8., gt=0)
    upscale_delay: float = Field(2., ge=0)
    downscale_delay: float = Field(60., ge=0)


@serve.deployment(name=NAME)
@serve.ingress()
class Replica:
    """A process that answers requests, with a runner of its own.

    Args:
        settings: The settings.
    """

    def __init__(self, settings: Settings):
        _stay_on_this_machine()
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        self.runner = None
        self.classifier = Classifier.open(settings.model, settings.engine, max_pixels=settings.max_pixels)
        self.runner = AdaptiveRunner(
            self.classifier.model, settings.latency_target, self.classifier.input_size, settings.max_batch_size,
            min_members=settings.min_members, max_members=settings.max_members, freeze_garbage=True)

    def __serve_build_asgi_app__(self):
        """Return the application; Ray Serve calls this."""
        return create_app(self.classifier, self.runner, stamp=False, **limits())

    def __del__(self):
        # Ray Serve calls this when all requests have their answers.
        if self.runner is not None:
            self.runner.shutdown()


def _stay_on_this_machine() -> None:
    """If Ray is for this machine only, let the server that it opens in this replica be so too.

    That server is for other deployments, of which there are none here; it unpickles what it is sent, and listens on all
    addresses whatever Ray was told.
    """
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server, address: str) -> int:
        return add_port(server, f'127.0.0.1:{address.rpartition(":")[2]}')

    replica.add_port_to_grpc_server = add_loopback_port


def limits() -> dict[str, int]:
    """Return the limits of bodies, as the environment has them."""
    size = os.environ.get(MAX_BODY)
    return {} if not size else {'max_body': int(size), 'max_total': max(16 * int(size), 256 << 20)}


def proxy_middlewares() -> list[Middleware]:
    """Return what Ray Serve's proxy puts before all applications, if `$RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` is
    'timm_hne.serving.service:proxy_middlewares' when Ray starts.

    Without it, a replica reads bodies itself, and the proxy holds as much of them as is sent.
    """
    return [Middleware(BodyGuard, on_refused=Refusals().refuse, **limits())]


def app(args: Settings) -> serve.Application:
    """Return the application for Ray Serve."""
    return Replica.options(
        # The runner says how many may wait; Ray must not keep them from it.
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=30,
        logging_config=LOGGING,
        ray_actor_options={'num_cpus': args.threads},
        autoscaling_config={
            'min_replicas': args.min_replicas,
            'max_replicas': args.max_replicas,
            'target_ongoing_requests': args.target_ongoing_requests,
            'upscale_delay_s': args.upscale_delay,
            'downscale_delay_s': args.downscale_delay,
            'look_back_period_s': 11.,  # Ray wants more than 10
        },
    ).bind(args)
