"""Gradients that are computed another way than PyTorch's, against PyTorch's."""
import copy
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_hne.models import layers
from timm_hne.models.convolution import MIN_CHANNELS, convolve_in_training, has_slow_gradient


def operands(groups, in_chs, out_chs, kernel, height, width, images=3):
    """An image in channels_last and a weight, both with gradients."""
    x = torch.randn(images, groups * in_chs, height, width).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), torch.randn(groups * out_chs, in_chs, kernel, kernel, requires_grad=True)


def expected(x, weight, groups):
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)


@pytest.mark.parametrize('of_input', [True, False])
@pytest.mark.parametrize('like', ['channels_last', 'contiguous', 'expanded'])
@pytest.mark.parametrize('groups, in_chs, out_chs, kernel, height, width', [
    (2, 24, 25, 1, 5, 3), (3, 40, 24, 1, 1, 1), (8, 30, 60, 1, 2, 1), (1, 24, 24, 1, 2, 2),
    (7, 1, 1, 3, 2, 2), (5, 1, 1, 3, 1, 2), (4, 1, 1, 3, 1, 1), (6, 1, 1, 3, 2, 1),
])
def test_gradients_are_those_of_conv2d(groups, in_chs, out_chs, kernel, height, width, like, of_input):
    torch.manual_seed(0)
    x, weight = operands(groups, in_chs, out_chs, kernel, height, width)
    x.requires_grad_(of_input)
    ours, theirs = convolve_in_training(x, weight, groups), expected(x, weight, groups)
    assert torch.equal(ours, theirs)
    grad = {
        'channels_last': torch.randn_like(ours),
        'contiguous': torch.randn_like(ours, memory_format=torch.contiguous_format),
        'expanded': torch.randn(3, 1, 1, 1).expand_as(ours),
    }[like]
    inputs = (x, weight) if of_input else (weight,)
    for a, b in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('change, slow', [
    ({}, True),
    ({'kernel': 3}, False),
    ({'groups': 1}, False),
    ({'in_chs': MIN_CHANNELS - 1}, False),
    ({'out_chs': MIN_CHANNELS - 1}, False),
    ({'in_chs': 1, 'out_chs': 1, 'kernel': 3}, True),
    ({'in_chs': 1, 'out_chs': 1, 'kernel': 3, 'width': 3}, False),
    ({'in_chs': 1, 'out_chs': 1, 'kernel': 5}, False),
])
def test_where_the_other_way_is_taken(change, slow):
    shape = {'groups': 4, 'in_chs': MIN_CHANNELS, 'out_chs': MIN_CHANNELS, 'kernel': 1, 'height': 2, 'width': 2}
    shape.update(change)
    x, weight = operands(**shape)
    groups = shape['groups']
    assert has_slow_gradient(x, weight, (1, 1), groups) == slow
    for other in (
            (x, weight, (2, 2), groups),
            (x.to(torch.bfloat16), weight.to(torch.bfloat16), (1, 1), groups),
            (x.to('meta'), weight.to('meta'), (1, 1), groups),
            (x, weight.detach(), (1, 1), groups),
    ):
        assert not has_slow_gradient(*other)
    with torch.autocast('cpu', torch.bfloat16):
        assert not has_slow_gradient(x, weight, (1, 1), groups)


@pytest.mark.parametrize('name, img_size', [('hne_mobilenetv2_075_e8', 64), ('hne_resnet50_c8', 16)])
def test_a_step_of_a_network_is_the_same(name, img_size):
    """And it does take the other way, in training only."""
    torch.manual_seed(0)
    ours = timm.create_model(name, num_classes=5).to(memory_format=torch.channels_last).train()
    theirs = copy.deepcopy(ours)
    images = torch.randn(4, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    with mock.patch.object(layers, 'convolve_in_training', wraps=convolve_in_training) as calls:
        ours(images).square().mean().backward()
        count = calls.call_count
        assert count
        ours.eval()(images)
        assert calls.call_count == count
        with mock.patch.object(layers, 'has_slow_gradient', lambda *_: False):
            theirs(images).square().mean().backward()
        assert calls.call_count == count
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * b.grad.abs().max().item() + 1e-7, msg=key)


@pytest.mark.parametrize('in_chs, kernel', [(MIN_CHANNELS, 1), (1, 3)])
def test_gradients_of_gradients_and_of_each_image(in_chs, kernel):
    torch.manual_seed(0)
    x, weight = operands(2, in_chs, in_chs, kernel, 2, 2)

    def gradients(convolve):
        grad, = torch.autograd.grad(convolve(x, weight, 2).square().sum(), weight, create_graph=True)
        twice = torch.autograd.grad(grad.square().sum(), (x, weight))
        of_one = torch.func.grad(lambda weight, image: convolve(image[None], weight, 2).square().sum())
        return *twice, torch.func.vmap(of_one, (None, 0))(weight.detach(), x.detach())

    for a, b in zip(gradients(convolve_in_training), gradients(expected)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_network_traced_in_training_can_be_saved(tmp_path):
    layer = layers.BranchedConv2d(MIN_CHANNELS, MIN_CHANNELS, 1, 2, 2).to(memory_format=torch.channels_last).train()
    x, _ = operands(2, MIN_CHANNELS, MIN_CHANNELS, 1, 2, 2)
    torch.jit.trace(layer, x).save(tmp_path / 'layer.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'layer.pt')(x), layer(x))
