"""Anytime prediction and extraction, against direct evaluation of every number of members."""
import collections
import gc
import math
import weakref

import naive
import numpy as np
import pytest
import timm
import torch
from tiny import KINDS, tiny_ensemble
from torch.utils.flop_counter import FlopCounterMode

from timm_hne.evaluation.cost import member_macs, member_params
from timm_hne.inference import anytime, early_exit
from timm_hne.models import anytime as anytime_module
from timm_hne.models.frontier import advance, first_frontier
from timm_hne.tree import prefixes

every_tree = pytest.mark.parametrize('nodes', [(1, 2, 4, 8), (1, 1, 6), (3, 3, 3), (1, 3, 3, 6), (2, 2, 8), (1, 1, 1)])
every_kind = pytest.mark.parametrize('kind', KINDS)


def small_resnet(nodes=(1, 1, 2, 4, 4), **kwargs):
    torch.manual_seed(0)
    return naive.randomize(timm.create_model('hne_resnet50_c8', width=4, nodes=nodes, **kwargs)).eval()


def small_mobilenet(nodes=(1, 2, 4, 8)):
    torch.manual_seed(0)
    return naive.randomize(timm.create_model('hne_mobilenetv2_075_e8', nodes=nodes, num_classes=7)).eval()


def images(batch_size=3, size=8):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def direct(model, x):
    return {n: model(x, num_members=n) for n in range(1, model.ensemble_size + 1)}


def schedules(size):
    odd = {(size,), tuple(range(1, size + 1)), prefixes(size), tuple(range(2, size + 1, 3)) or (1,), (1, size)}
    return sorted(schedule for schedule in odd if all(a < b for a, b in zip(schedule, schedule[1:])))


# Anytime.

@every_tree
@pytest.mark.parametrize('kind', [*KINDS, 'pairs'])
def test_anytime_equals_direct_evaluation(nodes, kind):
    model, x = tiny_ensemble(nodes, kind).double(), images().double()
    expected = direct(model, x)
    for schedule in schedules(model.ensemble_size):
        for n, logits in zip(schedule, model.anytime(x, schedule), strict=True):
            torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)
    for n, logits in zip(prefixes(model.ensemble_size), model.anytime(x), strict=True):
        torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('nodes', [(1, 2, 4, 8), (4, 4, 4), (2, 4, 12)])
def test_the_images_may_change_between_steps(nodes):
    """A server may use the same memory for the next batch."""
    model, x = tiny_ensemble(nodes), images()
    expected = direct(model, x)
    steps = model.anytime(x)
    for n, logits in zip(prefixes(model.ensemble_size), steps, strict=True):
        torch.testing.assert_close(logits, expected[n], rtol=1e-4, atol=1e-4)
        x.zero_()


@pytest.mark.parametrize('x, name', [
    (np.zeros((2, 3, 8, 8), np.float32), 'ndarray'),
    ([[0.]], 'list'),
    (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 'uint8'),
    (torch.zeros(2, 3, 8, 8, dtype=torch.bool), 'bool'),
])
def test_what_is_no_tensor_of_numbers_is_refused(x, name):
    model = tiny_ensemble()
    for call in (lambda: model(x), lambda: model.anytime(x), lambda: early_exit(model, x, 0.5)):
        with pytest.raises(TypeError, match=f'x .*{name}'):
            call()


@pytest.mark.parametrize('channels', [1, 2, 6])
@pytest.mark.parametrize('nodes', [(1, 2, 4), (2, 2, 4)])
def test_images_with_other_channels_are_refused(nodes, channels):
    model, x = tiny_ensemble(nodes), torch.zeros(2, channels, 8, 8)
    for call in (
            lambda: model(x), lambda: model(x, num_members=1), lambda: model.forward_intermediates(x, num_members=1),
            lambda: model.anytime(x), lambda: early_exit(model, x, 0.5),
    ):
        with pytest.raises(ValueError, match=rf'x .*3.*\[2, {channels}, 8, 8\]'):
            call()


@pytest.mark.parametrize('create, size', [(small_resnet, 8), (small_mobilenet, 32)])
def test_anytime_of_the_families(create, size):
    """One has hidden layers, and both have shortcuts."""
    model, x = create(), images(2, size)
    expected = direct(model, x)
    for schedule in (prefixes(model.ensemble_size), (1, 3, 4)):
        for n, logits in zip(schedule, model.anytime(x, schedule)):
            torch.testing.assert_close(logits, expected[n], rtol=1e-4, atol=1e-4)


@every_tree
@every_kind
@pytest.mark.parametrize('all_steps', [False, True])
def test_anytime_computes_nothing_twice(nodes, kind, all_steps):
    model, x = tiny_ensemble(nodes, kind), images(1)
    schedule = tuple(range(1, model.ensemble_size + 1)) if all_steps else None
    with FlopCounterMode(display=False) as once, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as steps:
        list(model.anytime(x, schedule))
    assert steps.get_total_flops() == once.get_total_flops()


def test_anytime_stops_computing_when_interrupted():
    model, x = tiny_ensemble(), images(1)
    with FlopCounterMode(display=False) as counter:
        iterator = model.anytime(x)
        next(iterator)
        iterator.close()
    assert counter.get_total_flops() == 2 * member_macs(model, 8)[1]
    torch.testing.assert_close(list(model.anytime(x))[-1], direct(model, x)[4], rtol=1e-5, atol=1e-5)


def test_anytime_keeps_one_node_per_block_and_frees_it():
    model = small_resnet((1, 2, 4, 8, 16))
    _, frontier = advance(model, first_frontier(model, images()), 0, 5)
    # Of the nodes (1, 1, 2, 3, 5) that these members use, the last of the first, third and fourth block have a child to
    # come.
    kept = [None if features is None else features.shape[1] for features in frontier]
    assert kept == [None, *(model.blocks[b].out_channels if b in (0, 2, 3) else None for b in range(4))]
    for features in frontier:
        assert features is None or features.untyped_storage().nbytes() == features.nbytes
    _, frontier = advance(model, frontier, 5, 16)
    assert frontier == (None,) * 5


def test_anytime_leaves_the_callers_grad_mode_alone():
    model = tiny_ensemble()
    iterator = model.anytime(images())
    assert not next(iterator).requires_grad
    assert torch.is_grad_enabled()


def test_anytime_does_not_keep_the_model_alive():
    model = tiny_ensemble()
    list(model.anytime(images(), deadline=1e9))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Clock:
    """A clock that only moves when told to, and a model on it whose steps take `seconds[stop]`."""

    def __init__(self, monkeypatch, model, seconds):
        self.now = 100.
        monkeypatch.setattr(anytime_module, '_clock', lambda: self.now)
        original = anytime_module.advance

        def timed(model, frontier, start, stop):
            self.now += seconds[stop]
            return original(model, frontier, start, stop)

        monkeypatch.setattr(anytime_module, 'advance', timed)


@pytest.mark.parametrize('deadline, steps', [
    (-1., 1), (0., 1), (1., 1), (2.9, 1), (3., 2), (6.9, 2), (7., 3), (math.inf, 3),
])
def test_deadline_is_kept_by_measured_times(monkeypatch, deadline, steps):
    model, x = tiny_ensemble(), images()
    clock = Clock(monkeypatch, model, {1: 1., 2: 2., 4: 4.})
    assert len(list(model.anytime(x, deadline=1e9))) == 3
    begin = clock.now
    assert len(list(model.anytime(x, deadline=deadline))) == steps
    assert clock.now - begin <= max(deadline, 1.)


def test_deadline_counts_the_time_of_the_caller(monkeypatch):
    model, x = tiny_ensemble(), images()
    clock = Clock(monkeypatch, model, {1: 1., 2: 1., 4: 1.})
    list(model.anytime(x, deadline=1e9))
    iterator = model.anytime(x, deadline=3.)
    next(iterator)
    clock.now += 1.5
    assert list(iterator) == []


def test_deadline_goes_by_the_slowest_recent_step(monkeypatch):
    model, x = tiny_ensemble(), images()
    seconds = {1: 1., 2: 1., 4: 1.}
    Clock(monkeypatch, model, seconds)
    seconds[2] = 5.
    list(model.anytime(x, deadline=1e9))
    seconds[2] = 1.
    assert len(list(model.anytime(x, deadline=3.))) == 1
    for _ in range(5):
        list(model.anytime(x, deadline=1e9))
    assert len(list(model.anytime(x, deadline=3.))) == 3


def test_a_time_that_another_thread_forgets(monkeypatch):
    model, x = tiny_ensemble(), images()
    Clock(monkeypatch, model, {1: 1., 2: 5., 4: 1.})
    list(model.anytime(x, deadline=1e9))

    class Taken(collections.deque):
        def popleft(self):
            self.clear()
            return super().popleft()

    measured = anytime_module._step_times[model]
    for key in measured:
        measured[key] = Taken(measured[key])
    assert len(list(model.anytime(x, deadline=3.))) == 1


def test_one_slow_step_is_forgotten_when_it_keeps_being_declined(monkeypatch):
    model, x = tiny_ensemble(), images()
    seconds = {1: 1., 2: 1., 4: 500.}
    Clock(monkeypatch, model, seconds)
    list(model.anytime(x, deadline=1e9))
    seconds[4] = 1.
    # Too late whatever the step would take: that says nothing about its times.
    for _ in range(9):
        assert len(list(model.anytime(x, deadline=0.))) == 1
    assert len(list(model.anytime(x, deadline=100.))) == 2
    assert len(list(model.anytime(x, deadline=100.))) == 3


def test_compilation_is_not_taken_for_the_time_of_a_step(monkeypatch):
    model, x = tiny_ensemble(), images()
    seconds, first = {1: 1., 2: 1., 4: 1.}, set()

    def step(frontier, start, stop):
        clock.now += 0. if stop in first else 50.
        first.add(stop)
        return advance(model, frontier, start, stop)

    clock = Clock(monkeypatch, model, seconds)
    model.advance = step
    assert len(list(model.anytime(x, deadline=1e9))) == 3
    assert len(list(model.anytime(x, deadline=30.))) == 3


def test_deadline_of_a_first_call_is_predicted_from_the_work(monkeypatch):
    model, x = small_resnet((1, 2, 4, 8, 16)), images()
    macs = member_macs(model, 8)
    seconds = {n: (macs[n] - macs.get(n // 2, 0)) / macs[1] for n in prefixes(16)}
    clock = Clock(monkeypatch, model, seconds)
    deadline = macs[16] / macs[1] * 0.9
    begin = clock.now
    assert len(list(model.anytime(x, deadline=deadline))) == 4
    assert clock.now - begin <= deadline


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(schedule=()), ValueError, r'schedule .*\(\)'),
    (dict(schedule=(2, 1)), ValueError, r'schedule .*\(2, 1\)'),
    (dict(schedule=(1, 1)), ValueError, r'schedule .*\(1, 1\)'),
    (dict(schedule=(0, 1)), ValueError, r'schedule\[0\] .*0'),
    (dict(schedule=(1, 5)), ValueError, r'schedule\[1\] .*4.* 5'),
    (dict(schedule=(1, 2.)), TypeError, r'schedule\[1\] .*2.0'),
    (dict(schedule=(True, 2)), TypeError, r'schedule\[0\] .*True'),
    (dict(schedule=3), TypeError, 'schedule .*3'),
    (dict(schedule='12'), TypeError, "schedule .*'12'"),
    (dict(deadline='1'), TypeError, "deadline .*'1'"),
    (dict(deadline=True), TypeError, 'deadline .*True'),
    (dict(deadline=math.nan), ValueError, 'deadline .*nan'),
])
def test_anytime_refuses_at_the_call(kwargs, error, words):
    with pytest.raises(error, match=words):
        tiny_ensemble().anytime(images(), **kwargs)


def test_a_model_that_cannot_predict_is_refused():
    model = tiny_ensemble()
    with pytest.raises(ValueError, match=r'x .*\[3, 8, 8\]'):
        model.anytime(torch.zeros(3, 8, 8))
    for other in (torch.nn.Linear(1, 1), timm.create_model('resnet18', num_classes=2), 'hne_resnet50_c8', None):
        for call in (lambda m=other: anytime(m, images()), lambda m=other: early_exit(m, images(), 0.5)):
            with pytest.raises(TypeError, match=f'model .*{type(other).__name__}'):
                call()
    model.train()
    for call in (lambda: model.anytime(images()), lambda: early_exit(model, images(), 0.5)):
        with pytest.raises(ValueError, match='training mode'):
            call()
    model.eval().reset_classifier(0)
    for call in (lambda: model.anytime(images()), lambda: early_exit(model, images(), 0.5)):
        with pytest.raises(ValueError, match='classifier'):
            call()


def test_empty_batch():
    model = tiny_ensemble()
    assert [logits.shape for logits in model.anytime(images(0))] == [(0, 5)] * 3
    result = early_exit(model, images(0), 0.5)
    assert result.logits.shape == (0, 5) and result.num_members.shape == (0,)


# Extract.

@every_tree
@every_kind
def test_extract_equals_the_prefix_and_holds_nothing_else(nodes, kind):
    model, x = tiny_ensemble(nodes, kind), images()
    expected, params = direct(model, x), member_params(model)
    for n in range(1, model.ensemble_size + 1):
        part = model.extract(n)
        assert type(part) is type(model) and part.ensemble_size == part.num_members == n
        assert sum(p.numel() for p in part.parameters()) == params[n]
        for m, logits in direct(part, x).items():
            torch.testing.assert_close(logits, expected[m], rtol=1e-5, atol=1e-5)
        for m, logits in zip(prefixes(n), part.anytime(x), strict=True):
            torch.testing.assert_close(logits, expected[m], rtol=1e-5, atol=1e-5)
        assert part.forward_members(x).shape == (3, n, 5)
        with pytest.raises(ValueError, match=rf'num_members .*{n}, got {n + 1}'):
            part(x, num_members=n + 1)


def test_extract_of_a_uniform_prefix_is_what_timm_creates():
    model, x = small_resnet((1, 2, 4, 8, 16)), images()
    for n, nodes in ((1, (1, 1, 1, 1, 1)), (2, (1, 1, 1, 1, 2)), (4, (1, 1, 1, 2, 4)), (8, (1, 1, 2, 4, 8))):
        part = model.extract(n)
        assert part.nodes == nodes
        created = timm.create_model('hne_resnet50_c8', width=4, nodes=nodes).eval()
        created.load_state_dict(part.state_dict())
        torch.testing.assert_close(created(x), model(x, num_members=n), rtol=1e-5, atol=1e-5)
        for name in ('nodes', 'ensemble_size', 'num_features', 'head_hidden_size', 'feature_info'):
            assert getattr(part, name) == getattr(created, name), name
        assert str(part) == str(created)


def test_timm_saves_an_extract_as_what_it_is(tmp_path):
    model = timm.create_model('hne_resnet50_c8', num_classes=3, num_members=8).eval()
    part, x = model.extract(4), images(size=32)
    timm.models.save_for_hf(part, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.nodes == part.nodes == (1, 1, 1, 2, 4)
    torch.testing.assert_close(loaded(x), model(x, num_members=4), rtol=1e-5, atol=1e-5)


def test_extract_of_mobilenet_and_of_an_extract():
    model, x = small_mobilenet(), images(2, 32)
    with torch.no_grad():
        expected = {n: model(x, num_members=n) for n in (3, 5)}
    part = model.extract(5)
    torch.testing.assert_close(part(x), expected[5], rtol=1e-4, atol=1e-4)
    again = part.extract(3)
    torch.testing.assert_close(again(x), expected[3], rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in again.parameters()) == member_params(model)[3]


def test_extract_shares_no_memory_and_can_be_trained():
    model, x = tiny_ensemble(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = model.extract(3).train()
    part(x).sum().backward()
    torch.optim.SGD(part.parameters(), lr=1.).step()
    assert all(p.grad is not None for p in part.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize('num_members, error', [(0, ValueError), (5, ValueError), (2., TypeError), (True, TypeError)])
def test_extract_refuses(num_members, error):
    with pytest.raises(error, match='num_members'):
        tiny_ensemble().extract(num_members)
