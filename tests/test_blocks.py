"""The block protocol: the same network from replicated and from branched blocks, whatever is done with it."""
import naive
import numpy as np
import pytest
import timm
import tiny
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import tiny_ensemble

from timm_hne import early_exit, optimize_for_inference
from timm_hne.evaluation import member_macs, member_params
from timm_hne.inference import anytime, first_frontier
from timm_hne.models.extract import extract
from timm_hne.models.hne_resnet import HNEResNet
from timm_hne.models.layers import BranchedConv2d
from timm_hne.models.replicated import ReplicatedBlock, ReplicatedEnsemble
from timm_hne.models.weights import load_grown
from timm_hne.tree import node_span

TREES = [(1, 2, 4, 8, 16), (1, 1, 1, 3, 3), (2, 2, 4, 4, 8), (3, 3, 3, 3, 3), (1, 3, 3, 6, 12), (1, 1, 1, 1, 1)]
every_tree = pytest.mark.parametrize('nodes', TREES, ids=str)


class Head(tiny.Head):
    """A head whose classifier can be replaced."""

    def reset_classifier(self, num_classes, global_pool=None):
        features = self.classifier.weight.shape[1]
        self.classifier = nn.Linear(features, num_classes).to(self.classifier.weight)


def replicated_resnet(nodes, width, num_classes):
    """hne_resnet50 with ordinary modules as its nodes."""
    blocks, channels = [], [4 * width, *(multiple * width for multiple, *_ in HNEResNet.stages)]
    for b, (parents, count) in enumerate(zip((1, *nodes), nodes)):
        blocks.append(ReplicatedBlock([naive.resnet_block(b, width) for _ in range(count)], parents, channels[b]))
    heads = [Head(channels[-1], num_classes) for _ in range(nodes[-1])]
    return ReplicatedEnsemble(blocks, (1, 1, 2, 4, 4), heads, num_classes, channels[-1], 3)


def convert(state, source, target):
    """Turn the state dict of one kind of ensemble into that of the other, block by block."""
    names = {'classifier': ('heads', 'classifier.'), 'heads': ('classifier', 'classifier.')}
    converted = {}
    for name, part in source.parts().items():
        pieces = part.split_state({k.removeprefix(f'{name}.'): v for k, v in state.items() if k.startswith(f'{name}.')})
        other, inner = names.get(name, (name, ''))
        if other == 'heads':
            pieces = [{inner + key: tensor for key, tensor in piece.items()} for piece in pieces]
        elif inner:
            pieces = [{key.removeprefix(inner): tensor for key, tensor in piece.items()} for piece in pieces]
        joined = target.parts()[other].join_state(pieces)
        converted.update({f'{other}.{key}': tensor for key, tensor in joined.items()})
    return converted


def pair(nodes, width=4, num_classes=5):
    torch.manual_seed(0)
    branched = naive.randomize(HNEResNet(width, nodes, num_classes, dtype=torch.float64)).eval()
    replicated = replicated_resnet(nodes, width, num_classes).double().eval()
    replicated.load_state_dict(convert(branched.state_dict(), branched, replicated))
    return branched, replicated


def images(size=(2, 3, 8, 8)):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_tree
def test_every_prefix_is_the_same(nodes):
    branched, replicated = pair(nodes)
    x = images()
    with torch.no_grad():
        for n in range(1, nodes[-1] + 1):
            torch.testing.assert_close(replicated.forward_members(x, n), branched.forward_members(x, n))
            torch.testing.assert_close(replicated(x, num_members=n), branched(x, num_members=n))
            features = replicated.forward_features(x, n)
            torch.testing.assert_close(features, branched.forward_features(x, n))
            torch.testing.assert_close(replicated.forward_head(features), branched(x, n))
            torch.testing.assert_close(
                replicated.forward_head(features, pre_logits=True), branched.forward_head(features, pre_logits=True))
        for ours, others in zip(*(model.forward_intermediates(x, num_members=2 % nodes[-1] + 1)[1]
                                  for model in (replicated, branched))):
            torch.testing.assert_close(ours, others)


@every_tree
def test_state_dicts_convert_both_ways(nodes):
    branched, replicated = pair(nodes)
    state = convert(replicated.state_dict(), replicated, branched)
    assert state.keys() == branched.state_dict().keys()
    for name, tensor in branched.state_dict().items():
        assert torch.equal(state[name], tensor), name


@every_tree
@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients_and_statistics_are_the_same(nodes, checkpointing):
    branched, replicated = pair(nodes)
    n = min(3, nodes[-1])
    for model in (branched, replicated):
        model.train()
        model.set_grad_checkpointing(checkpointing)
        F.cross_entropy(model(images((4, 3, 8, 8)), n), torch.arange(4)).backward()
    gradients = {name: p.grad for name, p in branched.named_parameters()}
    expected = convert(gradients, branched, replicated)
    for name, parameter in replicated.named_parameters():
        if parameter.grad is None:
            assert not expected[name].any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-6, atol=1e-10, msg=name)
    statistics = convert(branched.state_dict(), branched, replicated)
    for name, tensor in replicated.state_dict().items():
        if 'running' in name:
            torch.testing.assert_close(tensor, statistics[name], msg=name)


@every_tree
def test_anytime_and_early_exit_are_the_same(nodes):
    branched, replicated = pair(nodes)
    x = images((5, 3, 8, 8))
    schedule = tuple(sorted({1, min(3, nodes[-1]), nodes[-1]}))
    for ours, others in zip(replicated.anytime(x, schedule), branched.anytime(x, schedule)):
        torch.testing.assert_close(ours, others)
    threshold = branched(x, 1).softmax(1).amax(1).median().item()
    results = [early_exit(model, x, threshold, schedule=schedule) for model in (replicated, branched)]
    torch.testing.assert_close(results[0].logits, results[1].logits)
    assert torch.equal(results[0].num_members, results[1].num_members)


@every_tree
def test_extracted_members_are_the_same(nodes):
    branched, replicated = pair(nodes)
    x = images()
    for n in sorted({1, 2, 3, nodes[-1] - 1, nodes[-1]} & {*range(1, nodes[-1] + 1)}):
        part, other = replicated.extract(n), branched.extract(n)
        assert part.nodes == other.nodes and part.ensemble_size == other.ensemble_size == n
        assert part.num_features == other.num_features and part.head_hidden_size == other.head_hidden_size
        torch.testing.assert_close(part(x), replicated(x, n))
        torch.testing.assert_close(part.forward_members(x, 1), replicated.forward_members(x, 1))
        assert sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in other.parameters())
    memory = {p.untyped_storage().data_ptr() for p in replicated.parameters()}
    assert not memory & {p.untyped_storage().data_ptr() for p in part.parameters()}


@pytest.mark.parametrize('nodes', [(1, 1, 1, 3, 3), (2, 2, 2, 2, 4)], ids=str)
def test_costs_are_the_same(nodes):
    branched, replicated = pair(nodes)
    assert member_macs(replicated, 16) == member_macs(branched, 16)
    assert member_params(replicated) == member_params(branched)


def test_an_extracted_model_is_extracted_again():
    for model in pair((1, 2, 4, 8, 16)):
        three = model.extract(3)
        torch.testing.assert_close(three.extract(2)(images()), model(images(), 2))


def test_classifiers_of_replicated_members_are_replaced():
    _, model = pair((1, 1, 1, 2, 4))
    assert model.classifier_names == tuple(f'heads.{m}.classifier' for m in range(4))
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0, '')
    assert model(images(), 3).shape == model.forward_features(images(), 3).shape
    for arguments in ((-1,), (3, '')):
        with pytest.raises(ValueError, match=str(arguments[0])):
            model.reset_classifier(*arguments)


@pytest.mark.parametrize('x, error, words', [
    (np.zeros((2, 16, 8, 8), np.float32), TypeError, 'ndarray'),
    (None, TypeError, 'NoneType'),
    (torch.zeros(2, 16, 8, 8, dtype=torch.uint8), TypeError, 'uint8'),
    (torch.zeros(2, 12, 8, 8), ValueError, r'4 .*8 .*\[2, 12, 8, 8\]'),
    (torch.zeros(2, 40, 8, 8), ValueError, r'4 .*8 .*\[2, 40, 8, 8\]'),
    (torch.zeros(2, 0, 8, 8), ValueError, r'\[2, 0, 8, 8\]'),
    (torch.zeros(2), ValueError, r'\[2\]'),
])
@pytest.mark.parametrize('kind', ['branched', 'replicated'])
def test_features_that_the_head_cannot_take(kind, x, error, words):
    model = tiny_ensemble(kind=kind)
    with pytest.raises(error, match=f'x .*{words}'):
        model.forward_head(x)
    features = model.forward_features(images().float())
    torch.testing.assert_close(model.forward_head(features), model(images().float()))


@pytest.mark.parametrize('call', [
    lambda model: extract(model, 1),
    lambda model: load_grown(model, {}),
    lambda model: first_frontier(model, images()),
    lambda model: next(anytime(model, images())),
])
@pytest.mark.parametrize('model', [nn.Linear(1, 1), timm.create_model('test_resnet', device='meta'), None])
def test_what_is_no_ensemble_is_refused(call, model):
    with pytest.raises(TypeError, match=f'model .*{type(model).__name__}'):
        call(model)


def test_an_optimised_ensemble_is_not_extracted():
    """It would be the copy of a stand-in, whose programs are of another model."""
    with pytest.raises(TypeError, match=r'model .*OptimizedEnsemble'):
        extract(optimize_for_inference(tiny_ensemble(), engine='eager'), 1)


class WithBareConvolution(HNEResNet):
    """A family whose last block ends in a convolution without a normalisation."""

    def __init__(self, **kwargs):
        super().__init__(width=4, nodes=(1, 1, 2, 2, 4), num_classes=5, **kwargs)
        self.blocks[-1].append(BranchedConv2d(64, 64, 1, 4, 4))


def test_bare_convolutions_are_cut_too():
    model = naive.randomize(WithBareConvolution()).eval()
    x = images().float()
    for n in (1, 2, 3, 4):
        part = model.extract(n)
        torch.testing.assert_close(part(x), model(x, n))
        nodes = node_span(4, 0, n, 4)[1]
        assert part.blocks[-1][-1].weight.shape[0] == 64 * nodes


def test_members_that_would_not_be_synchronised_are_refused_in_training():
    model = timm.layers.convert_sync_batchnorm(HNEResNet(4, (1, 1, 1, 1, 2), 5)).train()
    with pytest.raises(RuntimeError, match='num_members'):
        model(images().float(), 1)
    assert model.eval()(images().float(), 1).shape == (2, 5)


def test_cumulative_statistics_of_a_part_of_the_members_are_refused_in_training():
    model = HNEResNet(4, (1, 1, 1, 1, 2), 5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    assert model(images().float()).shape == (2, 5)
    with pytest.raises(ValueError, match=r'momentum.*None'):
        model(images().float(), 1)
    assert model.eval()(images().float(), 1).shape == (2, 5)
