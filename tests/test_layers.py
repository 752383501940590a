"""Every branched layer against a loop over its nodes, for every span."""
import naive
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d

from timm_hne.models.branched import BranchedBlock
from timm_hne.models.hne_mobilenetv2 import InvertedResidual
from timm_hne.models.hne_resnet import Bottleneck
from timm_hne.models.layers import BranchedConv2d, BranchedDropPath, BranchedLinear, ConvNormAct

TREES = [(1, 1), (1, 3), (2, 2), (2, 4), (2, 6), (3, 3), (1, 8)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCES = {
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float64: dict(rtol=1e-12, atol=1e-12),
    torch.bfloat16: dict(rtol=0.05, atol=0.1),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spans(nodes):
    """None, then every span there is."""
    return [None, *((start, stop) for start in range(nodes) for stop in range(start + 1, nodes + 1))]


def nodes_of(span, nodes):
    return range(nodes) if span is None else range(*span)


def parents_of(x, span, parents, nodes):
    """Cut the parents of a span out of the feature maps of all parents, as a caller must."""
    needed = sorted({node * parents // nodes for node in nodes_of(span, nodes)})
    return x.unflatten(1, (parents, -1))[:, needed[0]:needed[-1] + 1].flatten(1, 2)


def parent_map(x, node, parents, nodes):
    return x.unflatten(1, (parents, -1))[:, node * parents // nodes]


def loop(modules, x, span, parents, nodes):
    """The reference: each node on its own."""
    return torch.cat([modules[k](parent_map(x, k, parents, nodes)) for k in nodes_of(span, nodes)], dim=1)


def load(modules, layer, nodes):
    """Copy the weights of a branched layer into plain ones with the same names."""
    state = layer.state_dict()
    for k, module in enumerate(modules):
        module.to(next(layer.parameters()).dtype).train(layer.training)
        module.load_state_dict({name: naive.rows(state[name], k, nodes) for name in module.state_dict()})
    return modules


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('parents, nodes', TREES)
@pytest.mark.parametrize('kernel_size, stride, depthwise', [(1, 1, False), (3, 2, False), (3, 1, True), (3, 2, True)])
def test_conv(parents, nodes, kernel_size, stride, depthwise, dtype):
    if depthwise and parents != nodes:
        with pytest.raises(ValueError, match=f'groups .*{parents} .*{nodes} .*6'):
            BranchedConv2d(6, 6, kernel_size, parents, nodes, stride, groups=6)
        return
    out_chs, groups = (6, 6) if depthwise else (4, 1)
    layer = BranchedConv2d(6, out_chs, kernel_size, parents, nodes, stride, groups, dtype=dtype)
    plain = [
        nn.Conv2d(6, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, dtype=dtype)
        for _ in range(nodes)
    ]
    plain = load(plain, layer, nodes)
    x = torch.randn(2, parents * 6, 7, 5, dtype=dtype)
    for span in spans(nodes):
        y = layer(parents_of(x, span, parents, nodes), span)
        torch.testing.assert_close(y, loop(plain, x, span, parents, nodes), **TOLERANCES[dtype])


def test_conv_passes_on_a_memory_format():
    layer = BranchedConv2d(4, 4, 3, 2, 4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x[:, :4], (0, 1)), layer(x)[:, :4])


def test_conv_initialisation_has_the_fan_out_of_one_node():
    layer = BranchedConv2d(64, 128, 3, 2, 8)
    layer.init_weights()
    for k in range(8):
        std = naive.rows(layer.weight, k, 8).std().item()
        assert std == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    depthwise = BranchedConv2d(512, 512, 3, 4, 4, groups=512)
    depthwise.init_weights()
    assert depthwise.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)


@pytest.mark.parametrize('training, dtype', [
    *((False, dtype) for dtype in DTYPES),
    (True, torch.float32),
    (True, torch.float64),
])
@pytest.mark.parametrize('parents, nodes', TREES)
def test_conv_norm_act(parents, nodes, training, dtype):
    for span in spans(nodes):
        layer = ConvNormAct(6, 4, 3, parents, nodes, act_layer=nn.ReLU6, dtype=dtype).train(training)
        naive.randomize(layer)
        plain = load([naive.conv_norm_act(6, 4, 3, act=nn.ReLU6) for _ in range(nodes)], layer, nodes)
        untouched = {name: tensor.clone() for name, tensor in layer.named_buffers()}
        x = torch.randn(3, parents * 6, 5, 4, dtype=dtype)
        y = layer(parents_of(x, span, parents, nodes), span)
        torch.testing.assert_close(y, loop(plain, x, span, parents, nodes), **TOLERANCES[dtype])
        for k in range(nodes):
            for name in ('running_mean', 'running_var'):
                buffer = naive.rows(getattr(layer.bn, name), k, nodes)
                torch.testing.assert_close(buffer, getattr(plain[k].bn, name), **TOLERANCES[dtype])
                before = naive.rows(untouched[f'bn.{name}'], k, nodes)
                assert torch.equal(buffer, before) == (not training or k not in nodes_of(span, nodes))


@pytest.mark.parametrize('stride, training', [(2, True), (2, False), (1, True)])
def test_autocast_of_depthwise_convolutions(stride, training):
    """Strided ones are trained in float32 on a CPU, where bfloat16 is slow."""
    layer = BranchedConv2d(4, 4, 3, 2, 2, stride=stride, groups=4).train(training)
    x = torch.randn(3, 8, 9, 7).bfloat16().requires_grad_()
    exact = stride == 2 and training
    for span in (None, (1, 2)):
        part = x if span is None else x[:, 4:]
        expected = layer.convolve_nodes(part.float(), span)
        with torch.autocast('cpu', torch.bfloat16):
            found = layer(part, span)
        assert found.dtype == (torch.float32 if exact else torch.bfloat16)
        tolerances = dict(rtol=0, atol=0) if exact else TOLERANCES[torch.bfloat16]
        torch.testing.assert_close(found.float(), expected, **tolerances)
        for wanted, got in zip(*(torch.autograd.grad(y.float().sum(), [x, layer.weight]) for y in (expected, found))):
            torch.testing.assert_close(got, wanted, **TOLERANCES[torch.bfloat16])


def test_conv_norm_without_activation():
    layer = ConvNormAct(3, 4, 1, 1, 2, act_layer=None).eval()
    y = layer(torch.randn(2, 3, 4, 4))
    assert (y < 0).any()
    assert isinstance(layer.bn, BatchNormAct2d)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('nodes', [1, 2, 5])
def test_linear(nodes, dtype):
    layer = BranchedLinear(6, 3, nodes, dtype=dtype)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, nodes, 6, dtype=dtype)
    for span in spans(nodes):
        expected = [
            F.linear(x[:, k], naive.rows(layer.weight, k, nodes), naive.rows(layer.bias, k, nodes))
            for k in nodes_of(span, nodes)
        ]
        y = layer(x if span is None else x[:, slice(*span)], span)
        torch.testing.assert_close(y, torch.stack(expected, dim=1), **TOLERANCES[dtype])


def test_linear_initialisation_is_that_of_one_node():
    layer = BranchedLinear(100, 50, 4)
    assert layer.weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
    assert not layer.bias.any()
    assert not torch.equal(naive.rows(layer.weight, 0, 4), naive.rows(layer.weight, 1, 4))


def test_linear_is_a_linear_layer_to_others():
    """Who initialises, counts or converts linear layers goes by type, shape and `out_features`."""
    layer = BranchedLinear(6, 3, 4)
    assert isinstance(layer, nn.Linear)
    for used, nodes in ((4, 4), (2, 2), (3, 4)):
        part = layer.keep(used, nodes, nodes)
        assert (part.out_features, part.in_features) == (3 * nodes, 6)
        x = torch.randn(2, used, 6)
        torch.testing.assert_close(part(x), layer(x, (0, used)))


@pytest.mark.parametrize('nodes', [1, 3])
def test_drop_path_leaves_out_the_path_of_an_image_in_a_node(nodes):
    layer = BranchedDropPath(0.25, 4)
    x = torch.rand(200, nodes * 4, 2, 3) + 1
    y = layer(x).unflatten(1, (nodes, 4)).flatten(2) / x.unflatten(1, (nodes, 4)).flatten(2)
    kept = y[..., 0] != 0
    # All of a node or nothing, the mean as it was, and nodes independently of each other.
    torch.testing.assert_close(y, (kept / 0.75)[..., None].expand_as(y))
    assert 0.6 < kept.float().mean() < 0.9
    assert nodes == 1 or (kept[:, 0] != kept[:, 1]).any()
    assert layer.eval()(x) is x


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind, stride, parents, nodes', [
    *((kind, stride, *tree) for kind in ('bottleneck', 'inverted') for stride in (1, 2) for tree in TREES),
    *((kind, 1, nodes, nodes) for kind in ('bottleneck_shortcut', 'inverted_shortcut') for nodes in (1, 3)),
])
def test_residual_layers(kind, stride, parents, nodes, training):
    dd = {'device': None, 'dtype': torch.float64}
    for span in spans(nodes):
        if kind.startswith('bottleneck'):
            out_chs, project = (8, False) if kind.endswith('shortcut') else (12, True)
            layer = Bottleneck(8, out_chs, parents, nodes, stride, project, dd)
            plain = [naive.Bottleneck(8, out_chs, stride, project) for _ in range(nodes)]
        else:
            out_chs = 8 if kind.endswith('shortcut') else 12
            layer = InvertedResidual(8, out_chs, parents, nodes, stride, dd)
            plain = [naive.InvertedResidual(8, out_chs, stride) for _ in range(nodes)]
        naive.randomize(layer).train(training)
        plain = load([module.double() for module in plain], layer, nodes)
        x = torch.randn(2, parents * 8, 6, 5, dtype=torch.float64)
        y = layer(parents_of(x, span, parents, nodes), span)
        torch.testing.assert_close(y, loop(plain, x, span, parents, nodes), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_tree_block(grad_checkpointing):
    dd = {'device': None, 'dtype': torch.float64}
    block = BranchedBlock(
        Bottleneck(8, 12, 2, 4, 2, True, dd), Bottleneck(12, 12, 4, 4, 1, False, dd), nodes=4, out_channels=12,
    )
    naive.randomize(block).eval()
    block.grad_checkpointing = grad_checkpointing
    plain = [nn.Sequential(naive.Bottleneck(8, 12, 2, True), naive.Bottleneck(12, 12, 1, False)) for _ in range(4)]
    plain = load([module.double() for module in plain], block, 4)
    for span in spans(4):
        x = torch.randn(2, 16, 6, 5, dtype=torch.float64, requires_grad=True)
        y = block(parents_of(x, span, 2, 4), span)
        expected = loop(plain, x, span, 2, 4)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(y)
        gradient, = torch.autograd.grad((y * weights).sum(), x)
        expected_gradient, = torch.autograd.grad((expected * weights).sum(), x)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [False, True])
def test_frozen_normalisation_stays_frozen_for_every_span(training):
    layer = naive.randomize(ConvNormAct(3, 4, 1, 2, 4)).eval()
    x = torch.randn(2, 6, 5, 5)
    expected = {span: layer(parents_of(x, span, 2, 4), span) for span in spans(4)}
    layer = freeze_batch_norm_2d(layer).train(training)
    buffers = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    for span, y in expected.items():
        torch.testing.assert_close(layer(parents_of(x, span, 2, 4), span), y)
    for name, tensor in layer.named_buffers():
        assert torch.equal(tensor, buffers[name])
