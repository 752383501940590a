"""The adaptive runner: its policy in simulated time, and the exactly-once promise with a model that obeys the test."""
import gc
import importlib
import os
import random
import statistics
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_inference import images, small_resnet
from torch.utils._pytree import tree_leaves

import timm_hne
from timm_hne.inference import runner as runner_module
from timm_hne.inference.optimize import optimize_for_inference
from timm_hne.inference.runner import AdaptiveRunner, DeadlineTooShort, MemberPolicy, Overloaded, ShutDown

TIMEOUT = 60  # seconds after which a test that hangs fails; nothing is asserted about time itself

SECONDS = {n: {size: 0.001 * (2 + 0.5 * size * n) for size in (1, 2, 4, 8)} for n in (1, 2, 4)}


# Policy.

@pytest.mark.parametrize('batch_size, waiting, oldest_age, waiting_age, arrival_rate, expected', [
    (1, 0, 0., 0., 0., 4),  # 4 ms
    (1, 0, 0.0765, 0., 0., 2),  # 80 ms may be planned with: 4 ms are too many, 3 ms are not
    (1, 0, 0.0775, 0., 0., 1),  # neither fits
    (1, 0, 9., 0., 0., 1),
    (8, 0, 0., 0., 0., 4),  # 18 ms
    (8, 24, 0., 0., 0., 4),  # four times 18 ms
    (8, 24, 0.04, 0.04, 0., 4),  # 76 ms, with the batch that follows
    (8, 24, 0.05, 0.05, 0., 2),  # 86 ms are too many
    (8, 1, 0.05, 0.05, 0., 4),  # 72 ms, one follows alone
    (8, 32, 0., 0., 0., 2),  # five times 18 ms are too many, five times 10 ms are not
    (8, 64, 0., 0., 0., 1),
    (8, 0, 0., 0., 1600., 2),  # 29 arrive in 18 ms, which take four batches more; 16 in 10 ms take two
    (3, 0, 0., 0., 0., 4),
    (8, 0, -0.1, 0., 0., 4),
])
def test_policy_by_hand(batch_size, waiting, oldest_age, waiting_age, arrival_rate, expected):
    policy = MemberPolicy(0.1, SECONDS)
    assert policy.choose(batch_size, waiting, oldest_age, waiting_age, arrival_rate) == expected


def test_a_longer_deadline_buys_members_only_while_nobody_else_waits():
    policy = MemberPolicy(0.01, SECONDS)
    assert policy.choose(1, 0, 0., 0., 0.) == 4  # 4 of 8 ms
    assert policy.choose(8, 0, 0., 0., 0.) == 1
    assert policy.choose(8, 0, -0.02, 0., 0.) == 4  # 18 of 28 ms
    assert policy.choose(8, 0, -0.02, 0., 100.) == 1  # 2 arrive meanwhile
    assert policy.choose(8, 1, -0.02, 0., 0.) == 1


def test_policy_interpolates_between_measured_batches():
    policy = MemberPolicy(0.1, {1: {1: 1., 2: 3., 8: 6., 32: 7.}})
    assert [policy.expected(1, size) for size in (1, 2, 4, 5, 8, 20, 32)] == [1, 3, 4, 4.5, 6, 6.5, 7]
    policy = MemberPolicy(0.1, SECONDS)
    for _ in range(50):
        policy.record(4, 5, 0.001 * (2 + 0.5 * 5 * 4))
    assert policy.slowdown == pytest.approx(1)  # nothing has changed


def test_policy_learns_that_the_machine_became_slower_and_faster_again():
    policy = MemberPolicy(0.1, SECONDS)
    for _ in range(30):
        policy.record(4, 8, 3 * SECONDS[4][8])
    assert policy.slowdown == pytest.approx(3, rel=0.01)
    assert policy.choose(8, 8, 0., 0., 0.) == 2
    for _ in range(30):
        policy.record(1, 1, SECONDS[1][1])
    assert policy.slowdown == pytest.approx(1, rel=0.01)
    assert policy.choose(8, 8, 0., 0., 0.) == 4


def test_an_idle_machine_counts_as_fast_as_it_was_measured():
    policy = MemberPolicy(0.1, SECONDS)
    policy.record(1, 1, 1000 * SECONDS[1][1])
    assert not policy.would_be_late(0, None, 0.05)
    assert policy.would_be_late(1, None, 0.05) and policy.would_be_late(0, 0., 0.05)  # one runs, and is overdue
    assert policy.would_be_late(0, None, SECONDS[1][1])


def simulate(policy, arrivals, seconds, max_batch_size=8):
    """Serve arrivals in simulated time; return latencies and numbers of members, in the order of arrival."""
    latencies, members, now, served = [], [], 0., 0
    while served < len(arrivals):
        now = max(now, arrivals[served])
        queued = sum(arrival <= now for arrival in arrivals[served:])
        batch = min(queued, max_batch_size)
        recent = sum(now - policy.latency_target <= arrival <= now for arrival in arrivals) - 1
        following = now - arrivals[served + batch] if queued > batch else 0.
        n = policy.choose(
            batch, queued - batch, now - arrivals[served], following, max(0, recent) / policy.latency_target)
        now += seconds[n][next(size for size in sorted(seconds[n]) if size >= batch)]
        latencies += [now - arrival for arrival in arrivals[served:served + batch]]
        members += [n] * batch
        served += batch
    return latencies, members


def test_policy_holds_the_target_through_a_surge():
    generator, arrivals, now = random.Random(0), [], 0.
    for rate, duration in ((50, 2), (1000, 1), (50, 2)):
        end = now + duration
        while now < end:
            now += generator.expovariate(rate)
            arrivals.append(now)
    latencies, members = simulate(MemberPolicy(0.1, SECONDS), arrivals, SECONDS)
    percentile = statistics.quantiles(latencies, n=100)[98]
    assert percentile <= 0.1
    assert statistics.mean(members[:80]) == 4 and statistics.mean(members[-80:]) == 4
    surge = [n for n, arrival in zip(members, arrivals) if 2.2 < arrival < 2.9]
    assert 1 <= statistics.mean(surge) < 2.5
    # A fixed number of members misses the target by far.
    latencies, _ = simulate(MemberPolicy(0.1, {4: SECONDS[4]}), arrivals, SECONDS)
    assert statistics.quantiles(latencies, n=100)[98] > 0.5


# Runner.

class Gate(torch.nn.Module):
    """A model whose answers say which image was asked for, with how many members; it waits where the test tells it."""
    ensemble_size, num_classes, in_chans = 4, 2, 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.pretrained_cfg = {'input_size': (3, 2, 2)}
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.error = None
        self.batches = []
        self.eval()

    def forward(self, x, num_members):
        self.batches.append((len(x), num_members))
        self.entered.release()
        assert self.open.wait(TIMEOUT)
        if self.error is not None:
            raise self.error
        return torch.stack([x[:, 0, 0, 0], torch.full((len(x),), float(num_members))], dim=1)


def image(value):
    return torch.full((3, 2, 2), float(value))


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def runner(gate):
    with AdaptiveRunner(gate, latency_target=100., max_batch_size=4, max_queue=6) as runner:
        gate.batches.clear()
        while gate.entered.acquire(blocking=False):
            continue  # what the warm-up left
        yield runner
        gate.open.set()


def block(gate, runner):
    """Keep the worker busy with one request; return its future."""
    while gate.entered.acquire(blocking=False):  # by the warm-up
        pass
    gate.open.clear()
    future = runner.submit(image(-1))
    assert gate.entered.acquire(timeout=TIMEOUT)
    return future


def assert_consistent(stats, waiting=0):
    total = stats.answered + stats.rejected + stats.failed + stats.cancelled + waiting
    assert stats.submitted == total


def test_answers_belong_to_their_requests(gate, runner):
    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(6)]
    gate.open.set()
    for i, future in enumerate([first, *futures], start=-1):
        answer = future.result(TIMEOUT)
        assert answer.logits[0] == i and answer.logits[1] == answer.num_members == 4
    assert [size for size, _ in gate.batches] == [1, 4, 2]
    runner.shutdown()
    assert (runner.stats.submitted, runner.stats.answered, runner.stats.members) == (7, 7, 28)


def test_a_full_queue_rejects(gate, runner):
    futures = [block(gate, runner), *(runner.submit(image(i)) for i in range(6))]
    for _ in range(3):
        with pytest.raises(Overloaded, match='max_queue=6 '):
            runner.submit(image(0))
    gate.open.set()
    wait(futures, TIMEOUT)
    runner.submit(image(0)).result(TIMEOUT)
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.rejected) == (8, 3)
    assert_consistent(runner.stats)


def test_a_cancelled_request_leaves_its_place_to_others(gate, runner):
    futures = [block(gate, runner), *(runner.submit(image(i)) for i in range(6))]
    assert futures[2].cancel() and futures[5].cancel()
    futures += [runner.submit(image(6)), runner.submit(image(7))]
    with pytest.raises(Overloaded):
        runner.submit(image(8))
    gate.open.set()
    assert not wait(futures, TIMEOUT).not_done
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.cancelled, runner.stats.rejected) == (7, 2, 1)
    assert_consistent(runner.stats)


def test_garbage_collection_passes_over_what_was_there_before(gate):
    gc.unfreeze()
    with AdaptiveRunner(gate, 1.) as runner:  # only if it is asked to
        assert gc.get_freeze_count() == 0
        runner.submit(image(0)).result(TIMEOUT)
    first, second = (AdaptiveRunner(gate, 1., freeze_garbage=True) for _ in range(2))
    assert gc.get_freeze_count() > 1000
    first.shutdown()
    assert gc.get_freeze_count() > 1000  # the other still runs
    assert second.submit(image(0)).result(TIMEOUT).logits[0] == 0
    second.shutdown()
    assert gc.get_freeze_count() == 0


def test_a_clock_that_stands_still(gate, monkeypatch):
    monkeypatch.setattr(runner_module, '_clock', lambda: 1.)
    with AdaptiveRunner(gate, 1.) as runner:
        assert [runner.submit(image(i)).result(TIMEOUT).logits[0] for i in range(3)] == [0, 1, 2]


def test_a_model_that_raises_fails_its_batch_only(gate, runner):
    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(4)]
    gate.error = ArithmeticError('broken')
    gate.open.set()
    for future in (first, *futures):
        with pytest.raises(ArithmeticError, match='broken'):
            future.result(TIMEOUT)
    gate.error = None
    assert runner.submit(image(3)).result(TIMEOUT).logits[0] == 3
    runner.shutdown()
    assert (runner.stats.failed, runner.stats.answered) == (5, 1)
    assert_consistent(runner.stats)


def test_even_an_exit_inside_the_model_answers(gate, runner):
    gate.error = SystemExit(1)
    with pytest.raises(SystemExit):
        runner.submit(image(0)).result(TIMEOUT)
    gate.error = None
    assert runner.submit(image(1)).result(TIMEOUT).logits[0] == 1


def test_shutdown_answers_what_waits(gate, runner):
    futures = [block(gate, runner), *(runner.submit(image(i)) for i in range(5))]
    runner.shutdown(wait=False)
    with pytest.raises(ShutDown):
        runner.submit(image(0))
    gate.open.set()
    runner.shutdown()
    assert all(future.done() for future in futures)
    assert [future.result().logits[0].item() for future in futures] == [-1, 0, 1, 2, 3, 4]
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.submitted) == (6, 6)


def test_shutdown_without_draining_rejects_what_waits(gate, runner):
    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(5)]
    runner.shutdown(drain=False, wait=False)
    for future in futures:
        with pytest.raises(ShutDown):
            future.result(TIMEOUT)
    gate.open.set()
    assert first.result(TIMEOUT).logits[0] == -1
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.rejected) == (1, 5)
    assert_consistent(runner.stats)


def test_a_cancelled_request_is_not_computed(gate, runner):
    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(3)]
    assert futures[1].cancel()
    gate.open.set()
    wait([first, *futures], TIMEOUT)
    with pytest.raises(CancelledError):
        futures[1].result()
    assert gate.batches[1][0] == 2
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.cancelled) == (3, 1)
    assert_consistent(runner.stats)


def test_a_callback_may_submit_and_shut_down(gate, runner):
    second, called = [], threading.Event()

    def done(future):
        second.append(runner.submit(image(7)))
        runner.shutdown()
        called.set()

    first = block(gate, runner)
    first.add_done_callback(done)
    gate.open.set()
    first.result(TIMEOUT)
    assert called.wait(TIMEOUT)
    runner.shutdown()  # returns when the worker has ended
    assert second[0].result(TIMEOUT).logits[0] == 7


@pytest.mark.parametrize('outcome', ['result', 'error', 'shutdown'])
def test_a_callback_that_exits_harms_nobody_else(gate, runner, outcome):
    def leave(future):
        raise SystemExit(1)

    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(3)]
    futures[0].add_done_callback(leave)
    if outcome == 'shutdown':
        runner.shutdown(drain=False, wait=False)
        assert all(isinstance(future.exception(TIMEOUT), ShutDown) for future in futures)
    else:
        gate.error = ArithmeticError('broken') if outcome == 'error' else None
        first.add_done_callback(leave)
    gate.open.set()
    wait([first, *futures], TIMEOUT)
    assert first.done() and all(future.done() for future in futures)
    if outcome != 'shutdown':
        gate.error = None
        assert runner.submit(image(3)).result(TIMEOUT).logits[0] == 3


def test_clients_that_meddle_with_their_futures(gate, runner):
    first = block(gate, runner)
    futures = [runner.submit(image(i)) for i in range(3)]
    futures[0].set_running_or_notify_cancel()
    futures[1].set_result('mine')
    gate.open.set()
    assert futures[0].result(TIMEOUT).logits[0] == 0 and futures[2].result(TIMEOUT).logits[0] == 2
    assert futures[1].result() == 'mine' and first.done()
    runner.shutdown()
    assert (runner.stats.answered, runner.stats.cancelled) == (3, 1)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_if_the_worker_ends_nobody_waits(gate, runner, monkeypatch):
    def broken():
        raise MemoryError

    first = block(gate, runner)
    future = runner.submit(image(0))
    # No call from outside makes it fail there, that is why it would be unforeseen.
    monkeypatch.setattr(runner, '_next_batch', broken)
    gate.open.set()
    assert first.result(TIMEOUT).logits[0] == -1
    with pytest.raises(ShutDown):
        future.result(TIMEOUT)
    runner.shutdown()
    with pytest.raises(ShutDown):
        runner.submit(image(1))


def test_the_image_may_change_after_it_was_submitted(gate, runner):
    block(gate, runner)
    x = image(5)
    future = runner.submit(x)
    x.zero_()
    gate.open.set()
    assert future.result(TIMEOUT).logits[0] == 5


def test_arrivals_are_forgotten_while_the_model_is_busy(gate, runner, monkeypatch):
    block(gate, runner)
    now = runner_module._clock()
    for i in range(1, 20):
        monkeypatch.setattr(runner_module, '_clock', lambda i=i: now + 60. * i)
        try:
            runner.submit(image(0))
        except Overloaded:
            continue
    assert len(runner._arrivals) == 2  # those of the last 100 seconds; memory has no public name


@pytest.mark.parametrize('drain', [True, False])
def test_many_threads_and_a_shutdown_among_them(gate, drain):
    runner = AdaptiveRunner(gate, latency_target=1., max_batch_size=4, max_queue=8)
    outcomes, lock, start = [], threading.Lock(), threading.Barrier(9)

    def client(number):
        start.wait(TIMEOUT)
        for i in range(50):
            value = number * 100 + i
            try:
                future = runner.submit(image(value))
                outcome = 'answered' if future.result(TIMEOUT).logits[0] == value else 'wrong'
            except Overloaded:
                outcome = 'rejected'
            except ShutDown:
                outcome = 'shut down'
            with lock:
                outcomes.append(outcome)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    start.wait(TIMEOUT)
    while len(outcomes) < 100:
        threading.Event().wait(0.001)
    runner.shutdown(drain=drain)
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(outcomes) == 400 and 'wrong' not in outcomes
    assert outcomes.count('answered') == runner.stats.answered
    assert_consistent(runner.stats)


def test_fewer_members_when_the_queue_is_old(gate, monkeypatch):
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(runner_module, '_clock', lambda: clock.now)
    original = Gate.forward

    def forward(self, x, num_members):
        result = original(self, x, num_members)
        clock.now += SECONDS[num_members][{1: 1, 2: 2, 3: 4, 4: 4}[len(x)]]
        return result

    monkeypatch.setattr(Gate, 'forward', forward)
    with AdaptiveRunner(gate, latency_target=0.1, max_batch_size=4, min_members=1) as runner:
        assert runner.policy.seconds == {
            n: {size: pytest.approx(SECONDS[n][size]) for size in (1, 2, 4)} for n in (1, 2, 4)}
        assert runner.submit(image(0)).result(TIMEOUT).num_members == 4
        while gate.entered.acquire(blocking=False):
            continue
        first = block(gate, runner)
        futures = [runner.submit(image(i)) for i in range(4)]
        clock.now += 0.079  # a hiccup: the four have waited for long when they are served
        gate.open.set()
        assert first.result(TIMEOUT).num_members == 4
        assert [future.result(TIMEOUT).num_members for future in futures] == [1] * 4


@pytest.mark.parametrize('bounds, schedule', [
    (dict(), (1, 2, 4)),
    (dict(min_members=2), (2, 4)),
    (dict(max_members=3), (1, 2, 3)),
    (dict(min_members=3, max_members=3), (3,)),
    (dict(min_members=2, schedule=(2, 3)), (2, 3)),
])
def test_floor_and_ceiling(gate, bounds, schedule):
    with AdaptiveRunner(gate, latency_target=1e-9, max_batch_size=1, **bounds) as runner:
        assert runner.schedule == schedule
        # The target cannot be met, so the floor it is.
        assert runner.submit(image(0)).result(TIMEOUT).num_members == schedule[0]
    with AdaptiveRunner(gate, latency_target=1e9, max_batch_size=1, **bounds) as runner:
        assert runner.submit(image(0)).result(TIMEOUT).num_members == schedule[-1]


@pytest.mark.parametrize('bounds, schedule', [
    ({}, (2, 4)), (dict(min_members=2), (2, 4)), (dict(min_members=3), (3, 4)), (dict(max_members=1), (1,)),
])
def test_the_schedule_of_a_model_that_has_one(gate, bounds, schedule):
    """As an exported folder has; the first two members of this one cost as much as one."""
    gate.schedule = (2, 4)
    with AdaptiveRunner(gate, latency_target=1e9, max_batch_size=1, **bounds) as runner:
        assert runner.schedule == schedule


def test_a_real_model():
    model, x = small_resnet(), images(5)
    with AdaptiveRunner(model, latency_target=100., input_size=(3, 8, 8), max_batch_size=2, warmup_repeats=1) as runner:
        answers = [future.result(TIMEOUT) for future in [runner.submit(one) for one in x.double()]]
    logits = torch.stack([answer.logits for answer in answers])
    torch.testing.assert_close(logits, model(x).detach(), rtol=1e-4, atol=1e-4)
    assert not answers[0].logits.requires_grad


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(latency_target=0.), ValueError, r'latency_target .* 0\.0\.$'),
    (dict(latency_target=float('nan')), ValueError, r'latency_target .* nan\.$'),
    (dict(latency_target=float('inf')), ValueError, r'latency_target .* inf\.$'),
    (dict(latency_target='1'), TypeError, 'latency_target'),
    (dict(max_batch_size=0), ValueError, 'max_batch_size .*1.* 0'),
    (dict(max_queue=0), ValueError, 'max_queue .*1.* 0'),
    (dict(max_queue=1.5), TypeError, r'max_queue .* 1\.5'),
    (dict(min_members=0), ValueError, 'min_members .*1 .*4.* 0'),
    (dict(max_members=5), ValueError, 'max_members .*1 .*4.* 5'),
    (dict(min_members=3, max_members=2), ValueError, 'min_members .*max_members.*3 .*2'),
    (dict(schedule=()), ValueError, r'schedule .*\(\)'),
    (dict(schedule=(2, 1)), ValueError, r'schedule .*\(2, 1\)'),
    (dict(min_members=2, schedule=(1, 2)), ValueError, r'schedule .*2 .*4 .*\(1, 2\)'),
    (dict(input_size=(1, 2, 2)), ValueError, 'input_size'),
])
def test_runner_refuses(gate, kwargs, error, words):
    before = threading.active_count()
    with pytest.raises(error, match=words):
        AdaptiveRunner(gate, **{'latency_target': 1., **kwargs})
    assert threading.active_count() == before


def test_a_model_in_training_mode_is_refused(gate):
    with pytest.raises(ValueError, match='training mode'):
        AdaptiveRunner(gate.train(), 1.)


def test_a_model_that_is_put_in_training_mode_while_it_serves(gate, runner):
    gate.train()
    with pytest.raises(ValueError, match='training mode'):
        runner.submit(image(0)).result(TIMEOUT)
    gate.eval()
    assert runner.submit(image(3)).result(TIMEOUT).logits[0] == 3
    assert (runner.stats.failed, runner.stats.answered) == (1, 1)


def test_a_part_that_is_put_in_training_mode_while_it_serves():
    model = small_resnet()
    with AdaptiveRunner(model, 100., (3, 8, 8), max_batch_size=1, max_members=1, warmup_repeats=1) as runner:
        model.blocks[2].train()
        with pytest.raises(ValueError, match=r'blocks\.2'):
            runner.submit(torch.zeros(3, 8, 8)).result(TIMEOUT)
        model.blocks[2].eval()
        assert runner.submit(torch.zeros(3, 8, 8)).result(TIMEOUT).num_members == 1
    model.classifier.train()
    with pytest.raises(ValueError, match='classifier'):
        AdaptiveRunner(model, 100., (3, 8, 8))


def test_a_queue_is_no_longer_than_the_target_can_serve(gate, monkeypatch):
    """Batches take 0.09 s, so 8 fit into 80 % of a target of 1 s, the one that is being computed included."""
    with AdaptiveRunner(gate, latency_target=1., max_batch_size=4, max_members=1) as runner:
        runner.policy.seconds = {1: {1: 0.09, 2: 0.09, 4: 0.09}}
        runner.policy.slowdown = 1.
        monkeypatch.setattr(runner_module, '_clock', lambda: 1.)
        while gate.entered.acquire(blocking=False):
            continue
        futures = [block(gate, runner)]
        with pytest.raises(Overloaded, match=r'28 .*latency_target=1 '):
            for _ in range(100):
                futures.append(runner.submit(image(0)))
        assert len(futures) == 1 + 7 * 4 and runner.stats.rejected == 1
        gate.open.set()
        wait(futures, TIMEOUT)
    assert_consistent(runner.stats)


@pytest.mark.parametrize('waiting, busy, late', [
    (0, 0., False), (0, 0.078, False), (0, 0.08, True), (8 * 7, 0., False), (8 * 8, 0., True),
])
def test_policy_foresees_who_would_be_late(waiting, busy, late):
    seconds = {1: {1: 0.001, 8: 0.01}, 4: {1: 0.01, 8: 0.1}}
    assert MemberPolicy(0.1, seconds).would_be_late(waiting, busy) is late


PROCESS = '''
import atexit, os, sys

@atexit.register  # before the package does, so it is called after what the package registers
def too_late():
    try:
        AdaptiveRunner(runner.model, 1.)
    except RuntimeError as error:
        print('too late:', error)

import torch
from timm_hne import AdaptiveRunner

class Busy(torch.nn.Module):
    ensemble_size, num_classes, in_chans, pretrained_cfg = 4, 2, 3, {'input_size': (3, 2, 2)}

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, num_members):
        weight = torch.ones(300, 300)
        for _ in range(30):  # long enough to compute while Python is being taken down
            weight = (weight @ weight).clamp(max=1)
        return x[:, :2, 0, 0]

torch.set_num_threads(1)
runner = AdaptiveRunner(Busy().eval(), latency_target=1000., max_batch_size=1)
parent = os.getpid()
child = os.fork()
if not child:
    try:
        runner.submit(torch.zeros(3, 2, 2))
    except RuntimeError as error:
        runner.shutdown()
        os._exit(7 if str(parent) in str(error) and str(os.getpid()) in str(error) else 1)
    os._exit(2)
print('child:', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print('logits:', len(runner.submit(torch.zeros(3, 2, 2)).result(60).logits))
futures = [runner.submit(torch.zeros(3, 2, 2)) for _ in range(50)]
sys.exit(3)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there are no forks here')
def test_forks_and_the_end_of_a_process():
    """A fork is told that its requests would never end; a process ends with a busy runner, and makes none by then.

    The thread of a runner that is made when the process ends would compute while Python is being taken down.
    """
    result = subprocess.run([sys.executable, '-c', PROCESS], capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert result.returncode == 3, result.stderr
    child, logits, late = result.stdout.splitlines()
    assert (child, logits) == ('child: 7', 'logits: 2')
    assert late.startswith('too late: ') and 'process' in late


@pytest.mark.parametrize('request_, error, words', [
    (torch.zeros(3, 3, 2), ValueError, r'image .*\(3, 2, 2\).*\(3, 3, 2\)'),
    (torch.zeros(1, 3, 2, 2), ValueError, r'image .*\(3, 2, 2\).*\(1, 3, 2, 2\)'),
    (torch.zeros(3, 2, 2, dtype=torch.uint8), TypeError, 'image .*uint8'),
    ('image', TypeError, 'image .*str'),
])
def test_submit_refuses(runner, request_, error, words):
    with pytest.raises(error, match=words):
        runner.submit(request_)
    assert runner.stats.submitted == 0


# The benchmark of it.

@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks')
    return importlib.import_module('load')


def test_benchmark_of_a_model_that_fails_ends(gate, load, monkeypatch):
    class FailsAfterItsWarmUp(AdaptiveRunner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            gate.error = ArithmeticError('broken')

    monkeypatch.setattr(load, 'AdaptiveRunner', FailsAfterItsWarmUp)
    raised = []

    def drive():
        with pytest.raises(ArithmeticError, match='broken') as error:
            load.drive(gate, torch.zeros(2, 3, 2, 2), torch.zeros(2), [0., 0.001], 100., {})
        raised.append(error)

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert raised


def test_benchmark_with_few_answers(gate, load):
    records = load.drive(gate, torch.zeros(2, 3, 2, 2), torch.zeros(2), [0., 0.001, 0.002], 100., {})
    assert load.summary(records)['p99_ms'] > 0 and load.summary(records)['members'] == 4
    one = load.summary(records[:1])
    assert one['p50_ms'] is one['p99_ms'] is None and one['members'] == 4
    assert load.summary([{'arrival': 0., 'rejected': True}]) == {
        'requests': 1, 'rejected': 1, 'p50_ms': None, 'p99_ms': None, 'accuracy': None, 'members': None}


def test_public_name():
    assert timm_hne.AdaptiveRunner is AdaptiveRunner

# Requests with wishes of their own.

def wished(model, requests, target=100.):
    """Answer requests (image, arguments of submit) in one batch."""
    entered, go = threading.Event(), threading.Event()
    with AdaptiveRunner(
            model, target, (3, 8, 8), max_batch_size=len(requests), max_queue=100, warmup_repeats=1) as runner:
        evaluate = runner._evaluate

        def wait(batch, n):
            entered.set()
            assert go.wait(TIMEOUT)
            return evaluate(batch, n)

        runner._evaluate = wait
        first = runner.submit(images(1)[0])
        assert entered.wait(TIMEOUT)
        futures = [runner.submit(one, **wishes) for one, wishes in requests]
        go.set()
        first.result(TIMEOUT)
        answers = [future.result(TIMEOUT) for future in futures]
    assert_consistent(runner.stats)
    assert runner.stats.members == model.ensemble_size + sum(answer.num_members for answer in answers)
    return answers


@pytest.mark.parametrize('optimized', [False, True])
def test_members_and_thresholds_of_single_requests(optimized):
    plain, x = small_resnet(), images(7)
    model = optimize_for_inference(plain, engine='eager') if optimized else plain
    size = model.ensemble_size
    sure = plain(x, num_members=1).softmax(1).amax(1)[3].item()
    wishes = [
        dict(), dict(num_members=1), dict(num_members=3), dict(threshold=sure - 1e-4), dict(threshold=1.),
        dict(threshold=0., num_members=2), dict(num_members=size)]
    answers = wished(model, list(zip(x, wishes)))
    assert [answer.num_members for answer in answers] == [size, 1, 3, 1, size, 1, size]
    for i, answer in enumerate(answers):
        direct = plain(x[i:i + 1], num_members=answer.num_members)[0].detach()
        torch.testing.assert_close(answer.logits, direct, rtol=1e-4, atol=1e-4)


def test_no_request_waits_for_a_program_that_is_missing(monkeypatch):
    model, steps = optimize_for_inference(small_resnet(), engine='eager'), set()
    advance = type(model).advance

    def noted(self, frontier, start, stop):
        first = next(leaf for leaf in tree_leaves(frontier) if isinstance(leaf, torch.Tensor))
        steps.add((start, stop, min(len(first), 2)))
        return advance(self, frontier, start, stop)

    monkeypatch.setattr(type(model), 'advance', noted)
    with AdaptiveRunner(model, 60., (3, 8, 8), max_batch_size=4, warmup_repeats=1) as runner:
        warm = set(steps)
        for image, wishes in zip(images(3), (dict(), dict(num_members=3), dict(threshold=1.))):
            runner.submit(image, **wishes).result(TIMEOUT)
    assert steps == warm


def test_members_of_single_requests_for_one_class():
    model, x = small_resnet(num_classes=1), images(3)
    answers = wished(model, list(zip(x, [dict(num_members=1), dict(num_members=3), dict()])))
    for row, answer, n in zip(x, answers, [1, 3, model.ensemble_size]):
        assert answer.num_members == n
        torch.testing.assert_close(answer.logits, model(row[None], num_members=n)[0].detach(), rtol=1e-4, atol=1e-4)


def test_few_members_for_all_are_all_that_is_computed(gate, runner):
    gate.advance = lambda frontier, start, stop: (
        gate.batches.append((start, stop)), (torch.zeros(len(frontier[0]), stop - start, 2), frontier))[1]
    gate.nodes = (1,)
    assert runner.submit(image(0), num_members=2).result(TIMEOUT).num_members == 2
    assert gate.batches == [(0, 1), (1, 2)]


def test_a_deadline_makes_members_fall(gate):
    with AdaptiveRunner(gate, latency_target=100., max_batch_size=4) as runner:
        runner.policy.seconds = {n: {size: float(n) for size in (1, 2, 4)} for n in (1, 2, 4)}
        runner.policy.record = lambda *args: None
        found = [runner.submit(image(0), deadline=s).result(TIMEOUT).num_members for s in (1.5, 3., 6., 1000.)]
        assert found == [1, 2, 4, 4]
        with pytest.raises(Overloaded, match=r'deadline=1\.1 s'):
            runner.submit(image(0), deadline=1.1)
        assert_consistent(runner.stats)


def test_what_a_request_has_taken_before_makes_members_fall(gate):
    with AdaptiveRunner(gate, latency_target=10., max_batch_size=4) as runner:
        runner.policy.seconds = {n: {size: float(n) for size in (1, 2, 4)} for n in (1, 2, 4)}
        runner.policy.record = lambda *args: None
        found = [runner.submit(image(0), age=s).result(TIMEOUT).num_members for s in (0., 4.5, 6.5, 8.5, 1000.)]
        assert found == [4, 4, 2, 1, 1]  # the last is late, but nobody could be faster
        assert runner.submit(image(0), deadline=100., age=90.).result(TIMEOUT).num_members == 4
        with pytest.raises(Overloaded, match='deadline=3 s'):
            runner.submit(image(0), deadline=3., age=2.)
        first = block(gate, runner)
        with pytest.raises(Overloaded, match='latency_target=10 s'):
            runner.submit(image(1), age=9.)
        gate.open.set()
        first.result(TIMEOUT)
        assert_consistent(runner.stats)


def test_after_a_stall_deadlines_are_kept_again(gate):
    gate.advance = lambda frontier, start, stop: (torch.zeros(len(frontier[0]), stop - start, 2), frontier)
    gate.nodes = (1,)
    with AdaptiveRunner(gate, latency_target=100., max_batch_size=4) as runner:
        runner.policy.seconds = {n: {size: 0.02 * n for size in (1, 2, 4)} for n in (1, 2, 4)}
        for options in ({}, {'threshold': 1.}, {'num_members': 1}):
            runner.policy.slowdown = 1000.
            for _ in range(60):
                runner.submit(image(0), deadline=10., **options).result(TIMEOUT)
            assert runner.policy.slowdown < 1.1
        with pytest.raises(DeadlineTooShort):
            runner.submit(image(0), deadline=0.02)
        assert_consistent(runner.stats)


def test_a_deadline_behind_others_makes_theirs_fall_too(gate):
    with AdaptiveRunner(gate, latency_target=100., max_batch_size=1) as runner:
        runner.policy.seconds = {n: {1: float(n)} for n in (1, 2, 4)}
        runner.policy.record = lambda *args: None
        first = block(gate, runner)
        patient, urgent = runner.submit(image(0)), runner.submit(image(1), deadline=9.)
        with pytest.raises(Overloaded):
            runner.submit(image(2), deadline=4.)
        gate.open.set()
        assert first.result(TIMEOUT).num_members == 4
        assert [patient.result(TIMEOUT).num_members, urgent.result(TIMEOUT).num_members] == [2, 4]


@pytest.mark.parametrize('wishes, error', [
    (dict(num_members=0), ValueError), (dict(num_members=5), ValueError), (dict(num_members=2.), TypeError),
    (dict(deadline=0.), ValueError), (dict(deadline=float('nan')), ValueError), (dict(deadline='1'), TypeError),
    (dict(threshold=1.5), ValueError), (dict(threshold='sure'), TypeError),
    (dict(age=-1.), ValueError), (dict(age=None), TypeError),
])
def test_wishes_that_are_refused(gate, runner, wishes, error):
    with pytest.raises(error, match=next(iter(wishes))):
        runner.submit(image(0), **wishes)
    assert runner.stats.submitted == 0
