"""Folded convolutions, against what they are made from."""
import types
from functools import partial

import naive
import pytest
import timm.layers
import torch
import torch.nn as nn
from test_inference import images

from timm_hne.inference.engines import base
from timm_hne.inference.folding import FoldedConv, fold
from timm_hne.models.layers import ConvNormAct


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('parents, nodes', [(1, 3), (2, 4), (4, 4)])
def test_a_folded_convolution_agrees(stride, parents, nodes):
    torch.manual_seed(0)
    layer = ConvNormAct(6, 5, 1, parents, nodes, stride)
    layer.conv.init_weights()
    naive.randomize(layer).eval()
    folded, x = FoldedConv(layer), torch.randn(2, parents * 6, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), layer(x), rtol=1e-5, atol=1e-5)
        assert folded(x[:0]).shape == (0, nodes * 5, *layer(x).shape[2:])


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


def test_times_are_the_shortest_of_every_function(monkeypatch):
    calls, now = [], [0.]
    durations = {'a': [9., 4., 3., 5., 7.], 'b': [2., 2., 8., 6., 1.]}

    def call(name):
        now[0] += durations[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(base, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))
    seconds = base.shortest_times({name: partial(call, name) for name in 'ab'}, torch.device('cpu'))
    assert seconds == {'a': 3., 'b': 1.}
    assert calls == ['a', 'b'] * 5
