"""The optimised model against the original: folded, in every formulation, compiled, and without a compiler."""
import copy
import pickle
import platform
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from test_inference import TREES, direct, images, randomize, small_mobilenet, small_resnet

from timm_hne import HierarchicalEnsemble, optimize
from timm_hne.inference import early_exit
from timm_hne.layers import ConvNormAct, TreeBlock
from timm_hne.optimize import FORMULATIONS, FoldedConv, optimize_for_inference
from timm_hne.tree import prefixes


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch):
    monkeypatch.setattr(optimize, '_fastest', {})


@pytest.fixture
def traced(monkeypatch):
    """Trace as for compilation but run the graphs as they are; count the graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {}

    def compile(function, frontier):
        options['guard_filter_fn'] = torch.compiler.keep_tensor_guards_unsafe
        return torch.compile(function, backend=backend, options=options, fullgraph=True)

    monkeypatch.setattr(optimize, '_compile', compile)
    return graphs


def assert_like(result, expected, tolerance=1e-4):
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize('nodes', TREES)
def test_every_prefix_equals_the_original(nodes):
    model, x = small_resnet(nodes), images()
    fast = optimize_for_inference(model, compile=False)
    for n, expected in direct(model, x).items():
        assert_like(fast(x, num_members=n), expected)
        assert_like(fast.forward_members(x, n).mean(dim=1), expected)
    for n, logits in zip(prefixes(model.ensemble_size), fast.anytime(x), strict=True):
        assert_like(logits, model(x, num_members=n))


def test_mobilenet_and_an_extracted_prefix():
    model, x = small_mobilenet(), images(2, 64)
    assert_like(optimize_for_inference(model, compile=False)(x), model(x))
    part = model.extract(5)
    fast = optimize_for_inference(part, compile=False)
    for n, expected in direct(part, x).items():
        assert_like(fast(x, num_members=n), expected)


@pytest.mark.parametrize('name', FORMULATIONS)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('parents, nodes', [(1, 3), (2, 4), (4, 4)])
def test_formulations_agree(name, stride, parents, nodes):
    torch.manual_seed(0)
    layer = ConvNormAct(6, 5, 1, parents, nodes, stride)
    layer.conv.init_weights()
    randomize(layer)
    folded, x = FoldedConv(layer), torch.randn(2, parents * 6, 5, 7)
    folded.formulations[0, nodes, False] = name
    with torch.no_grad():
        torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)
        assert folded(x[:0]).shape == (0, nodes * 5, *layer(x).shape[2:])


def test_the_fastest_formulation_is_chosen_once_and_remembered(monkeypatch):
    measured = []

    def seconds(functions, device):
        measured.append(sorted(functions))
        return {'grouped': 1., 'matmul': 0.5, 'per_node': 2.}

    layer = ConvNormAct(6, 5, 1, 2, 4)
    first, second = FoldedConv(layer), FoldedConv(layer)
    monkeypatch.setattr(optimize, '_time', seconds)
    first.measuring = second.measuring = True
    with torch.no_grad():
        for folded in (first, second):
            for _ in range(2):
                folded(torch.zeros(2, 12, 4, 4))
            assert folded.formulations == {(0, 4, False): 'matmul'}
        assert measured == [['grouped', 'matmul', 'per_node']]
        first(torch.zeros(1, 12, 4, 4))
    assert first.formulations[0, 4, True] == 'matmul' and len(measured) == 2


def test_a_small_advantage_does_not_replace_the_grouped_convolution(monkeypatch):
    folded = FoldedConv(ConvNormAct(6, 5, 1, 2, 4))
    seconds = {'grouped': 1., 'matmul': 0.95, 'per_node': 0.95}
    monkeypatch.setattr(optimize, '_time', lambda functions, device: seconds)
    folded.measuring = True
    with torch.no_grad():
        folded(torch.zeros(2, 12, 4, 4))
    assert folded.formulations == {(0, 4, False): 'grouped'}


def test_depthwise_and_lone_parents_are_not_measured(monkeypatch):
    monkeypatch.setattr(optimize, '_time', lambda functions, device: pytest.fail('measured'))
    for layer in (ConvNormAct(4, 4, 3, 2, 2, groups=4), ConvNormAct(4, 4, 1, 1, 2)):
        folded = FoldedConv(layer)
        folded.measuring = True
        folded(torch.zeros(2, layer.conv.in_channels, 4, 4))


def test_the_faster_layout_is_chosen(monkeypatch):
    model, x = small_resnet(), images()
    for seconds, memory_format in (
            ({'contiguous': 1., 'channels_last': 2.}, torch.contiguous_format),
            ({'contiguous': 2., 'channels_last': 1.}, torch.channels_last),
    ):
        fast = optimize_for_inference(model, compile=False)
        with monkeypatch.context() as patch:
            patch.setattr(optimize, '_time', lambda functions, device, seconds=seconds: seconds)
            patch.setattr(FoldedConv, '_choose', lambda *args: 'grouped')
            assert_like(fast(x), model(x))
        assert fast.memory_format == memory_format
        assert fast.blocks[0][0].weight.is_contiguous(memory_format=memory_format)


def test_the_original_is_untouched():
    model, x = small_resnet(), images()
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    fast = optimize_for_inference(model, x, compile=False, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), expected)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in fast.parameters())


def test_bfloat16():
    model, x = small_resnet(), images()
    fast = optimize_for_inference(model, compile=False, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in fast.parameters())
    for n, logits in zip((1, 2, 4), fast.anytime(x), strict=True):
        assert_like(fast(x, num_members=n), model(x, num_members=n), tolerance=5e-2)
        assert_like(logits, model(x, num_members=n), tolerance=5e-2)


def test_interface():
    model, x = small_resnet(), images()
    fast = optimize_for_inference(model, compile=False)
    for name in ('nodes', 'ensemble_size', 'num_leaves', 'num_classes', 'num_members', 'in_chans', 'pretrained_cfg'):
        assert getattr(fast, name) == getattr(model, name), name
    fast.num_members = 2
    assert_like(fast(x), model(x, num_members=2))
    assert fast(x).requires_grad is False
    assert fast(images(0)).shape == (0, 10)
    assert_like(early_exit(fast, x, 1.).logits, early_exit(model, x, 1.).logits)
    assert fast.eval() is fast
    with pytest.raises(AttributeError, match='no_such_thing'):
        fast.no_such_thing  # noqa: B018


# Compilation, of a network of a few layers because tracing takes long.

def tiny_ensemble():
    torch.manual_seed(0)
    nodes, blocks = (1, 2, 4), []
    for parents, count in zip((1, *nodes), nodes):
        in_channels = 8 if blocks else 3
        layers = (ConvNormAct(in_channels, 8, 1, parents, count), ConvNormAct(8, 8, 3, count, count, groups=8))
        blocks.append(TreeBlock(*layers, nodes=count, out_channels=8))
    return randomize(HierarchicalEnsemble(blocks, [1, 1, 1], num_classes=5, in_chans=3))


def test_one_graph_per_number_of_members_for_all_batch_sizes(traced):
    model = tiny_ensemble()
    fast = optimize_for_inference(model)
    for n in range(1, 5):
        for batch_size in (2, 3, 5):
            x = images(batch_size)
            assert_like(fast(x, num_members=n), model(x, num_members=n))
        assert len(traced) == n
    assert_like(fast(images(1), num_members=3), model(images(1), num_members=3))
    assert_like(fast(images(1), num_members=3), model(images(1), num_members=3))
    assert len(traced) == 5


def test_steps_are_compiled_once_too(traced):
    model = tiny_ensemble()
    fast = optimize_for_inference(model)
    for batch_size in (3, 4):
        x = images(batch_size)
        for n, logits in zip((1, 2, 4), fast.anytime(x), strict=True):
            assert_like(logits, model(x, num_members=n))
    assert len(traced) == 3


def test_graphs_are_made_lazily_and_again_after_a_move(traced):
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model)
    assert len(traced) == 0
    fast = optimize_for_inference(model, x)
    assert len(traced) == 1
    fast(x)
    assert len(traced) == 1
    fast.double()
    assert_like(fast(x), model(x))
    assert len(traced) == 2


def test_what_was_measured_is_measured_again_after_a_move(monkeypatch):
    model, x, measured = small_resnet(), images(), []

    def seconds(functions, device):
        measured.append(set(functions))
        return {name: float(name not in ('channels_last', 'per_node')) for name in functions}

    monkeypatch.setattr(optimize, '_time', seconds)
    fast = optimize_for_inference(model, x, compile=False)
    count = len(measured)
    assert any(module.formulations for module in fast.modules() if isinstance(module, FoldedConv))
    fast.double()
    assert fast.memory_format is None
    assert not any(module.formulations for module in fast.modules() if isinstance(module, FoldedConv))
    assert_like(fast(x), model(x))
    assert len(measured) == 2 * count


def test_a_copy_compiles_for_itself(traced):
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for p in fast.parameters():
            p.data.zero_()
        assert_like(twin(x), model(x))
        fast = copy.deepcopy(twin)


def test_without_a_compiler_it_runs_eagerly(monkeypatch):
    def unavailable(function, frontier):
        raise RuntimeError('no compiler found')

    monkeypatch.setattr(optimize, '_compile', unavailable)
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model)
    with pytest.warns(UserWarning, match='no compiler found'):
        assert_like(fast(x), model(x))
    assert_like(fast(x, num_members=2), model(x, num_members=2))


def test_a_later_failure_of_the_compiler_is_survived_too(monkeypatch):
    """As of an image size that needs another program."""
    model, size = small_resnet(), 8

    def compile(function, frontier):
        def program(x):
            if x.shape[-1] != size:
                raise NotImplementedError('cannot compile this')
            return function(x)
        return program

    monkeypatch.setattr(optimize, '_compile', compile)
    fast = optimize_for_inference(model)
    assert_like(fast(images()), model(images()))
    for expected in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            assert_like(fast(images(size=16)), model(images(size=16)))
        assert sum('cannot compile this' in str(warning.message) for warning in caught) == expected
    assert not fast.compile_programs


def test_a_lack_of_memory_is_not_a_lack_of_a_compiler(monkeypatch):
    model, attempts = small_resnet(), []

    def compile(function, frontier):
        def program(x):
            attempts.append(1)
            if len(attempts) == 2:
                raise torch.OutOfMemoryError('no memory left')
            return function(x)
        return program

    monkeypatch.setattr(optimize, '_compile', compile)
    fast = optimize_for_inference(model, images())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(torch.OutOfMemoryError):
            fast(images())
        assert_like(fast(images()), model(images()))
    assert len(attempts) == 3 and fast.compile_programs


def test_a_program_runs_while_another_is_made(monkeypatch):
    model, making, finish = small_resnet(), threading.Event(), threading.Event()

    monkeypatch.setattr(optimize, '_compile', lambda function, frontier: function)
    fast = optimize_for_inference(model)
    fast(images(), 1)

    def slowly(function, frontier):
        making.set()
        assert finish.wait(60)
        return function

    monkeypatch.setattr(optimize, '_compile', slowly)
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
    model = small_resnet()
    layouts, builds = [], []
    choose, build = optimize.OptimizedEnsemble._choose_layout, optimize.OptimizedEnsemble._build

    def slowly(function, calls):
        def call(*args):
            calls.append(1)
            time.sleep(0.05)
            return function(*args)
        return call

    monkeypatch.setattr(optimize.OptimizedEnsemble, '_choose_layout', slowly(choose, layouts))
    monkeypatch.setattr(optimize.OptimizedEnsemble, '_build', slowly(build, builds))
    fast = optimize_for_inference(model, compile=False)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fast, [images()] * 4))
    assert len(layouts) == len(builds) == 1
    for result in results:
        assert_like(result, model(images()))


def test_features_in_another_type():
    model, x = small_resnet(), images()
    fast = optimize_for_inference(model, compile=False, dtype=torch.bfloat16)
    assert_like(fast.forward_features(x, 2).float(), model.forward_features(x, 2), 5e-2)
    maps, expected = fast.forward_intermediates(x, 2, intermediates_only=True), model.forward_intermediates(x, 2)[1]
    for features, other in zip(maps, expected, strict=True):
        assert_like(features.float(), other, 5e-2)


def test_made_in_inference_mode():
    model, x = small_resnet(), images()
    with torch.inference_mode():
        fast = optimize_for_inference(model, compile=False)
    assert_like(fast(x), model(x))
    with torch.inference_mode():
        fast = optimize_for_inference(model, x, compile=False)
    assert_like(fast(x), model(x))


def test_really_compiled():
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, x)
    assert fast.compile_programs, 'compilation fell back to eager'
    assert_like(fast(x), model(x))
    assert_like(fast(images(5)), model(images(5)))


# Bad input.

def test_refused_models():
    with pytest.raises(ValueError, match='training mode'):
        optimize_for_inference(small_resnet().train())
    with pytest.raises(TypeError, match=r'model must be an hne_\* model, got Linear'):
        optimize_for_inference(torch.nn.Linear(1, 1))
    for dtype in (torch.int8, 'bfloat16'):
        with pytest.raises(TypeError, match='dtype must be a floating point'):
            optimize_for_inference(small_resnet(), dtype=dtype)


def test_refused_calls():
    fast = optimize_for_inference(small_resnet(), compile=False)
    for num_members, error in ((0, ValueError), (5, ValueError), (2., TypeError)):
        with pytest.raises(error, match='num_members'):
            fast(images(), num_members=num_members)
    with pytest.raises(ValueError, match='x must be images'):
        fast(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r'x must be images \(B, 3, H, W\)'):
        fast(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match='cannot be trained'):
        fast.train()
    with pytest.raises(RuntimeError, match='cannot load weights; do it to the original'):
        fast.load_state_dict({})
    for call in (
            lambda: fast.extract(1), lambda: fast.init_weights(), lambda: fast.reset_classifier(3),
            lambda: fast.prune_intermediate_layers(1),
    ):
        with pytest.raises(RuntimeError, match='do it to the original'):
            call()
    assert fast(images()).shape == (3, 10)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_freed_memory_is_kept_for_the_next_tensors():
    code = '''
        import resource, torch
        from timm_hne.memory import keep_freed_memory
        keep_freed_memory()
        for repeat in range(8):
            if repeat == 3:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(16 << 20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    '''
    faults = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True)
    # Without it each of the five tensors of 64 MiB takes up to 16,384 page faults.
    assert int(faults.stdout) < 1000


def test_timm_sees_the_config():
    fast = optimize_for_inference(small_resnet(), compile=False)
    assert timm.data.resolve_model_data_config(fast)['input_size'] == (3, 32, 32)
