"""Serving under load: requests from many threads, batches, and as many members as the queue leaves time for."""
import gc
import itertools
import logging
import numbers
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .cost import resolve_input_size
from .ensemble import HierarchicalEnsemble
from .inference import check_ready, validate_schedule
from .optimize import OptimizedEnsemble
from .tree import prefixes, validate_num_members

_logger = logging.getLogger(__name__)

_clock = time.perf_counter

# Share of the latency target that is planned with; the rest is for what no plan foresees.
_MARGIN = 0.8


class Overloaded(RuntimeError):
    """The request was rejected because the queue is full."""


class ShutDown(RuntimeError):
    """The request was rejected because the runner has been shut down."""


class Answer(NamedTuple):
    """What a request's future resolves to.

    Attributes:
        logits: `(num_classes,)`, in single precision on the CPU.
        num_members: Number of members that were evaluated.
    """
    logits: torch.Tensor
    num_members: int


@dataclass
class RunnerStats:
    """Counts since the start. `submitted` is the sum of the others and of the requests that are still waiting.

    Attributes:
        submitted: Requests made of a runner that was not shut down.
        answered: Requests whose future has a result.
        rejected: Requests refused because of a full queue, or thrown out of it by a shutdown.
        failed: Requests whose future has the model's exception.
        cancelled: Requests whose future was cancelled, or resolved, by the client while they waited.
        members: Sum of the members evaluated over the answered requests.
    """
    submitted: int = 0
    answered: int = 0
    rejected: int = 0
    failed: int = 0
    cancelled: int = 0
    members: int = 0


class MemberPolicy:
    """Chooses the number of members of a batch from the state of the queue. No threads, no clock.

    A number of members fits if the oldest request of the batch would be answered in time, if at this pace so would be
    the oldest of those behind it, and if all that wait or arrive during the batch would be done within the target from
    now. The largest that fits is taken.

    Args:
        latency_target: Seconds within which a request is to be answered.
        seconds: Measured seconds of a batch, per number of members, then per batch size. The batch sizes are the same
            for every number of members; between two of them the seconds are interpolated.
    """

    def __init__(self, latency_target: float, seconds: dict[int, dict[int, float]]):
        self.latency_target = latency_target
        self.seconds = seconds
        self.schedule = tuple(sorted(seconds))
        self.batch_sizes = tuple(sorted(seconds[self.schedule[0]]))
        # Time of recent batches over the measured one: the machine may be slower now than it was.
        self.slowdown = 1.

    def expected(self, num_members: int, batch_size: int) -> float:
        """Return the seconds that a batch of at most the largest measured size is expected to take."""
        row = self.seconds[num_members]
        return float(np.interp(batch_size, self.batch_sizes, [row[size] for size in self.batch_sizes])) * self.slowdown

    def choose(
            self,
            batch_size: int,
            waiting: int,
            oldest_age: float,
            waiting_age: float,
            arrival_rate: float,
    ) -> int:
        """Return the number of members for a batch.

        Args:
            batch_size: Number of requests in the batch.
            waiting: Number of requests behind it.
            oldest_age: Seconds since the oldest request of the batch was made.
            waiting_age: Seconds since the oldest request behind it was made, 0 if there is none.
            arrival_rate: Requests per second that are arriving.
        """
        budget = _MARGIN * self.latency_target
        largest = self.batch_sizes[-1]
        for num_members in reversed(self.schedule[1:]):
            duration = self.expected(num_members, batch_size)
            behind = waiting + arrival_rate * duration
            full, rest = divmod(round(behind), largest)
            rounds = full * self.expected(num_members, largest)
            rounds += self.expected(num_members, rest) if rest else 0.
            following = self.expected(num_members, min(waiting, largest)) if waiting else 0.
            ends = oldest_age + duration, waiting_age + duration + following, duration + rounds
            if max(ends) <= budget:
                return num_members
        return self.schedule[0]

    def record(self, num_members: int, batch_size: int, duration: float) -> None:
        """Learn from a batch that took `duration` seconds."""
        ratio = duration * self.slowdown / self.expected(num_members, batch_size)
        self.slowdown += 0.2 * (ratio - self.slowdown)


class AdaptiveRunner:
    """Answers single images from many threads, holding a latency target by evaluating fewer members under load.

    One worker thread takes all that waits, up to the largest batch, and chooses the number of members from the age of
    the oldest request, the queue behind, the rate of arrivals, and the times it measures: those of a warm-up, scaled
    by how recent batches compared. A full queue rejects at once. Every request made is answered, failed with the
    model's exception, cancelled by its client, or rejected, exactly once.

    While it runs, Python's garbage collector leaves alone what there was after the warm-up (`gc.freeze`).

    Args:
        model: Any `hne_*` model in evaluation mode, or better what `optimize_for_inference` returned.
        latency_target: Seconds from `submit` to the answer that at most few requests should exceed.
        input_size: Channels, height and width of the images; the model's own if None.
        max_batch_size: Number of requests of a batch at most.
        max_queue: Number of requests that may wait; further ones are rejected.
        min_members: Number of members that an answer has at least.
        max_members: Number of members that an answer has at most; all if None.
        schedule: Increasing numbers of members to choose from, within the two bounds; 1, 2, 4, ..., N and the bounds
            if None.
        warmup_repeats: Number of times each batch size and number of members is measured at the start.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
    """

    def __init__(
            self,
            model: HierarchicalEnsemble | OptimizedEnsemble,
            latency_target: float,
            input_size: Sequence[int] | None = None,
            max_batch_size: int = 32,
            max_queue: int = 256,
            min_members: int = 1,
            max_members: int | None = None,
            schedule: Sequence[int] | None = None,
            warmup_repeats: int = 3,
    ):
        check_ready(model)
        if isinstance(latency_target, bool) or not isinstance(latency_target, numbers.Real):
            raise TypeError(f'latency_target must be a number of seconds, got {latency_target!r}.')
        if not latency_target > 0:
            raise ValueError(f'latency_target must be positive, got {latency_target}.')
        counts = {'max_batch_size': max_batch_size, 'max_queue': max_queue, 'warmup_repeats': warmup_repeats}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f'{name} must be an integer, got {count!r}.')
            if count < 1:
                raise ValueError(f'{name} must be at least 1, got {count}.')
        max_members = model.ensemble_size if max_members is None else max_members
        for name, count in (('min_members', min_members), ('max_members', max_members)):
            try:
                validate_num_members(count, model.ensemble_size)
            except (TypeError, ValueError) as error:
                raise type(error)(f'{name}: {error}') from None
        if min_members > max_members:
            raise ValueError(f'min_members must be at most max_members, got {min_members} and {max_members}.')
        if schedule is None:
            between = (n for n in prefixes(model.ensemble_size) if min_members < n < max_members)
            schedule = sorted({min_members, *between, max_members})
        self.schedule = validate_schedule(schedule, model.ensemble_size)
        if self.schedule[0] < min_members or self.schedule[-1] > max_members:
            raise ValueError(f'schedule must stay within {min_members} to {max_members} members, got {self.schedule}.')
        self.input_size = resolve_input_size(model, input_size)
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.stats = RunnerStats()
        self.policy = MemberPolicy(latency_target, self._measure(warmup_repeats))
        # The compiler leaves so many objects that a full garbage collection stops all threads for most of a second.
        gc.collect()
        gc.freeze()
        # Requests as (image, future, time of arrival).
        self._queue: deque[tuple[torch.Tensor, Future, float]] = deque()
        self._arrivals: deque[float] = deque()
        self._condition = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name='AdaptiveRunner', daemon=True)
        self._worker.start()

    def __enter__(self) -> 'AdaptiveRunner':
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()

    @torch.no_grad()
    def _evaluate(self, images: torch.Tensor, num_members: int) -> torch.Tensor:
        weight = next(self.model.parameters())
        return self.model(images.to(weight.device, weight.dtype), num_members=num_members).float().cpu()

    def _measure(self, repeats: int) -> dict[int, dict[int, float]]:
        """Measure powers of two up to the largest batch; medians, made to increase with the batch."""
        sizes = [2 ** i for i in range((self.max_batch_size - 1).bit_length())] + [self.max_batch_size]
        seconds: dict[int, dict[int, float]] = {}
        for num_members in self.schedule:
            row: dict[int, float] = {}
            # The largest first: what an optimised model measures, it measures with the first batches it meets.
            for size in reversed(sizes):
                images = torch.randn(size, *self.input_size)
                self._evaluate(images, num_members)
                times = []
                for _ in range(repeats):
                    begin = _clock()
                    self._evaluate(images, num_members)
                    times.append(_clock() - begin)
                row[size] = max(statistics.median(times), 1e-6)  # a coarse clock may have stood still
            seconds[num_members] = dict(zip(sizes, itertools.accumulate((row[size] for size in sizes), max)))
        return seconds

    def submit(self, image: torch.Tensor) -> 'Future[Answer]':
        """Queue an image; may be called from any thread.

        Args:
            image: `(C, H, W)` of the runner's `input_size`; it is copied.

        Returns:
            Future of an `Answer`. It fails with `ShutDown` if a shutdown throws the request out of the queue, and with
            the model's exception if the model raises one.

        Raises:
            TypeError: `image` is no floating point tensor.
            ValueError: `image` is of another size.
            Overloaded: The queue is full.
            ShutDown: The runner has been shut down.
        """
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
            raise TypeError(f'image must be a floating point tensor, got {kind}.')
        if tuple(image.shape) != self.input_size:
            raise ValueError(f'image must be of shape {self.input_size}, got {tuple(image.shape)}.')
        image = image.detach().to('cpu', torch.float, copy=True)
        future: Future[Answer] = Future()
        with self._condition:
            if self._closed:
                raise ShutDown('The runner has been shut down; the request was rejected.')
            self.stats.submitted += 1
            now = _clock()
            self._arrivals.append(now)
            self._forget_arrivals(now)
            if len(self._queue) >= self.max_queue:
                self._drop_cancelled()
            if len(self._queue) >= self.max_queue:
                self.stats.rejected += 1
                raise Overloaded(f'max_queue={self.max_queue} requests are waiting; the request was rejected.')
            self._queue.append((image, future, now))
            self._condition.notify()
        return future

    def shutdown(self, drain: bool = True, wait: bool = True) -> None:
        """Accept no more requests. May be called again, from any thread.

        Args:
            drain: Answer the requests that wait; otherwise they are rejected with `ShutDown`. The batch that is being
                computed is answered in any case.
            wait: Return only when every request has its answer; has no effect in the callback of a future.
        """
        with self._condition:
            self._closed = True
            thrown_out = [] if drain else list(self._queue)
            if not drain:
                self._queue.clear()
            self._condition.notify_all()
        self._reject(thrown_out)
        if wait and threading.current_thread() is not self._worker:
            self._worker.join()

    def _reject(self, requests: list[tuple[torch.Tensor, Future, float]]) -> None:
        # Outside the lock: a future runs its callbacks at once, and they may submit again.
        for _, future, _ in requests:
            if self._claim(future):
                with self._condition:
                    self.stats.rejected += 1
                _resolve(future, ShutDown('The runner was shut down before the request was answered.'))

    def _claim(self, future: Future) -> bool:
        """Make a future ours to resolve, unless its client has cancelled it or resolved it."""
        try:
            claimed = future.set_running_or_notify_cancel()
        except RuntimeError:
            _logger.exception('a client changed the state of its request')
            claimed = not future.done()
        if not claimed:
            with self._condition:
                self.stats.cancelled += 1
        return claimed

    def _drop_cancelled(self) -> None:
        kept, dropped = deque(), []
        for request in self._queue:
            (dropped if request[1].cancelled() else kept).append(request)
        self._queue = kept
        for request in dropped:
            self._claim(request[1])

    def _forget_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0] < now - self.policy.latency_target:
            self._arrivals.popleft()

    def _next_batch(self) -> tuple[list[tuple[torch.Tensor, Future, float]], dict[str, float]] | None:
        """Wait for requests; return a batch and what `MemberPolicy.choose` wants to know, or None at the end."""
        with self._condition:
            while not self._queue and not self._closed:
                self._condition.wait()
            if not self._queue:
                return None
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self.max_batch_size))]
            now = _clock()
            self._forget_arrivals(now)
            return batch, {
                'waiting': len(self._queue),
                'waiting_age': now - self._queue[0][2] if self._queue else 0.,
                'arrival_rate': len(self._arrivals) / self.policy.latency_target,
            }

    def _work(self) -> None:
        try:
            while (work := self._next_batch()) is not None:
                requests, load = work
                requests = [request for request in requests if self._claim(request[1])]
                if requests:
                    self._answer(requests, load)
        finally:
            # Should anything unforeseen end the loop, nobody may wait for an answer that will not come.
            self.shutdown(drain=False, wait=False)
            gc.unfreeze()

    def _answer(self, requests: list[tuple[torch.Tensor, Future, float]], load: dict[str, float]) -> None:
        images, futures, arrivals = zip(*requests)
        try:
            begin = _clock()
            num_members = self.policy.choose(len(requests), oldest_age=begin - arrivals[0], **load)
            logits = self._evaluate(torch.stack(images), num_members)
            self.policy.record(num_members, len(requests), _clock() - begin)
        except BaseException as error:  # whatever it is, these clients must not wait for ever
            _logger.exception('a batch of %d requests failed', len(requests))
            with self._condition:
                self.stats.failed += len(requests)
            for future in futures:
                _resolve(future, error)
            return
        with self._condition:
            self.stats.answered += len(requests)
            self.stats.members += num_members * len(requests)
        for future, row in zip(futures, logits):
            _resolve(future, Answer(row.clone(), num_members))


def _resolve(future: Future, outcome: Answer | BaseException) -> None:
    """End a request; whatever its client's callbacks raise, the worker and the other requests go on."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except BaseException:
        _logger.exception('a callback of a request failed, or its client resolved it')
