"""Serving under load: requests from many threads, batches, and as many members as the queue leaves time for."""
import atexit
import contextlib
import itertools
import logging
import math
import os
import statistics
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from ..checks import check_integer, check_number
from ..evaluation.cost import resolve_input_size
from ..models.anytime import check_ready, validate_schedule
from ..models.ensemble import HierarchicalEnsemble
from ..process import frozen_garbage
from ..tree import prefixes
from .early_exit import exit_in_batch, validate_criterion
from .optimize import OptimizedEnsemble
from .policy import MemberPolicy
from .requests import Answer, DeadlineTooShort, Overloaded, Request, RunnerStats, ShutDown, resolve

__all__ = ['AdaptiveRunner', 'Answer', 'DeadlineTooShort', 'Overloaded', 'RunnerStats', 'ShutDown']

_logger = logging.getLogger(__name__)

_clock = time.perf_counter

# A thread that computes when Python is being taken down aborts the process, so all runners are shut down before.
_runners: 'weakref.WeakSet[AdaptiveRunner]' = weakref.WeakSet()
_exiting = False


@atexit.register
def _shut_down_all() -> None:
    global _exiting
    _exiting = True
    runners = list(_runners)
    for runner in runners:
        runner.shutdown(drain=False, wait=False)
    for runner in runners:
        runner.shutdown()


class AdaptiveRunner:
    """Answers single images from many threads, holding a latency target by evaluating fewer members under load.

    One worker thread takes all that waits, up to the largest batch, and chooses the number of members from the age of
    the oldest request, the queue behind, the rate of arrivals, and the times it measures: those of a warm-up, scaled
    by how recent batches compared. A request that would come too late even if all before it got the fewest members is
    rejected at once. Every request made is answered, failed with the model's exception, cancelled by its client, or
    rejected, exactly once.

    The runner serves the process that made it, not one forked later. When the process ends, the batch that is being
    computed is answered and the requests that wait are rejected.

    Args:
        model: Any hierarchical ensemble in evaluation mode, or better what `optimize_for_inference` returned.
        latency_target: Seconds from `submit` to the answer that at most few requests should exceed.
        input_size: Channels, height and width of the images; the model's own if None.
        max_batch_size: Number of requests of a batch at most.
        max_queue: Number of requests that may wait, whatever the target; as many as can be answered in time if None.
        min_members: Number of members that an answer has at least, unless its request asks for fewer.
        max_members: Number of members that an answer has at most; all if None.
        schedule: Increasing numbers of members to choose from, within the two bounds. If None, those that the model was
            exported for, else 1, 2, 4, ..., N; and the bounds.
        warmup_repeats: Number of times each batch size and number of members is measured at the start.
        freeze_garbage: Keep the process's garbage collector off what is there then: `timm_hne.process.frozen_garbage`.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An argument is out of range, or the model is in training mode or has no classifier.
        RuntimeError: The process is about to end.
    """

    def __init__(
            self,
            model: HierarchicalEnsemble | OptimizedEnsemble,
            latency_target: float,
            input_size: Sequence[int] | None = None,
            max_batch_size: int = 32,
            max_queue: int | None = None,
            min_members: int = 1,
            max_members: int | None = None,
            schedule: Sequence[int] | None = None,
            warmup_repeats: int = 3,
            freeze_garbage: bool = False,
    ):
        if _exiting:
            raise RuntimeError('a runner cannot be made any more, the process is about to end.')
        check_ready(model)
        check_number('latency_target', latency_target, 0, above=True)
        check_integer('max_batch_size', max_batch_size, 1)
        if max_queue is not None:
            check_integer('max_queue', max_queue, 1)
        check_integer('warmup_repeats', warmup_repeats, 1)
        max_members = model.ensemble_size if max_members is None else max_members
        check_integer('max_members', max_members, 1, model.ensemble_size)
        check_integer('min_members', min_members, 1, model.ensemble_size)
        if min_members > max_members:
            raise ValueError(f'min_members must be at most max_members, got {min_members} and {max_members}.')
        if schedule is None:
            steps = getattr(model, 'schedule', prefixes(model.ensemble_size))
            bounds = {min_members, max_members} - {1} or {1}
            schedule = sorted(bounds.union(n for n in steps if min_members <= n <= max_members))
        self.schedule = validate_schedule(schedule, model.ensemble_size)
        if self.schedule[0] < min_members or self.schedule[-1] > max_members:
            raise ValueError(f'schedule must stay within {min_members} to {max_members} members, got {self.schedule}.')
        self.input_size = resolve_input_size(model, input_size)
        self.model = model
        self._modules = tuple(model.modules())  # to ask each for its mode takes less time than to look for it
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.stats = RunnerStats()
        self.policy = MemberPolicy(latency_target, self._measure(warmup_repeats))
        self._process = os.getpid()
        self._queue: deque[Request] = deque()
        self._arrivals: deque[float] = deque()
        self._condition = threading.Condition()
        # When the batch that is being computed should be done; None while there is none.
        self._busy_until: float | None = None
        self._closed = False
        self._context = contextlib.ExitStack()
        if freeze_garbage:
            self._context.enter_context(frozen_garbage())
        self._worker = threading.Thread(target=self._work, name='AdaptiveRunner', daemon=True)
        _runners.add(self)
        self._worker.start()

    def __enter__(self) -> 'AdaptiveRunner':
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a batch."""
        return len(self._queue)

    @property
    def closed(self) -> bool:
        """Whether the runner has been shut down."""
        return self._closed

    @torch.no_grad()
    def _evaluate(self, images: torch.Tensor, num_members: int) -> torch.Tensor:
        weight = next(self.model.parameters())
        self._check_mode()  # somebody may have called model.train() since the start
        logits = self.model(images.to(weight.device, weight.dtype), num_members=num_members).float().cpu()
        self._check_mode()  # or meanwhile
        return logits

    def _check_mode(self) -> None:
        """Raise a ValueError if the model, or a part of it alone, is in training mode."""
        check_ready(self.model)
        if any(module.training for module in self._modules):
            part = next((name for name, module in self.model.named_modules() if module.training), 'a part')
            raise ValueError(
                f'model must be in evaluation mode, got one with {part} in training mode; call model.eval() first.')

    @torch.no_grad()
    def _exit_early(self, images: torch.Tensor, num_members: int, requests: list[Request]) -> tuple:
        weight = next(self.model.parameters())
        self._check_mode()
        thresholds = torch.tensor([math.inf if r.threshold is None else r.threshold for r in requests])
        limits = torch.tensor([num_members if r.limit is None else min(r.limit, num_members) for r in requests])
        logits, used = exit_in_batch(
            self.model, images.to(weight.device, weight.dtype), thresholds if thresholds.isfinite().any() else None,
            'confidence', [n for n in self.schedule if n <= num_members], limits)
        return logits.float().cpu(), used.tolist()

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
        # Requests with a bound or a threshold go step by step, through programs of their own, and leave single images.
        for size in {self.max_batch_size, 1} if isinstance(self.model, OptimizedEnsemble) else ():
            images, most = torch.randn(size, *self.input_size), self.schedule[-1]
            self._exit_early(images, most, [Request(image, 0., limit=most) for image in images])
        return seconds

    def submit(
            self,
            image: torch.Tensor,
            num_members: int | None = None,
            deadline: float | None = None,
            threshold: float | None = None,
            age: float = 0.,
    ) -> 'Future[Answer]':
        """Queue an image; may be called from any thread.

        Args:
            image: `(C, H, W)` of the runner's `input_size`; it is copied.
            num_members: Number of members at most; as many as there is time for if None. Under load it gets fewer,
                as all do.
            deadline: Seconds that this request may take, `age` included; the latency target of all if None.
            threshold: Probability of the first class at which this image gets no further members; none if None.
            age: Seconds that this request has taken before this call, to be decoded for instance.

        Returns:
            Future of an `Answer`. It fails with `ShutDown` if a shutdown throws the request out of the queue, and with
            the model's exception if the model raises one.

        Raises:
            TypeError: An argument is of a wrong type.
            ValueError: `image` is of another size, or another argument is out of range.
            Overloaded: Too many requests are waiting; or, as a `DeadlineTooShort`, nobody could keep the deadline.
            ShutDown: The runner has been shut down.
            RuntimeError: The runner was made by another process, of which this is a fork.
        """
        if os.getpid() != self._process:  # before the lock: a thread that is no longer there may hold it for ever
            raise RuntimeError(
                f'the runner was made by process {self._process} and works there only; this is process {os.getpid()}. '
                'Make a runner in each process, after the fork.')
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, torch.Tensor) else type(image).__name__
            raise TypeError(f'image must be a floating point tensor, got {kind}.')
        if tuple(image.shape) != self.input_size:
            raise ValueError(f'image must be of shape {self.input_size}, got {tuple(image.shape)}.')
        if num_members is not None:
            check_integer('num_members', num_members, 1, self.model.ensemble_size)
        if deadline is not None:
            check_number('deadline', deadline, 0, above=True)
        if threshold is not None:
            validate_criterion('confidence', threshold, self.model.num_classes)
        check_number('age', age, 0)
        image = image.detach().to('cpu', torch.float, copy=True)
        with self._condition:
            if self._closed:
                raise ShutDown('The runner has been shut down; the request was rejected.')
            self.stats.submitted += 1
            now = _clock()
            self._arrivals.append(now)
            self._forget_arrivals(now)
            left = (self.policy.latency_target if deadline is None else deadline) - age
            if self._refusal(now, deadline, left) is not None:
                self._drop_cancelled()
            refusal = self._refusal(now, deadline, left)
            if refusal is not None:
                self.stats.rejected += 1
                alone = deadline is not None and self.policy.would_be_late(0, None, left)
                raise DeadlineTooShort(refusal) if alone else Overloaded(refusal)
            request = Request(image, now - self.policy.head_start(left), num_members, threshold)
            self._queue.append(request)
            self._condition.notify()
        return request.future

    def _refusal(self, now: float, deadline: float | None, left: float) -> str | None:
        """Return why a request that arrives now is to be rejected, None if it is not."""
        waiting = len(self._queue)
        if self.max_queue is not None and waiting >= self.max_queue:
            return f'max_queue={self.max_queue} requests are waiting; the request was rejected.'
        if deadline is None and (self.max_queue is not None or (not waiting and self._busy_until is None)):
            return None  # either nothing else was asked for, or nobody could be faster
        busy = None if self._busy_until is None else max(0., self._busy_until - now)
        if not self.policy.would_be_late(waiting, busy, left):
            return None
        limit = f'latency_target={self.policy.latency_target:.3g}' if deadline is None else f'deadline={deadline:.3g}'
        return f'with {waiting} requests waiting, this one could not be answered within {limit} s; it was rejected.'

    def shutdown(self, drain: bool = True, wait: bool = True) -> None:
        """Accept no more requests. May be called again, from any thread; does nothing in a fork of the process.

        Args:
            drain: Answer the requests that wait; otherwise they are rejected with `ShutDown`. The batch that is being
                computed is answered in any case.
            wait: Return only when every request has its answer; has no effect in the callback of a future.
        """
        if os.getpid() != self._process:
            return
        with self._condition:
            self._closed = True
            thrown_out = [] if drain else list(self._queue)
            if not drain:
                self._queue.clear()
            self._condition.notify_all()
        self._reject(thrown_out)
        if wait and threading.current_thread() is not self._worker:
            self._worker.join()

    def _reject(self, requests: list[Request]) -> None:
        # Outside the lock: a future runs its callbacks at once, and they may submit again.
        for request in requests:
            if self._claim(request.future):
                with self._condition:
                    self.stats.rejected += 1
                resolve(request.future, ShutDown('The runner was shut down before the request was answered.'))

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
            (dropped if request.future.cancelled() else kept).append(request)
        self._queue = kept
        for request in dropped:
            self._claim(request.future)

    def _forget_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0] < now - self.policy.latency_target:
            self._arrivals.popleft()

    def _next_batch(self) -> tuple[list[Request], dict[str, float]] | None:
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
                'waiting_age': now - min(request.since for request in self._queue) if self._queue else 0.,
                # The last to arrive says nothing of how many do: there would be no batch without it.
                'arrival_rate': max(0, len(self._arrivals) - 1) / self.policy.latency_target,
            }

    def _work(self) -> None:
        try:
            while (work := self._next_batch()) is not None:
                requests, load = work
                requests = [request for request in requests if self._claim(request.future)]
                if requests:
                    self._answer(requests, load)
        finally:
            # Should anything unforeseen end the loop, nobody may wait for an answer that will not come.
            self.shutdown(drain=False, wait=False)
            self._context.close()

    def _answer(self, requests: list[Request], load: dict[str, float]) -> None:
        try:
            begin = _clock()
            oldest = min(request.since for request in requests)
            num_members = self.policy.choose(len(requests), oldest_age=begin - oldest, **load)
            plain = all(request.plain for request in requests)
            if not plain:
                most = max(request.limit or self.model.ensemble_size for request in requests)
                num_members = min(num_members, next((n for n in self.schedule if n >= most), self.schedule[-1]))
            expected = self.policy.expected(num_members, len(requests))
            with self._condition:
                self._busy_until = begin + expected
            images = torch.stack([request.image for request in requests])
            if plain:
                logits, used = self._evaluate(images, num_members), [num_members] * len(requests)
            else:
                logits, used = self._exit_early(images, num_members, requests)
            duration = _clock() - begin
            if not plain:  # images that left early do not make the machine faster than it was measured
                num_members = next(n for n in self.schedule if n >= max(used))
                duration = max(duration, self.policy.measured(num_members, len(requests)))
            self.policy.record(num_members, len(requests), duration)
        except BaseException as error:  # whatever it is, these clients must not wait for ever
            _logger.exception('a batch of %d requests failed', len(requests))
            with self._condition:
                self._busy_until = None
                self.stats.failed += len(requests)
            for request in requests:
                resolve(request.future, error)
            return
        with self._condition:
            self._busy_until = None
            self.stats.answered += len(requests)
            self.stats.members += sum(used)
        for request, row, count in zip(requests, logits, used):
            resolve(request.future, Answer(row.clone(), count))
