"""Folded convolutions: every formulation computes the same, and the fastest is chosen."""
import naive
import pytest
import timm.layers
import torch
import torch.nn as nn
from test_inference import images

from timm_hne.inference import formulations
from timm_hne.inference.folding import fold
from timm_hne.inference.formulations import FORMULATIONS, FoldedConv
from timm_hne.models.layers import ConvNormAct


@pytest.fixture(autouse=True)
def fresh_memory():
    formulations.forget_measurements()
    yield
    formulations.forget_measurements()


@pytest.fixture
def pretend_times(monkeypatch):
    """Return a function that puts another in the place of the one that times calls."""
    return lambda function: monkeypatch.setattr(formulations, 'shortest_times', function)


@pytest.mark.parametrize('name', FORMULATIONS)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('parents, nodes', [(1, 3), (2, 4), (4, 4)])
def test_formulations_agree(name, stride, parents, nodes):
    torch.manual_seed(0)
    layer = ConvNormAct(6, 5, 1, parents, nodes, stride)
    layer.conv.init_weights()
    naive.randomize(layer).eval()
    folded, x = FoldedConv(layer), torch.randn(2, parents * 6, 5, 7)
    folded.formulations[0, nodes, 'batch'] = name
    with torch.no_grad():
        torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)
        assert folded(x[:0]).shape == (0, nodes * 5, *layer(x).shape[2:])


def test_the_fastest_formulation_is_chosen_once_and_remembered(pretend_times):
    measured = []

    def seconds(functions, device):
        measured.append(sorted(functions))
        return {'grouped': 1., 'matmul': 0.5, 'per_node': 2.}

    layer = ConvNormAct(6, 5, 1, 2, 4)
    first, second = FoldedConv(layer), FoldedConv(layer)
    pretend_times(seconds)
    first.measuring = second.measuring = True
    with torch.no_grad():
        for folded in (first, second):
            for _ in range(2):
                folded(torch.zeros(2, 12, 4, 4))
            assert folded.formulations == {(0, 4, 'batch'): 'matmul'}
        assert measured == [['grouped', 'matmul', 'per_node']]
        first(torch.zeros(1, 12, 4, 4))
    assert first.formulations[0, 4, 'image'] == 'matmul' and len(measured) == 2


def test_a_small_advantage_does_not_replace_the_grouped_convolution(pretend_times):
    folded = FoldedConv(ConvNormAct(6, 5, 1, 2, 4))
    pretend_times(lambda functions, device: {'grouped': 1., 'matmul': 0.95, 'per_node': 0.95})
    folded.measuring = True
    with torch.no_grad():
        folded(torch.zeros(2, 12, 4, 4))
    assert folded.formulations == {(0, 4, 'batch'): 'grouped'}


def test_depthwise_and_lone_parents_are_not_measured(pretend_times):
    pretend_times(lambda functions, device: pytest.fail('measured'))
    for layer in (ConvNormAct(4, 4, 3, 2, 2, groups=4), ConvNormAct(4, 4, 1, 1, 2)):
        folded = FoldedConv(layer)
        folded.measuring = True
        folded(torch.zeros(2, layer.conv.in_channels, 4, 4))


def test_plain_modules_are_folded_where_the_order_is_plain():
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 1)
    module = naive.randomize(nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        timm.layers.ConvNormAct(8, 8, 3),
        nn.Sequential(shared, timm.layers.BatchNormAct2d(8)),
        nn.Sequential(shared, nn.BatchNorm2d(8)),
        nn.BatchNorm2d(8),  # after a Sequential, which is no convolution
    )).append(nn.Conv2d(8, 4, 1)).append(nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = images(2)
    with torch.no_grad():
        expected = module(x)
        fold(module)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(child, nn.BatchNorm2d) for child in module.modules()) == 2


def test_times_are_of_every_function():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in 'ab'}
    seconds = formulations.shortest_times(functions, torch.device('cpu'))
    assert seconds.keys() == functions.keys() and all(0 <= s < 60 for s in seconds.values())
    assert calls == ['a', 'b'] * (len(calls) // 2)
