"""Engines of the optimised model against the original: any number of members, steps, sizes, threads, and the cache."""
import copy
import importlib.util
import logging
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from test_early_exit import undecided
from test_inference import images, small_mobilenet, small_resnet
from test_optimize import assert_like
from timm.layers import Conv2dSame
from tiny import tiny_ensemble

from timm_hne import AdaptiveRunner, LatencyTable, early_exit, optimize_for_inference
from timm_hne.inference import engines, optimize, programs
from timm_hne.inference.engines import ENGINES
from timm_hne.inference.engines.onnx_programs import OnnxRuntime, OpenVINO
from timm_hne.inference.folding import folded

needs_openvino = pytest.mark.skipif(importlib.util.find_spec('openvino') is None, reason='openvino is not installed')
every_runtime = pytest.mark.parametrize('engine', ['onnxruntime', pytest.param('openvino', marks=needs_openvino)])


@pytest.fixture
def made(monkeypatch):
    """The steps that are exported, rather than read from the cache."""
    steps, make = [], programs.make_program
    monkeypatch.setattr(programs.ProgramStore.__init__, '__defaults__', (
        lambda model, start, stop, size: steps.append((start, stop)) or make(model, start, stop, size), ''))
    return steps


@pytest.mark.parametrize('nodes, kind', [
    ((1, 2, 4), 'branched'), ((3, 3, 3), 'branched'), ((1, 3, 6), 'replicated'), ((1, 2), 'pairs'),
])
def test_every_number_of_members_and_every_step(nodes, kind):
    """All engines in one test, as they read the same programs, which take their time to be made."""
    model, x = tiny_ensemble(nodes, kind), images()
    numbers = {1, 3, model.ensemble_size} & set(range(1, model.ensemble_size + 1))
    for engine in [name for name in ('onnxruntime', 'openvino') if not ENGINES[name].missing()]:
        fast = optimize_for_inference(model, engine=engine)
        for n in sorted(numbers):
            for batch in (x, x[:1]):
                assert_like(fast(batch, num_members=n), model(batch, num_members=n))
        assert_like(fast.forward_members(x), model.forward_members(x).detach())
        for n, logits in zip(sorted(numbers), fast.anytime(x, sorted(numbers)), strict=True):
            assert_like(logits, model(x, num_members=n))
        assert fast.mode == engine


@pytest.mark.parametrize('create, size', [
    (lambda: small_resnet((1, 1, 1, 2, 2)), 16), (lambda: small_mobilenet((1, 1, 1, 2)).extract(1), 32),
    (lambda: tiny_ensemble((1, 2, 4)).extract(3), 8),
])
def test_the_families_and_an_extracted_prefix(create, size, shallow):
    model, x = create(), images(2, size)
    fast = optimize_for_inference(model, engine='onnxruntime')
    assert_like(fast(x), model(x))


def test_a_tree_of_timms_stages():
    torch.manual_seed(0)
    model = timm.create_model('hne_from_timm', base='test_resnet', nodes=(1, 1, 1, 1, 2), num_classes=5).eval()
    x = images(2, 32)
    fast = optimize_for_inference(model, engine='onnxruntime')
    assert_like(fast(x), model(x))


@every_runtime
def test_other_sizes_of_images(engine, made):
    model = tiny_ensemble()
    fast = optimize_for_inference(model, engine=engine)
    for size in ((8, 8), (16, 11), (9, 8), (8, 8)):
        x = torch.randn(2, 3, *size)
        assert_like(fast(x), model(x))


def test_a_network_for_one_size_is_exported_for_each():
    """As position embeddings make it."""
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x + torch.linspace(0, 1, x.shape[-1]) * (1. if x.shape[-1] == 8 else 2.)

    model = tiny_ensemble((1, 1), 'replicated')
    model.blocks[0][0].append(Fixed())
    assert programs.ProgramStore(model).get(0, 1, (8, 8)).image_size == (8, 8)
    fast = optimize_for_inference(model, engine='onnxruntime')
    for size in (8, 12):
        assert_like(fast(images(2, size)), model(images(2, size)))


def test_padding_that_depends_on_the_size_is_exported_for_one_size(monkeypatch):
    """For any size the exporter would take hours."""
    model, tried = tiny_ensemble((1, 1), 'replicated'), []
    model.blocks[0][0].append(Conv2dSame(4, 4, 3, 2))

    def write(model, start, stop, image_size, free):
        tried.append(free)
        raise RuntimeError('stop')

    monkeypatch.setattr(programs, '_write', write)
    with pytest.raises(RuntimeError, match='stop'):
        programs.make_program(model, 0, 1, (8, 8))
    assert tried == [False]


def test_each_weight_is_in_one_step():
    model = folded(tiny_ensemble((1, 2, 4), channels=16))  # whose programs the tests of quantisation read too
    store = programs.ProgramStore(model)
    sizes = [len(store.get(start, stop, (8, 8)).data) for start, stop in ((0, 1), (1, 2), (2, 4), (0, 4))]
    graphs = 15_000  # what a graph takes without its weights, at most; all weights would be twice 12,624 bytes more
    assert sum(sizes[:3]) < sizes[3] + 3 * graphs


def test_early_exit_and_an_empty_batch():
    x = images(24)
    model = undecided(x, (1, 2, 4))
    fast = optimize_for_inference(model, engine='onnxruntime')
    expected, found = (early_exit(form, x, 0.35) for form in (model, fast))
    assert len(expected.num_members.unique()) > 1, 'the case is too easy'
    assert torch.equal(found.num_members, expected.num_members)
    assert_like(found.logits, expected.logits)
    assert fast(images(0)).shape == (0, 5)


def test_a_deadline_a_table_and_the_runner():
    fast = optimize_for_inference(tiny_ensemble(), engine='onnxruntime')
    assert len(list(fast.anytime(images(), deadline=60.))) == 3
    assert len(list(fast.anytime(images(), deadline=-1.))) == 1
    table = LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1, 2), repeats=1)
    assert table.mode == 'onnxruntime' and table.macs.keys() == {1, 2, 4}
    with AdaptiveRunner(fast, 60., (3, 8, 8), max_batch_size=2, warmup_repeats=1) as runner:
        futures = [runner.submit(image) for image in images(5)]
        for future, image in zip(futures, images(5)):
            answer = future.result(60)
            torch.testing.assert_close(answer.logits, fast(image[None], answer.num_members)[0], rtol=1e-4, atol=1e-5)


@every_runtime
def test_several_threads_at_once(engine, made):
    model = tiny_ensemble((1, 2, 4), num_classes=6)
    fast = optimize_for_inference(model, engine=engine)
    batches = [torch.randn(size, 3, 8, 8) for size in (1, 2, 3, 5) * 6]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fast, batches))
    for x, result in zip(batches, results):
        assert_like(result, model(x))
    assert len(made) == len(set(made))


def test_types(made):
    model, x = tiny_ensemble(), images()
    assert_like(optimize_for_inference(model, engine='onnxruntime')(x.double()), model(x))
    with pytest.raises(ValueError, match=r'onnxruntime.*float32.*float64.*auto, inductor, eager'):
        optimize_for_inference(model, engine='onnxruntime', dtype=torch.float64)
    fast = optimize_for_inference(model, engine='onnxruntime')
    assert_like(fast(x), model(x))
    fast.double()
    with pytest.raises(ValueError, match='float64'):
        fast(x)


@needs_openvino
def test_bfloat16():
    model, x = tiny_ensemble((1, 1)), images()
    fast = optimize_for_inference(model, engine='openvino', dtype=torch.bfloat16)
    assert next(fast.parameters()).dtype == torch.bfloat16
    assert_like(fast(x), model(x), 5e-2)
    assert next(fast.parameters()).dtype == torch.bfloat16  # also now that its programs, of float32, are made
    assert fast.forward_features(x).dtype == torch.bfloat16


# The choice.

def pretend_times(monkeypatch, **seconds):
    monkeypatch.setattr(optimize, 'shortest_times', lambda functions, device: {n: seconds[n] for n in functions})


@needs_openvino
@pytest.mark.parametrize('faster', ['onnxruntime', 'openvino'])
def test_auto_takes_the_faster_one_and_says_so(monkeypatch, faster, caplog):
    pretend_times(monkeypatch, **{'onnxruntime': 2., 'openvino': 2., faster: 1.})
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model)
    assert (fast.mode, fast.reason) == ('auto', '')
    with caplog.at_level(logging.INFO):
        assert_like(fast(x), model(x))
    assert fast.mode == faster and f'{faster} 1000.00 ms' in fast.reason and '4 members and 3 images' in fast.reason
    assert f'engine {faster}' in caplog.text


def test_auto_without_run_times_is_the_compiler(monkeypatch):
    for engine in (OnnxRuntime, OpenVINO):
        monkeypatch.setattr(engine, 'missing', classmethod(lambda cls: ['onnx']))
    monkeypatch.setattr(torch, 'compile', lambda function, options: function)
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model)
    assert_like(fast(x), model(x))
    assert fast.mode == 'inductor' and 'onnxruntime is not installed' in fast.reason
    assert fast.double().mode == 'auto'
    fast(x)
    assert 'float64 on cpu' in fast.reason


def test_auto_goes_on_without_a_run_time_that_fails(monkeypatch):
    def refuse(self, program):
        raise RuntimeError('operator Frobnicate is not implemented')

    for engine in (OnnxRuntime, OpenVINO):
        monkeypatch.setattr(engine, 'load', refuse)
    monkeypatch.setattr(torch, 'compile', lambda function, options: function)
    fast = optimize_for_inference(tiny_ensemble())
    with pytest.warns(UserWarning, match='Frobnicate'):
        fast(images())
    assert fast.mode == 'inductor' and 'onnxruntime failed' in fast.reason
    with pytest.raises(RuntimeError, match='Frobnicate'):
        optimize_for_inference(tiny_ensemble(), images(), engine='onnxruntime')


def test_a_copy_has_programs_of_its_own():
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, x, engine='onnxruntime')
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_like(twin(x), model(x))


def test_refused_engines(monkeypatch):
    with pytest.raises(ValueError, match=r"engine .*auto, onnxruntime, .*'tensorrt'"):
        optimize_for_inference(tiny_ensemble(), engine='tensorrt')
    monkeypatch.setattr(OpenVINO, 'missing', classmethod(lambda cls: ['openvino']))
    with pytest.raises(ImportError, match=r"openvino.*pip install 'timm-hne\[openvino\]'.*auto, "):
        optimize_for_inference(tiny_ensemble(), engine='openvino')
    with pytest.raises(ValueError, match=r'onnxruntime.*CPU.*meta'):
        optimize_for_inference(tiny_ensemble().to('meta'), engine='onnxruntime')
    assert engines.engines_for(torch.device('cuda'), torch.float16) == ['inductor', 'eager'] and len(ENGINES) == 4


@pytest.mark.parametrize('compile, engine', [(True, 'inductor'), (False, 'eager')])
def test_compile_is_deprecated(compile, engine):
    with pytest.warns(DeprecationWarning, match=f"engine='{engine}'"):
        assert optimize_for_inference(tiny_ensemble(), compile=compile).mode == engine


# The cache.

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_HNE_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def test_programs_are_kept_and_read_again(cache, made):
    model, x = tiny_ensemble((1, 2)), images()
    for _ in range(2):
        assert_like(optimize_for_inference(model, engine='onnxruntime')(x), model(x))
        assert made == [(0, 1), (1, 2)]
    with torch.no_grad():
        model.classifier.bias[0] += 1
    assert_like(optimize_for_inference(model, engine='onnxruntime')(x, 1), model(x, num_members=1))
    assert made == [(0, 1), (1, 2), (0, 1)]
    assert len(list(cache.iterdir())) == 2


def test_programs_that_nobody_used_for_a_month_are_removed(cache, made):
    model, x = tiny_ensemble((1, 2)), images()
    optimize_for_inference(model, engine='onnxruntime')(x)
    used, = cache.iterdir()
    old, recent, other, theirs = cache / ('0' * 32), cache / ('1' * 32), cache / 'other', cache / ('my' * 16)
    more = cache / ('2' * 32) / 'more'  # which is somebody else's too
    more.mkdir(parents=True)
    (cache / ('3' * 32)).touch()
    for folder, days in ((old, 31), (recent, 29), (other, 31), (theirs, 31), (more.parent, 31), (used, 31)):
        folder.mkdir(exist_ok=True)
        (folder / '0-1.onnx').touch()
        os.utime(folder, (time.time() - 86400 * days,) * 2)
    optimize_for_inference(model, engine='onnxruntime')(x)
    assert {*cache.iterdir()} == {used, recent, other, theirs, more.parent, cache / ('3' * 32)}
    assert {path.parent for path in cache.rglob('*.onnx')} == {used, recent, other, theirs}
    assert made == [(0, 1), (1, 2)]
    assert used.stat().st_mtime > time.time() - 86400


def test_what_a_base_keeps_to_itself_tells_programs_apart(cache, made):
    """Weights and `repr` are the same, the logits are not."""
    class Scale(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x * self.factor

    class Shift(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.register_buffer('shift', torch.tensor(shift), persistent=False)

        def forward(self, x):
            return x + self.shift

    class Weigh(torch.nn.Module):
        def __init__(self, **factors):
            super().__init__()
            self.factors = factors

        def forward(self, x):
            return x * self.factors['all'][0]

    x = images()
    for extra in (Scale(1.), Scale(2.), Shift(1.), Shift(2.), Weigh(all=[3.]), Weigh(all=[4.])):
        model = tiny_ensemble((1, 2), 'replicated')
        model.blocks[0][0].append(extra)
        assert_like(optimize_for_inference(model, engine='onnxruntime')(x), model(x))
        model.num_members = 1  # what is evaluated if nobody says so makes no other programs
        assert_like(optimize_for_inference(model, engine='onnxruntime')(x, 2), model(x, 2))
    assert made == [(0, 1), (1, 2)] * 6


def test_images_that_do_not_fit_do_not_choose_the_engine():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            if x.shape[-1] != 8:
                raise ValueError('images must be of 8 pixels')
            return x

    model = tiny_ensemble((1, 1), 'replicated')
    model.blocks[0][0].append(Fixed())
    fast = optimize_for_inference(model)
    with pytest.warns(UserWarning, match='cannot run this model'), pytest.raises(ValueError, match='of 8 pixels'):
        fast(images(2, 9))
    assert_like(fast(images()), model(images()))
    assert fast.mode in ('onnxruntime', 'openvino')


def test_a_damaged_program_is_made_anew(cache, made, caplog):
    model, x = tiny_ensemble((1, 1)), images()
    optimize_for_inference(model, x, engine='onnxruntime')
    path, = cache.rglob('*.onnx')
    path.write_bytes(path.read_bytes()[:-500])
    assert_like(optimize_for_inference(model, engine='onnxruntime')(x), model(x))
    assert made == [(0, 1)] * 2 and 'made anew' in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    cache.write_text('a file where the folder should be')
    model, x = tiny_ensemble((1, 1)), images()
    assert_like(optimize_for_inference(model, engine='onnxruntime')(x), model(x))


def test_a_program_that_differs_is_not_used(cache, monkeypatch):
    run = programs.Session.run
    monkeypatch.setattr(programs.Session, 'run', lambda self, inputs: [1.001 * y for y in run(self, inputs)])
    with pytest.raises(RuntimeError, match=r'0 .*1 members'):
        optimize_for_inference(tiny_ensemble((1, 1)), images(), engine='onnxruntime')
    assert not list(cache.rglob('*.onnx'))
