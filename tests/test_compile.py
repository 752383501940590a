"""Compilation of the optimised model: one program for all batches, lazily, again after a move, or not at all."""
import copy
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_inference import images
from test_optimize import assert_like
from tiny import tiny_ensemble

from timm_hne.inference import optimize_for_inference
from timm_hne.inference.engines import eager


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """Everything is equally fast."""
    monkeypatch.setattr(eager, 'shortest_times', lambda functions, device: dict.fromkeys(functions, 1.))


@pytest.fixture
def traced(monkeypatch):
    """Trace as for compilation but run the graphs as they are; count the graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    really_compile = torch.compile

    def compile(function, options):
        options = {'guard_filter_fn': options['guard_filter_fn']}
        return really_compile(function, backend=backend, options=options, fullgraph=True)

    monkeypatch.setattr(torch, 'compile', compile)
    return graphs


def test_one_graph_per_number_of_members_for_all_batch_sizes(traced):
    model = tiny_ensemble()
    fast = optimize_for_inference(model, engine='inductor')
    for count, n in enumerate((1, 3), start=1):
        for batch_size in (2, 3, 5):
            x = images(batch_size)
            assert_like(fast(x, num_members=n), model(x, num_members=n))
        assert len(traced) == count
    for _ in range(2):
        assert_like(fast(images(1), num_members=3), model(images(1), num_members=3))
        assert len(traced) == 3


@pytest.mark.parametrize('kind', ['branched', 'pairs'])
def test_steps_are_compiled_once_too(traced, kind):
    model = tiny_ensemble((1, 2), kind)
    fast = optimize_for_inference(model, engine='inductor')
    for batch_size in (3, 4):
        x = images(batch_size)
        for n, logits in zip((1, 2), fast.anytime(x), strict=True):
            assert_like(logits, model(x, num_members=n))
    assert len(traced) == 2


def test_graphs_are_made_lazily_and_again_after_a_move(traced):
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, engine='inductor')
    assert len(traced) == 0
    fast = optimize_for_inference(model, x, engine='inductor')
    assert len(traced) == 1
    fast(x)
    assert len(traced) == 1
    fast.double()
    assert_like(fast(x), model(x))
    assert len(traced) == 2


def test_a_copy_compiles_for_itself(traced):
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, x, engine='inductor')
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for p in fast.parameters():
            p.data.zero_()
        assert_like(twin(x), model(x))
        fast = copy.deepcopy(twin)


def test_without_a_compiler_it_runs_eagerly(monkeypatch):
    def unavailable(function, options):
        raise RuntimeError('no compiler found')

    monkeypatch.setattr(torch, 'compile', unavailable)
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, engine='inductor')
    assert fast.mode == 'inductor'
    with pytest.warns(UserWarning, match='no compiler found'):
        assert_like(fast(x), model(x))
    assert fast.mode == 'eager'
    assert_like(fast(x, num_members=2), model(x, num_members=2))


def test_a_later_failure_of_the_compiler_is_survived_too(monkeypatch):
    """As of an image size that needs another program."""
    model, size = tiny_ensemble(), 8

    def compile(function, options):
        def program(x, *rest):
            if x.shape[-1] != size:
                raise NotImplementedError('cannot compile this')
            return function(x, *rest)
        return program

    monkeypatch.setattr(torch, 'compile', compile)
    fast = optimize_for_inference(model, engine='inductor')
    assert_like(fast(images()), model(images()))
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            assert_like(fast(images(size=16)), model(images(size=16)))
        assert sum('cannot compile this' in str(warning.message) for warning in caught) == expected
    assert fast.mode == 'eager'
    assert_like(fast(images(), 1), model(images(), num_members=1))


def test_a_lack_of_memory_is_not_a_lack_of_a_compiler(monkeypatch):
    model, attempts = tiny_ensemble(), []

    def compile(function, options):
        def program(*frontier):
            attempts.append(1)
            if len(attempts) == 2:
                raise torch.OutOfMemoryError('no memory left')
            return function(*frontier)
        return program

    monkeypatch.setattr(torch, 'compile', compile)
    fast = optimize_for_inference(model, images(), engine='inductor')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(torch.OutOfMemoryError):
            fast(images())
        assert_like(fast(images()), model(images()))
    assert len(attempts) == 3 and fast.mode == 'inductor'


def test_a_program_runs_while_another_is_made(monkeypatch):
    model, making, finish = tiny_ensemble(), threading.Event(), threading.Event()

    monkeypatch.setattr(torch, 'compile', lambda function, options: function)
    fast = optimize_for_inference(model, engine='inductor')
    fast(images(), 1)

    def slowly(function, options):
        making.set()
        assert finish.wait(60)
        return function

    monkeypatch.setattr(torch, 'compile', slowly)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(fast, images(), 4)
        assert making.wait(60)
        quick = pool.submit(fast, images(), 1)
        try:
            assert_like(quick.result(30), model(images(), num_members=1))
            assert not slow.done()
        finally:
            finish.set()
        assert_like(slow.result(60), model(images(), num_members=4))


def test_first_calls_from_many_threads_measure_and_build_once(monkeypatch):
    measured, compiled = [], []

    def seconds(functions, device):
        measured.append(set(functions))
        time.sleep(0.02)
        return dict.fromkeys(functions, 1.)

    def compile(function, options):
        compiled.append(function)
        time.sleep(0.02)
        return function

    monkeypatch.setattr(eager, 'shortest_times', seconds)
    monkeypatch.setattr(torch, 'compile', compile)
    model = tiny_ensemble()
    fast = optimize_for_inference(model, engine='inductor')
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fast, [images()] * 4))
    assert measured.count({'contiguous', 'channels_last'}) == 1 and len(compiled) == 1
    for result in results:
        assert_like(result, model(images()))


def test_really_compiled():
    """By PyTorch's own compiler; its programs have regions of their own in a profile."""
    model = tiny_ensemble((1, 2), channels=4)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='Compilation')
        fast = optimize_for_inference(model, images(), engine='inductor')
        assert fast.mode == 'inductor'
        for x in (images(), images(5)):
            with torch.profiler.profile() as profile:
                assert_like(fast(x), model(x))
            assert any('Compiled' in event.key for event in profile.key_averages())


def test_mode_says_what_ran(monkeypatch):
    """A table or a row of a benchmark that says 'inductor' must not be of a model that fell back."""
    fail = []

    def compile(function, options):
        if fail:
            raise RuntimeError('no compiler found')
        return function

    monkeypatch.setattr(torch, 'compile', compile)
    assert optimize_for_inference(tiny_ensemble(), images(), engine='eager').mode == 'eager'
    fast = optimize_for_inference(tiny_ensemble(), images(), engine='inductor')
    assert fast.mode == 'inductor'
    fail.append(True)
    with pytest.warns(UserWarning, match='no compiler found'):
        fast(images(), 1)
    assert fast.mode == 'partly inductor'
