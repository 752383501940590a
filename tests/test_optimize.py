"""The optimised model against the original, run eagerly."""
import copy
import itertools
import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import timm
import torch
from test_inference import direct, images, small_mobilenet, small_resnet
from tiny import KINDS, TREES, tiny_ensemble

from timm_hne.inference import early_exit, optimize, optimize_for_inference
from timm_hne.inference.engines import eager
from timm_hne.tree import prefixes


@pytest.fixture
def pretend_times(monkeypatch):
    """Return a function that puts another in the place of the one that times calls."""
    return lambda function: monkeypatch.setattr(eager, 'shortest_times', function)


def assert_like(result, expected, tolerance=1e-4):
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize('nodes, kind', [*itertools.product(TREES, KINDS), ((1, 2, 4), 'pairs')])
def test_every_prefix_equals_the_original(nodes, kind):
    model, x = tiny_ensemble(nodes, kind), images()
    fast = optimize_for_inference(model, engine='eager')
    for n, expected in direct(model, x).items():
        assert_like(fast(x, num_members=n), expected)
        assert_like(fast.forward_members(x, n).mean(dim=1), expected)
    for n, logits in zip(prefixes(model.ensemble_size), fast.anytime(x), strict=True):
        assert_like(logits, model(x, num_members=n))


@pytest.mark.parametrize('create, size', [(small_resnet, 8), (small_mobilenet, 32)])
def test_the_families_and_an_extracted_prefix(create, size):
    model, x = create(), images(2, size)
    assert_like(optimize_for_inference(model, engine='eager')(x), model(x))
    part = model.extract(3)
    fast = optimize_for_inference(part, engine='eager')
    for n, expected in direct(part, x).items():
        assert_like(fast(x, num_members=n), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_batch_normalisation_is_gone(kind):
    fast = optimize_for_inference(tiny_ensemble(kind=kind), engine='eager')
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())


def test_the_faster_layout_is_chosen(pretend_times):
    model, x = tiny_ensemble(), images()
    for seconds, memory_format in (
            ({'contiguous': 1., 'channels_last': 2.}, torch.contiguous_format),
            ({'contiguous': 2., 'channels_last': 1.}, torch.channels_last),
    ):
        fast, seen = optimize_for_inference(model, engine='eager'), []
        fast.blocks[0][0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        pretend_times(lambda functions, device, seconds=seconds: seconds)
        assert_like(fast(x), model(x))
        assert seen[-1].is_contiguous(memory_format=memory_format)
        assert fast.blocks[0][0].weight.is_contiguous(memory_format=memory_format)


def test_the_original_is_untouched():
    model, x = tiny_ensemble(), images()
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    fast = optimize_for_inference(model, x, engine='eager', dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), expected)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in pointers for p in fast.parameters())


def test_bfloat16():
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, engine='eager', dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in fast.parameters())
    for n, logits in zip((1, 2, 4), fast.anytime(x), strict=True):
        assert_like(fast(x, num_members=n), model(x, num_members=n), tolerance=5e-2)
        assert_like(logits, model(x, num_members=n), tolerance=5e-2)


def test_interface():
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, engine='eager')
    for name in ('nodes', 'ensemble_size', 'num_classes', 'num_members', 'in_chans', 'feature_info'):
        assert getattr(fast, name) == getattr(model, name), name
    fast.num_members = 2
    assert_like(fast(x), model(x, num_members=2))
    assert fast(x).requires_grad is False
    assert fast(images(0)).shape == (0, 5)
    assert_like(early_exit(fast, x, 1.).logits, early_exit(model, x, 1.).logits)
    assert fast.eval() is fast
    with pytest.raises(AttributeError, match='no_such_thing'):
        fast.no_such_thing  # noqa: B018


def test_what_was_measured_is_measured_again_after_a_move(pretend_times):
    model, x, measured = tiny_ensemble(), images(), []

    def seconds(functions, device):
        measured.append(set(functions))
        return dict.fromkeys(functions, 1.)

    pretend_times(seconds)
    fast = optimize_for_inference(model, x, engine='eager')
    assert len(measured) == 1
    fast(x)
    assert len(measured) == 1
    fast.double()
    assert_like(fast(x), model(x))
    assert len(measured) == 2


def test_features_in_another_type():
    model, x = tiny_ensemble(), images()
    fast = optimize_for_inference(model, engine='eager', dtype=torch.bfloat16)
    assert_like(fast.forward_features(x, 2).float(), model.forward_features(x, 2), 5e-2)
    maps, expected = fast.forward_intermediates(x, 2, intermediates_only=True), model.forward_intermediates(x, 2)[1]
    for features, other in zip(maps, expected, strict=True):
        assert_like(features.float(), other, 5e-2)


def test_features_without_a_classifier():
    model, x = tiny_ensemble(), images()
    model.reset_classifier(0)
    fast = optimize_for_inference(model, engine='eager')
    for n in (1, 3, 4):
        assert_like(fast(x, n), model(x, n))
    model.reset_classifier(0, '')
    with pytest.raises(ValueError, match="global_pool=''"):
        optimize_for_inference(model)


def test_made_in_inference_mode():
    model, x = tiny_ensemble(), images()
    with torch.inference_mode():
        fast = optimize_for_inference(model, engine='eager')
    assert_like(fast(x), model(x))
    with torch.inference_mode():
        fast = optimize_for_inference(model, x, engine='eager')
    assert_like(fast(x), model(x))


# Bad input.

def test_refused_models():
    with pytest.raises(ValueError, match='training mode'):
        optimize_for_inference(tiny_ensemble().train())
    with pytest.raises(TypeError, match=r'model .*Linear'):
        optimize_for_inference(torch.nn.Linear(1, 1))
    for dtype in (torch.int8, 'bfloat16'):
        with pytest.raises(TypeError, match=f'dtype .*{dtype}'):
            optimize_for_inference(tiny_ensemble(), dtype=dtype)


@pytest.mark.parametrize('x', [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.zeros((2, 3, 8, 8), np.float32)])
def test_what_the_original_refuses_is_refused_alike(x):
    """Raw images used to be taken, unlike by the original."""
    model = tiny_ensemble()
    fast = optimize_for_inference(model, engine='eager')
    errors = []
    for call in (model, fast, fast.forward_members, fast.forward_features, fast.anytime, model.anytime):
        with pytest.raises(TypeError, match=r'x .*(uint8|ndarray)') as error:
            call(x)
        errors.append(str(error.value))
    assert len(set(errors)) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_the_memory_of_the_process_is_left_alone_unless_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(optimize, 'keep_freed_memory', lambda: calls.append(1))
    optimize_for_inference(tiny_ensemble(), engine='eager')
    assert not calls
    optimize_for_inference(tiny_ensemble(), engine='eager', keep_memory=True)
    assert calls


def test_refused_calls():
    fast = optimize_for_inference(tiny_ensemble(), engine='eager')
    for num_members, error in ((0, ValueError), (5, ValueError), (2., TypeError)):
        with pytest.raises(error, match='num_members'):
            fast(images(), num_members=num_members)
    with pytest.raises(ValueError, match=r'x .*\[3, 8, 8\]'):
        fast(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r'x .*\(B, 3, H, W\).*\[1, 1, 8, 8\]'):
        fast(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r'mode .*False'):
        fast.train()
    with pytest.raises(RuntimeError, match='load weights'):
        fast.load_state_dict({})
    for call in (
            lambda: fast.extract(1), lambda: fast.init_weights(), lambda: fast.reset_classifier(3),
            lambda: fast.prune_intermediate_layers(1),
    ):
        with pytest.raises(RuntimeError, match='original'):
            call()
    assert fast(images()).shape == (3, 5)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library')
def test_freed_memory_is_kept_for_the_next_tensors():
    code = '''
        import resource, torch
        from timm_hne.process import keep_freed_memory
        keep_freed_memory()
        for repeat in range(13):
            if repeat == 8:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(16 << 20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    '''
    faults = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True)
    # Without it each of the five tensors of 64 MiB takes up to 16,384 page faults.
    assert int(faults.stdout) < 1000


def test_timm_sees_the_config():
    fast = optimize_for_inference(small_resnet(), engine='eager')
    assert timm.data.resolve_model_data_config(fast)['input_size'] == (3, 32, 32)
