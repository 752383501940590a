"""The HTTP side of the service, as an ASGI application; it knows nothing of Ray."""
import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..checks import check_integer, check_number
from ..inference.early_exit import validate_criterion
from ..inference.runner import AdaptiveRunner, DeadlineTooShort, Overloaded, ShutDown
from .classifier import Classifier, ImageError
from .guard import RECEIVED, BodyGuard, Refused
from .metrics import CONTENT_TYPE, Metrics

# Seconds after which the proxy has given a request up.
_OLDEST = 60.


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = 'an integer' if kind is int else 'a number'
        raise ValueError(f'{name} must be {what}, got {text[:40]!r}.') from None


def _age(received: str) -> float:
    """Return the seconds that a request has spent in queues, by a guard's stamp; 0 if no guard can have written it."""
    try:
        age = time.time() - float(received)
    except ValueError:
        return 0.
    return age if 0. < age < _OLDEST else 0.


def read_options(query: list[tuple[str, str]], ensemble_size: int, num_classes: int) -> dict[str, Any]:
    """Return the options of a request: `num_members`, `deadline` in seconds, `threshold` and `top_k`.

    Args:
        query: Names and values of the query's parameters.
        ensemble_size: Number of members, N.
        num_classes: Number of classes.

    Raises:
        ValueError: A parameter is unknown, given twice, or out of range.
    """
    kinds = {'num_members': int, 'deadline_ms': float, 'threshold': float, 'top_k': int}
    names = [name for name, _ in query]
    for name in names:
        if name not in kinds:
            raise ValueError(f'unknown parameter {name[:40]!r}; there are {", ".join(kinds)}.')
        if names.count(name) > 1:
            raise ValueError(f'{name} must be given once, got it {names.count(name)} times.')
    given = {name: _number(name, text, kinds[name]) for name, text in query}
    if 'num_members' in given:
        check_integer('num_members', given['num_members'], 1, ensemble_size)
    if 'top_k' in given:
        check_integer('top_k', given['top_k'], 1)
    if 'threshold' in given:
        validate_criterion('confidence', given['threshold'], num_classes)
    if 'deadline_ms' in given:
        check_number('deadline_ms', given['deadline_ms'], 0, above=True)
    deadline = given.get('deadline_ms')
    return {
        'num_members': given.get('num_members'), 'threshold': given.get('threshold'), 'top_k': given.get('top_k', 5),
        # The smallest deadlines become 0 by the division, which would be none that a runner takes.
        'deadline': None if deadline is None else max(deadline / 1000, math.ulp(0)),
    }


class Application:
    """Answers the requests of HTTP; see `create_app`.

    Args:
        classifier: The model.
        runner: What evaluates it.
        decoders: Number of images that are decoded at a time.
    """

    def __init__(self, classifier: Classifier, runner: AdaptiveRunner, decoders: int = 2):
        self.classifier = classifier
        self.runner = runner
        self.metrics = Metrics(classifier.prefixes)
        self._decoders = asyncio.Semaphore(decoders)

    async def predict(self, request: Request) -> Response:
        """Classify the image in the body."""
        begin = time.perf_counter() - _age(request.headers[RECEIVED.decode()])
        try:
            answer = await self._answer(request, begin)
        except Refused as error:
            self.metrics.refuse(error.status, error.reason)
            # A deadline that is too short is so later, too.
            headers = {'retry-after': '1'} if error.status == 503 and error.reason != 'deadline' else None
            return JSONResponse({'error': str(error)}, error.status, headers)
        finally:
            self.metrics.queue.set(self.runner.waiting)
        seconds = time.perf_counter() - begin
        self.metrics.requests.labels(200).inc()
        self.metrics.seconds.observe(seconds)
        self.metrics.members.observe(answer['num_members'])
        return JSONResponse({**answer, 'milliseconds': round(1000 * seconds, 3)})

    async def _answer(self, request: Request, begin: float) -> dict[str, Any]:
        arrived = time.perf_counter()
        try:
            options = read_options(
                request.query_params.multi_items(), self.classifier.ensemble_size, self.classifier.num_classes)
        except ValueError as error:
            raise Refused(400, str(error), 'parameter') from error
        if request.headers.get('content-type', '').startswith('multipart/'):
            raise Refused(
                415, 'the body must be the bytes of the image itself, not a form; curl has --data-binary for that.',
                'form')
        top_k, target = options.pop('top_k'), options['deadline'] or self.runner.policy.latency_target
        if options['deadline'] is not None and self.runner.policy.would_be_late(0, None, target):
            raise Refused(503, f'deadline={target:.3g} s is too short for any number of members.', 'deadline')
        queued = self._decoders.locked()
        image = await self._decode(await request.body(), begin + target)
        # What is left of the time of a request that nobody else has kept waiting.
        alone = target - (time.perf_counter() - arrived)
        try:
            future = self.runner.submit(image, age=time.perf_counter() - begin, **options)
            self.metrics.queue.set(self.runner.waiting)
            # If the client goes away, so does its request, unless it is being computed.
            logits, num_members = await asyncio.wrap_future(future)
        except DeadlineTooShort as error:
            hopeless = not queued and self.runner.policy.would_be_late(0, None, alone)
            raise Refused(503, str(error), 'deadline' if hopeless else 'overloaded') from error
        except Overloaded as error:
            raise Refused(503, str(error), 'overloaded') from error
        except ShutDown as error:
            raise Refused(503, str(error), 'shut_down') from error
        except Exception as error:  # whatever a model raises; the runner has logged it
            raise Refused(500, 'the model failed.', 'failed') from error
        if not logits.isfinite().all():  # which JSON has no words for
            raise Refused(500, 'the model failed.', 'failed')
        classes = [label._asdict() for label in self.classifier.top(logits, num_members, top_k)]
        return {'classes': classes, 'num_members': num_members}

    async def _decode(self, data: bytes, until: float) -> torch.Tensor:
        # One that is late already may still be answered, if nobody else has to wait for that: the runner decides.
        wait = until - time.perf_counter() if self._decoders.locked() else None
        try:
            await asyncio.wait_for(self._decoders.acquire(), wait)
        except asyncio.TimeoutError:
            raise Refused(503, 'too many images are being decoded; try again later.', 'decoding') from None
        decoding = asyncio.ensure_future(run_in_threadpool(self.classifier.image, data))
        # Not before the thread is done, also if the client goes away meanwhile.
        decoding.add_done_callback(lambda done: (self._decoders.release(), done.cancelled() or done.exception()))
        try:
            return await asyncio.shield(decoding)
        except ImageError as error:
            raise Refused(400, str(error), 'image') from error

    async def health(self, request: Request) -> Response:
        """Tell whether requests are taken."""
        if self.runner.closed:
            return JSONResponse({'error': 'the service is shutting down.'}, 503)
        return JSONResponse({
            'status': 'ok', 'members': self.classifier.ensemble_size, 'classes': self.classifier.num_classes,
            'engine': self.classifier.engine, 'latency_target_ms': 1000 * self.runner.policy.latency_target,
        })

    async def report(self, request: Request) -> Response:
        """Report the metrics."""
        self.metrics.queue.set(self.runner.waiting)
        return Response(self.metrics.report(), headers={'content-type': CONTENT_TYPE})


async def _http_error(request: Request, error: HTTPException) -> Response:
    messages = {404: 'there is nothing here; POST an image to /predict.', 405: f'{request.method} is not allowed here.'}
    return JSONResponse(
        {'error': messages.get(error.status_code, str(error.detail))}, error.status_code, headers=error.headers)


def create_app(
        classifier: Classifier,
        runner: AdaptiveRunner,
        decoders: int = 2,
        **limits: Any,
) -> Callable:
    """Return the ASGI application: POST /predict, GET /health, GET /metrics.

    Args:
        classifier: The model.
        runner: What evaluates it; it must be of `classifier.model`. Whoever made it shuts it down.
        decoders: Number of images that are decoded at a time.
        **limits: Further arguments of `BodyGuard`.
    """
    application = Application(classifier, runner, decoders)
    return Starlette(
        routes=[
            Route('/predict', application.predict, methods=['POST']),
            Route('/health', application.health, methods=['GET']),
            Route('/metrics', application.report, methods=['GET']),
        ],
        middleware=[Middleware(BodyGuard, on_refused=application.metrics.refuse, **limits)],
        exception_handlers={HTTPException: _http_error},
    )
