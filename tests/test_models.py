"""The base tester: what every registered `hne_*` model must do, and the networks against the naive reference."""
import contextlib
import copy
import io
import math
import pickle

import naive
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from processes import start_processes
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from timm.models import FeatureInfo, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_hne import HierarchicalEnsemble
from timm_hne.evaluation.cost import member_params
from timm_hne.models.hne_mobilenetv2 import InvertedResidual
from timm_hne.models.hne_resnet import Bottleneck
from timm_hne.models.layers import BranchedConv2d, BranchedDropPath, ConvNormAct
from timm_hne.tree import node_span, prefixes

NAMES = timm.list_models('hne_*')
SMALL = ['hne_resnet50_c8', 'hne_mobilenetv2_075_e4']  # one of each family
# A tree of timm's stages has a head for each member, and no layer of ours: tests/test_from_timm.py.
BRANCHED = [name for name in NAMES if name != 'hne_from_timm']
every_model = pytest.mark.parametrize('name', NAMES)
every_branched = pytest.mark.parametrize('name', BRANCHED)
every_family = pytest.mark.parametrize('name', SMALL)
BAD_NUM_MEMBERS = [
    (0, ValueError), (-1, ValueError), (99, ValueError), (True, TypeError), (2.0, TypeError), ('2', TypeError),
    ([2], TypeError), (torch.tensor(2), TypeError),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(name, **kwargs) -> HierarchicalEnsemble:
    """A model by its name, that of timm's stages with a base that is made in a moment."""
    return timm.create_model(name, **{**({'base': 'test_resnet'} if name == 'hne_from_timm' else {}), **kwargs})


def create(name, **kwargs) -> HierarchicalEnsemble:
    return naive.randomize(make(name, **{'num_classes': 5, **kwargs})).eval()


def images(model, batch_size=2, size=None, **kwargs):
    """Images that leave at least 2x2 pixels in the last feature map, unless told otherwise."""
    size = size or 2 * (2 * model.feature_info[-1]['reduction'],)
    return torch.randn(batch_size, model.in_chans, *size, **kwargs)


def some_prefixes(model):
    """The paper's operating points, and one member more than a power of two."""
    return sorted({*prefixes(model.ensemble_size), 3})


def test_there_are_models():
    assert {'hne_resnet50_c16', 'hne_resnet50_c8', 'hne_mobilenetv2_075_e8', 'hne_mobilenetv2_075_e4'} <= set(NAMES)


# The public interface.


@pytest.mark.parametrize('name, nodes, num_classes, input_size', [
    ('hne_resnet50_c16', (1, 2, 4, 8, 16), 10, (3, 32, 32)),
    ('hne_resnet50_c8', (1, 2, 4, 8, 16), 10, (3, 32, 32)),
    ('hne_mobilenetv2_075_e8', (1, 2, 4, 8), 200, (3, 96, 96)),
    ('hne_mobilenetv2_075_e8.hcd_in1k', (1, 2, 4, 8), 1000, (3, 224, 224)),
    ('hne_mobilenetv2_075_e4', (1, 1, 2, 4), 1000, (3, 224, 224)),
])
def test_defaults(name, nodes, num_classes, input_size):
    model = make(name, device='meta')
    assert model.nodes == nodes
    assert model.ensemble_size == model.num_members == nodes[-1]
    assert model.num_classes == num_classes
    assert model.pretrained_cfg['input_size'] == input_size
    assert model(torch.empty(2, *input_size, device='meta')).shape == (2, num_classes)


@every_model
def test_prefixes_are_the_first_members(name):
    model = create(name)
    x = images(model)
    with torch.no_grad():
        members = model.forward_members(x)
        assert members.shape == (2, model.ensemble_size, 5)
        torch.testing.assert_close(model(x), members.mean(1))
        for n in range(1, model.ensemble_size + 1):
            torch.testing.assert_close(model.forward_members(x, n), members[:, :n], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model(x, num_members=n), members[:, :n].mean(1), rtol=1e-4, atol=1e-4)


@every_model
def test_num_members_is_the_default_of_every_call(name):
    n = 3
    model = create(name, num_members=n)
    x = images(model)
    other = create(name)
    other.load_state_dict(model.state_dict())
    assert other.num_members == other.ensemble_size
    for number in (n, 2, 1):
        model.num_members = number
        assert model.num_members == number
        torch.testing.assert_close(model(x), other(x, number))
        torch.testing.assert_close(model.forward_members(x), other.forward_members(x, number))
        torch.testing.assert_close(model.forward_features(x), other.forward_features(x, number))
        torch.testing.assert_close(model(x, n), other(x, n))
        features, intermediates = model.forward_intermediates(x)
        torch.testing.assert_close(features, other.forward_features(x, number))
        torch.testing.assert_close(intermediates, other.forward_intermediates(x, num_members=number)[1])
        assert [f.shape[1] for f in intermediates] == [info['num_chs'] for info in model.feature_info]
    model.num_members = None
    assert model.num_members == model.ensemble_size


@pytest.mark.parametrize('value, error', BAD_NUM_MEMBERS)
@every_family
def test_bad_num_members(name, value, error):
    model = make(name, device='meta')
    x = images(model, device='meta')
    calls = [
        lambda: make(name, device='meta', num_members=value),
        lambda: setattr(model, 'num_members', value),
        lambda: model(x, value),
        lambda: model.forward_members(x, value),
        lambda: model.forward_features(x, value),
        lambda: model.forward_intermediates(x, num_members=value),
    ]
    for call in calls:
        with pytest.raises(error) as info:
            call()
        message = str(info.value)
        assert 'num_members' in message and repr(value) in message and f'1 to {model.ensemble_size}' in message
    assert model.num_members == model.ensemble_size


@pytest.mark.parametrize('nodes, error', [
    ((1, 2), ValueError), ((1, 2, 4, 8, 16, 32), ValueError), ((1, 2, 3, 6, 12), ValueError),
    ((2, 1, 1, 1, 1), ValueError), ((0, 1, 1, 1, 1), ValueError), ((1, 1, 1, 1, -1), ValueError),
    ((1, 1, 1, 1, 2.0), TypeError), ('12345', TypeError), (16, TypeError),
    ((16384,) * 5, ValueError), ((1, 1, 1, 1, 10 ** 9), ValueError),
])
def test_bad_nodes(nodes, error):
    with pytest.raises(error, match='nodes'):
        timm.create_model('hne_resnet50_c8', nodes=nodes)


@pytest.mark.parametrize('argument, value, error', [
    *(('in_chans', value, ValueError) for value in (0, -1)),
    *(('in_chans', value, TypeError) for value in (2.5, '3', True)),
    ('num_classes', -1, ValueError),
    *(('num_classes', value, TypeError) for value in (2.5, '3', True)),
    *(('drop_rate', value, ValueError) for value in (-0.1, 1.1, math.nan, math.inf)),
    ('drop_rate', '0.1', TypeError),
])
@every_family
def test_bad_arguments(name, argument, value, error):
    with pytest.raises(error, match=f'{argument}.*{value}'):
        make(name, device='meta', **{argument: value})


@every_model
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError):
        make(name, device='meta', members=3)


# Against the naive reference, one ordinary network per node.

TREES = [
    *(('hne_resnet50_c8', nodes) for nodes in [
        (1, 2, 4, 8, 16), (1, 1, 1, 6, 6), (1, 1, 1, 1, 5), (4, 4, 4, 4, 4), (1, 3, 3, 6, 12), (2, 2, 4, 4, 8),
        (1, 1, 1, 1, 1),
    ]),
    *(('hne_mobilenetv2_075_e8', nodes) for nodes in [(1, 2, 4, 8), (1, 1, 1, 3), (2, 2, 2, 2), (1, 3, 3, 6)]),
]


def create_pair(name, nodes, dtype=torch.float64):
    """One of the package's models and the naive network with the same weights."""
    model = create(name, nodes=nodes, dtype=dtype)
    resnet = name == 'hne_resnet50_c8'
    reference = naive.naive_resnet(8, nodes, 5) if resnet else naive.naive_mobilenet(nodes, 5)
    reference.to(dtype).eval()
    naive.copy_weights(model, reference)
    return model, reference


@pytest.mark.parametrize('name, nodes', TREES)
def test_every_prefix_equals_the_naive_network(name, nodes):
    model, reference = create_pair(name, nodes)
    for size in [None, (9, 5), (1, 3)]:
        x = images(model, size=size, dtype=torch.float64)
        with torch.no_grad():
            expected = reference.forward_members(x, nodes[-1])
            assert expected.std(dim=0).max() > 1e-5  # images make a difference, far above the tolerance
            for n in range(1, nodes[-1] + 1):
                torch.testing.assert_close(model.forward_members(x, n), expected[:, :n])
                torch.testing.assert_close(model(x, n), expected[:, :n].mean(1))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize('name, nodes', [
    ('hne_resnet50_c8', (1, 2, 4, 8, 16)), ('hne_mobilenetv2_075_e8', (1, 1, 2, 4)),
])
def test_every_prefix_equals_the_naive_network_at_lower_precision(name, nodes, dtype, tolerance):
    model, reference = create_pair(name, nodes, dtype)
    x = images(model, dtype=dtype)
    with torch.no_grad():
        expected = reference.forward_members(x, nodes[-1]).float()
        for n in range(1, nodes[-1] + 1):
            members = model.forward_members(x, n)
            assert members.dtype == dtype
            error = (members.float() - expected[:, :n]).abs().max() / expected.std()
            assert error < tolerance


@pytest.mark.parametrize('name, nodes', [
    ('hne_resnet50_c8', (1, 2, 4, 8, 16)), ('hne_resnet50_c8', (3, 3, 3, 3, 3)), ('hne_resnet50_c8', (1, 3, 3, 6, 12)),
    ('hne_mobilenetv2_075_e8', (1, 1, 2, 4)),
])
@pytest.mark.parametrize('part', ['one', 'some', 'all'])
def test_training_equals_the_naive_network(name, nodes, part):
    n = {'one': 1, 'some': 3, 'all': nodes[-1]}[part]
    model, reference = create_pair(name, nodes)
    model.train()
    reference.train()
    x = images(model, batch_size=3, dtype=torch.float64)
    target = torch.randn(3, n, 5, dtype=torch.float64)
    for _ in range(2):
        logits, expected = model.forward_members(x, n), reference.forward_members(x, n)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        F.mse_loss(logits, target).backward()
        F.mse_loss(expected, target).backward()
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    trained = set()
    for key, node, count, parameter in reference.tensors('named_parameters'):
        gradient = naive.rows(parameters[key].grad, node, count)
        if parameter.grad is None:
            assert not gradient.any(), f'{key}, node {node} is out of use'
        else:
            trained.add(key)
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-8, msg=f'gradient of {key}')
    assert trained == set(parameters)
    for key, node, count, buffer in reference.tensors('named_buffers'):
        if not key.endswith('num_batches_tracked'):
            torch.testing.assert_close(naive.rows(state[key], node, count), buffer, rtol=1e-6, atol=1e-9)


# Costs.

MACS = {
    ('hne_resnet50_c16', 10): {1: 50797056, 2: 65664000, 3: 92212736, 4: 107079680, 8: 201740288, 16: 401989632},
    ('hne_resnet50_c16', 100): {1: 50820096, 2: 65710080, 3: 92281856, 4: 107171840, 8: 201924608, 16: 402358272},
    ('hne_resnet50_c8', 10): {1: 13077760, 2: 16841216, 3: 23561984, 4: 27325440, 8: 51324928, 16: 102166528},
    ('hne_mobilenetv2_075_e8.hcd_in1k', 1000): {1: 179129232, 2: 211960928, 3: 300083440, 4: 332915136, 8: 602257280},
}


@pytest.mark.parametrize('name, num_classes', MACS)
def test_macs(name, num_classes):
    meta = make(name, num_classes=num_classes, device='meta').eval()
    # fvcore traces, which the meta device cannot do.
    model = make(name, num_classes=num_classes).eval()
    x = torch.zeros(1, *model.pretrained_cfg['input_size'])
    for n, macs in MACS[name, num_classes].items():
        with FlopCounterMode(display=False) as counter:
            meta(x.to('meta'), n)
        assert counter.get_total_flops() == 2 * macs
    for n in (1, 3):  # all members: tests/test_cost.py
        model.num_members = n
        by_operator = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
        assert sum(by_operator[operator] for operator in ('conv', 'linear', 'matmul')) == MACS[name, num_classes][n]


@pytest.mark.parametrize('name, params', [('hne_resnet50_c16', 5310928), ('hne_resnet50_c8', 1382456)])
def test_parameters(name, params):
    assert sum(p.numel() for p in make(name, device='meta').parameters()) == params


class Calls(TorchDispatchMode):
    """Records the operators that are called, and the arguments of the convolutions."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.convolutions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func.overloadpacket)
        if func.overloadpacket is torch.ops.aten.convolution:
            self.convolutions.append(args)
        return func(*args, **(kwargs or {}))


@every_branched
def test_the_full_path_replicates_nothing_and_no_path_copies_weights(name):
    model = create(name)
    x = images(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    convs = [module for module in model.modules() if isinstance(module, BranchedConv2d)]
    aten = torch.ops.aten
    views = {aten.slice, aten.alias, aten.detach, aten.view}
    needed = {
        aten.convolution, aten.native_batch_norm, aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.add_,
        aten.empty,  # a batch normalisation's unused statistics
    }
    for n in range(1, model.ensemble_size + 1):
        with torch.no_grad(), Calls() as calls:
            model.forward_features(x, n)
        assert all(args[1].untyped_storage().data_ptr() in parameters for args in calls.convolutions)
        # Only a prefix that parts siblings has to put their families' feature maps together.
        branchings = [children // parents for parents, children in zip(model.nodes, model.nodes[1:])]
        whole = n in prefixes(model.ensemble_size) and set(branchings) <= {1, 2}
        assert set(calls.operators) <= views | needed | (set() if whole else {aten.cat})
        if n == model.ensemble_size:
            # One convolution for each layer, whose input is every parent's channels once.
            inputs = sorted(args[0].shape[1] for args in calls.convolutions)
            assert inputs == sorted(conv.in_channels for conv in convs)


# timm's contract.


@every_branched
def test_features_and_head(name):
    model = create(name)
    x = images(model)
    for n in some_prefixes(model):
        features = model.forward_features(x, n)
        member_chs = model.num_features // model.ensemble_size
        assert features.shape == (2, n * member_chs, 2, 2)
        torch.testing.assert_close(model.forward_head(features), model(x, n))
        hidden = model.forward_head(features, pre_logits=True)
        assert hidden.shape == (2, n * model.head_hidden_size // model.ensemble_size)
        hidden = hidden.unflatten(1, (n, -1))
        classifier = model.get_classifier()
        for m in range(n):
            weight, bias = (naive.rows(t, m, model.ensemble_size) for t in (classifier.weight, classifier.bias))
            logits = F.linear(hidden[:, m], weight, bias)
            torch.testing.assert_close(logits, model.forward_members(x, n)[:, m], rtol=1e-4, atol=1e-4)


@every_branched
def test_reset_classifier(name):
    model = create(name, dtype=torch.float64)
    x = images(model, dtype=torch.float64)
    n = model.ensemble_size
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)

    model.reset_classifier(3)
    assert model.num_classes == 3 and model.get_classifier().weight.shape[0] == n * 3
    assert model(x).shape == (2, 3) and model.forward_members(x, 2).shape == (2, 2, 3)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())

    model.reset_classifier(0)
    torch.testing.assert_close(model(x), hidden)
    torch.testing.assert_close(model.forward_members(x).flatten(1), hidden)
    assert model.forward_members(x, 3).shape == (2, 3, model.head_hidden_size // n)

    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), model.forward_features(x))
    assert model(x, 3).shape == (2, 3 * model.num_features // n, 2, 2)
    with pytest.raises(ValueError, match='global_pool'):
        model.forward_members(x)

    model.train()
    model.reset_classifier(7, 'avg')
    assert all(module.training for module in model.modules())
    assert model(x).shape == (2, 7)


@every_family
@pytest.mark.parametrize('args, message', [
    ((-1,), 'num_classes .* -1'), ((3, ''), "3 classes .* global_pool=''"),
    ((3, 'median'), "global_pool .*avg.* 'median'"),
])
def test_a_classifier_that_cannot_be_leaves_the_model_as_it_was(name, args, message):
    model = create(name)
    x = images(model)
    expected = model(x)
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(*args)
    torch.testing.assert_close(model(x), expected)
    assert model.num_classes == 5 and model.global_pool.pool_type == 'avg'


@every_family
def test_the_new_classifier_of_a_part_of_a_tree_has_its_members_alone(name):
    model = create(name)
    part = model.extract(3)
    part.reset_classifier(7)
    model.reset_classifier(7)
    expected = model.extract(3)
    assert member_params(part) == member_params(expected)
    part.load_state_dict(expected.state_dict())
    x = images(model)
    for n in (1, 2, 3):
        torch.testing.assert_close(part(x, num_members=n), model(x, num_members=n))


def test_a_pooling_that_does_not_fit_the_hidden_layer_leaves_the_model_as_it_was():
    model = create('hne_mobilenetv2_075_e4')
    x = images(model)
    expected = model(x)
    with pytest.raises(ValueError, match=r'catavgmax.*hidden'):
        model.reset_classifier(3, 'catavgmax')
    torch.testing.assert_close(model(x), expected)


@every_branched
def test_frozen_weights_stay_frozen(name):
    model = make(name, device='meta').requires_grad_(False)
    model.reset_classifier(4)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {'classifier.weight', 'classifier.bias'}
    model.reset_classifier(0, '')
    assert not any(p.requires_grad for p in model.parameters())


POOLINGS = {
    'avg': lambda x: x.mean((2, 3)),
    'max': lambda x: x.amax((2, 3)),
    'avgmax': lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    'catavgmax': lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1),
}


@every_family
@pytest.mark.parametrize('global_pool', [*POOLINGS, 'fastavg', 'fastcatavgmax'])
def test_global_pool(name, global_pool):
    model = create(name, global_pool=global_pool)
    x = images(model)
    with torch.no_grad():
        members = model.forward_members(x)
        for m, features in enumerate(model.forward_features(x).chunk(model.ensemble_size, dim=1)):
            y = POOLINGS[global_pool.removeprefix('fast')](features)
            for layer, act in [(model.hidden, F.relu6), (model.classifier, nn.Identity())]:
                if isinstance(layer, type(model.classifier)):
                    y = F.linear(y, *(naive.rows(t, m, model.ensemble_size) for t in (layer.weight, layer.bias)))
                    y = act(y)
            torch.testing.assert_close(members[:, m], y, rtol=1e-4, atol=1e-4)
        for n in some_prefixes(model):
            torch.testing.assert_close(model.forward_members(x, n), members[:, :n], rtol=1e-4, atol=1e-4)


@every_family
def test_concatenated_poolings_widen_the_classifier(name):
    model = make(name, num_classes=0, device='meta')
    if name == 'hne_resnet50_c8':
        model.reset_classifier(5, 'catavgmax')
        assert model.head_hidden_size == 2 * model.num_features
    else:
        model = make(name, global_pool='catavgmax', device='meta')
        assert model.head_hidden_size == 1280 * model.ensemble_size
    x = images(model, device='meta')
    assert model(x).shape == (2, model.num_classes)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.head_hidden_size)


@every_branched
@pytest.mark.parametrize('feature_cls', ['getter', 'list', None])
def test_features_only(name, feature_cls):
    kwargs = {} if feature_cls is None else {'feature_cls': feature_cls}
    model = make(name, features_only=True, device='meta', **kwargs)
    full = make(name, device='meta')
    assert model.feature_info.channels() == [info['num_chs'] for info in full.feature_info]
    x = images(full, device='meta')
    for reduction, channels, y in zip(model.feature_info.reduction(), model.feature_info.channels(), model(x)):
        assert y.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)
    some = make(name, features_only=True, out_indices=(1, 2), device='meta', **kwargs)
    assert [y.shape[1] for y in some(x)] == some.feature_info.channels() == model.feature_info.channels()[1:3]


@every_branched
@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'Dict'])
def test_wrappers_that_would_compute_all_members(name, feature_cls, tmp_path):
    with pytest.raises(ValueError, match=f"feature_cls .*'{feature_cls}'.*num_members=1"):
        make(name, features_only=True, feature_cls=feature_cls, num_members=1, device='meta')
    model = create(name, num_members=1)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, feature_cls=feature_cls)
    channels = [block.nodes * block.out_channels for block in model.blocks]
    found = loaded(images(model))
    found = list(found.values()) if isinstance(found, dict) else found
    assert [y.shape[1] for y in found] == loaded.feature_info.channels() == channels


@every_model
def test_number_of_members_that_timm_saves(name, tmp_path):
    model = create(name, num_members=1)
    for n, saved in ((1, 1), (None, model.ensemble_size), (3, 3)):
        model.num_members = n
        save_for_hf(model, tmp_path / f'{n}', safe_serialization=True)
        assert timm.create_model(f'local-dir:{tmp_path / str(n)}', pretrained=True).num_members == saved


@every_model
@pytest.mark.parametrize('n', [1, 3])
def test_widths_of_a_part(name, n):
    part = create(name).extract(n)
    x = images(part)
    part.reset_classifier(0)
    assert part(x).shape == (len(x), part.head_hidden_size)
    assert part.forward_features(x).shape[1] == part.num_features
    part.reset_classifier(4)
    hidden = part.forward_head(part.forward_features(x), pre_logits=True)
    assert hidden.shape == (len(x), part.head_hidden_size) and part(x).shape == (len(x), 4)


@every_model
def test_features_only_of_a_prefix(name):
    for n in (1, 3):
        model = make(name, features_only=True, out_indices=(0, 2, -1), num_members=n, device='meta')
        full = make(name, device='meta')
        x = images(full, device='meta')
        expected = full.forward_intermediates(x, (0, 2, len(full.blocks) - 1), num_members=n, intermediates_only=True)
        assert [y.shape for y in model(x)] == [y.shape for y in expected]
        assert model.feature_info.channels() == [y.shape[1] for y in expected]


@every_model
def test_forward_intermediates(name):
    model = create(name)
    x = images(model)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        output, intermediates = model.forward_intermediates(x)
        assert len(intermediates) == len(model.blocks) == len(info.channels())
        for channels, reduction, y in zip(info.channels(), info.reduction(), intermediates):
            assert y.shape == (2, channels, math.ceil(x.shape[2] / reduction), math.ceil(x.shape[3] / reduction))
        torch.testing.assert_close(output, model.forward_features(x))
        torch.testing.assert_close(intermediates[-1], output)
        for n in (1, 3):
            prefix = model.forward_intermediates(x, num_members=n, intermediates_only=True)
            for block, y, whole in zip(model.blocks, prefix, intermediates):
                count = node_span(block.nodes, 0, n, model.ensemble_size)[1]
                assert y.shape[1] == count * block.out_channels
                torch.testing.assert_close(y, whole[:, :y.shape[1]], rtol=1e-4, atol=1e-4)
        last, = model.forward_intermediates(x, indices=1, intermediates_only=True)
        torch.testing.assert_close(last, output)
        first, some = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
        torch.testing.assert_close(some, intermediates[:2])
        torch.testing.assert_close(first, intermediates[1])
        model.set_grad_checkpointing()
        torch.testing.assert_close(model.forward_intermediates(x)[0], output)
    with pytest.raises(ValueError, match=r'output_fmt.*NHWC'):
        model.forward_intermediates(x, output_fmt='NHWC')


@every_model
def test_prune_intermediate_layers(name):
    model = create(name, drop_rate=0.5)
    x = images(model)
    last = len(model.blocks) - 1
    with torch.no_grad():
        expected = model(x)
        taps = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([last], prune_head=False) == [last]
        torch.testing.assert_close(whole(x), expected)
    for index in range(last + 1):
        for prune_norm in (False, True):
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([index], prune_norm=prune_norm) == [index]
            with torch.no_grad():
                stopped = model.forward_intermediates(x, [index], stop_early=True, intermediates_only=True)
                torch.testing.assert_close(stopped[0], taps[index])
                tap, = pruned.forward_intermediates(x, [index], intermediates_only=True)
                torch.testing.assert_close(tap, taps[index])
                torch.testing.assert_close(pruned.forward_features(x), taps[index])
                torch.testing.assert_close(pruned(x), taps[index])
        assert pruned.num_features == taps[index].shape[1]
        assert len(pruned.feature_info) == index + 1
        pruned.train()
        pruned.forward_features(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())


@every_branched
def test_a_pruned_model_is_a_smaller_ensemble(name):
    model = create(name, num_members=3)
    x = images(model)
    index = len(model.blocks) - 2
    tap = model.forward_intermediates(x, [index], intermediates_only=True)[0]
    nodes, channels = model.nodes[index], model.blocks[index].out_channels
    expected_default = math.ceil(3 * nodes / model.ensemble_size)
    model.prune_intermediate_layers([index])
    assert model.nodes[-1] == model.ensemble_size == nodes
    assert model.num_members == expected_default
    torch.testing.assert_close(model.forward_features(x), tap)
    model.reset_classifier(7, 'avg')
    assert model.head_hidden_size == nodes * channels
    assert model(x).shape == (2, 7) and model.forward_members(x).shape == (2, expected_default, 7)
    members = model.forward_members(x, nodes)
    assert members.shape == (2, nodes, 7)
    for n in range(1, nodes + 1):
        torch.testing.assert_close(model.forward_members(x, n), members[:, :n])
        torch.testing.assert_close(model(x, n), members[:, :n].mean(1))
        pooled = model.forward_head(model.forward_features(x, n), pre_logits=True)
        assert pooled.shape == (2, n * channels)
    with pytest.raises(ValueError, match='num_members'):
        model(x, nodes + 1)
    model.num_members = None
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_model
def test_grad_checkpointing_gives_the_same_gradients(name):
    model = create(name, dtype=torch.float64).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = images(model, dtype=torch.float64)
    saved = {}
    for other in (model, checkpointed):
        tensors = []

        def keep(tensor, tensors=tensors):
            tensors.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = other.forward_members(x, 3).square().sum()
        saved[other] = sum(tensors)
        loss.backward()
    assert saved[checkpointed] < saved[model]
    for p, q in zip(model.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    checkpointed.set_grad_checkpointing(False)
    assert not any(block.grad_checkpointing for block in checkpointed.blocks)


@every_model
def test_every_parameter_gets_a_gradient(name):
    model = make(name, num_classes=42).train()
    model(images(model)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_branched
@pytest.mark.parametrize('coarse', [False, True])
def test_group_matcher_orders_parameters_by_depth(name, coarse):
    model = make(name, device='meta')
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {key for key, _ in model.named_parameters()}
    depths = [groups[key] for key, _ in model.named_parameters()]  # registered in the order of the data
    assert depths == sorted(depths)
    assert groups['classifier.weight'] == groups['classifier.bias'] == max(depths)
    assert groups['blocks.1.0.' + ('conv1' if 'resnet' in name else 'conv_pw') + '.conv.weight'] == 1
    layers = sum(len(block) for block in model.blocks[1:])
    assert len(set(depths)) == 2 + (len(model.blocks) - 1 if coarse else layers)
    decayed = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert len({group['lr_scale'] for group in decayed}) > 3


@every_branched
def test_only_weights_decay(name):
    model = make(name, device='meta')
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.1)
    decay = {group['weight_decay']: {id(p) for p in group['params']} for group in optimizer.param_groups}
    for key, p in model.named_parameters():
        weight = key.endswith('.weight') and '.bn.' not in key
        assert id(p) in decay[0.1 if weight else 0.]


@every_model
def test_nodes_and_members_start_different(name):
    model = make(name)
    for module in model.modules():
        if isinstance(module, BranchedConv2d):
            nodes = [naive.rows(module.weight, k, module.nodes) for k in range(module.nodes)]
            assert not any(torch.equal(a, b) for a, b in zip(nodes, nodes[1:]))
            if module.weight.numel() > 10000:
                assert module.weight.mean().abs() < 0.1 * module.weight.std()
    with torch.no_grad():
        members = model.eval().forward_members(images(model))
    distances = torch.cdist(members.transpose(0, 1).flatten(1), members.transpose(0, 1).flatten(1))
    distances.fill_diagonal_(math.inf)
    assert distances.min() > 0.01 * members.std()


@every_branched
def test_init_weights_sets_everything(name):
    model = make(name, num_classes=5, device='meta').to_empty(device='cpu').eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])
    assert model(images(model)).isfinite().all()


def test_residual_layers_start_as_their_shortcuts():
    for zero_init_last in (True, False):
        model = timm.create_model('hne_resnet50_c8', zero_init_last=zero_init_last)
        assert {bool(block[-1].conv3.bn.weight.any()) for block in model.blocks[1:]} == {not zero_init_last}


@every_model
@pytest.mark.parametrize('in_chans', [1, 4])
def test_in_chans(name, in_chans):
    model = make(name, in_chans=in_chans, device='meta')
    assert model.in_chans == in_chans
    assert model(images(model, device='meta')).shape == (2, model.num_classes)
    assert model.get_submodule(model.pretrained_cfg['first_conv']).weight.shape[1] == in_chans


@every_family
def test_drop_rate(name):
    model, plain = create(name, drop_rate=0.5), create(name)
    plain.load_state_dict(model.state_dict())
    x = images(model)
    torch.testing.assert_close(model(x), plain(x))
    freeze = freeze_batch_norm_2d(model).train()
    assert not torch.allclose(freeze(x), plain(x))
    hidden = freeze.forward_head(freeze.forward_features(x), pre_logits=True)
    expected = plain.forward_head(plain.forward_features(x), pre_logits=True)
    dropped = hidden == 0
    assert 0.3 < dropped[expected > 0].float().mean() < 0.7
    torch.testing.assert_close(hidden[~dropped], 2 * expected[~dropped], rtol=1e-4, atol=1e-4)


@every_family
def test_drop_path(name):
    model = create(name, drop_path_rate=0.5)
    rates = [layer.drop_prob for layer in model.modules() if isinstance(layer, BranchedDropPath)]
    assert rates == sorted(rates) and rates[0] > 0 and rates[-1] == 0.5
    plain = create(name)
    assert not [layer for layer in plain.modules() if isinstance(layer, BranchedDropPath)]
    plain.load_state_dict(model.state_dict())
    x = images(model)
    with torch.no_grad():
        for n in some_prefixes(model):
            assert torch.equal(model(x, num_members=n), plain(x, num_members=n))
        # Without the statistics of the batch, training differs by the paths that are left out alone.
        freeze_batch_norm_2d(model).train()
        assert not torch.equal(model(x), plain(x)) and not torch.equal(model(x), model(x))
    model.set_grad_checkpointing()
    model(x, num_members=3).sum().backward()


def test_drop_path_leaves_the_shortcut():
    x = torch.randn(3, 16, 4, 4)
    residual, inverted = Bottleneck(8, 8, 2, 2, 1, False, {}, 1.), InvertedResidual(8, 8, 2, 2, 1, {}, 1.)
    assert torch.equal(residual.train()(x), x.relu()) and not torch.equal(residual.eval()(x), x.relu())
    assert torch.equal(inverted.train()(x), x) and not torch.equal(inverted.eval()(x), x)


@every_family
@pytest.mark.parametrize('value, error', [(-0.1, ValueError), (1.1, ValueError), ('0.1', TypeError), (True, TypeError)])
def test_bad_drop_path(name, value, error):
    with pytest.raises(error, match=rf'drop_path_rate.*{value}'):
        make(name, drop_path_rate=value, device='meta')


@every_branched
def test_device_and_dtype_arguments(name):
    model = make(name, device='meta', dtype=torch.float64)
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.is_meta and (tensor.dtype == torch.float64 or not tensor.is_floating_point())
    model.reset_classifier(3)
    assert model.classifier.weight.is_meta and model.classifier.weight.dtype == torch.float64
    for n in some_prefixes(model):
        assert model(images(model, device='meta', dtype=torch.float64), n).shape == (2, 3)


@every_branched
def test_channels_last(name):
    model = create(name)
    x = images(model, size=(64, 64))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    outputs = []
    for module in last.modules():
        if isinstance(module, ConvNormAct):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits = last(x.to(memory_format=torch.channels_last))
        assert outputs and all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
        torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
        for n in (1, 3):
            y = last(x.to(memory_format=torch.channels_last), n)
            torch.testing.assert_close(y, model(x, n), rtol=1e-4, atol=1e-4)


@every_model
def test_bfloat16(name):
    model = create(name, dtype=torch.bfloat16).train()
    x = images(model, dtype=torch.bfloat16)
    logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@every_family
def test_autocast(name):
    model = create(name)
    x = images(model)
    with torch.no_grad():
        for n in (3, model.ensemble_size):
            expected = model(x, n)
            with torch.autocast('cpu', torch.bfloat16):
                assert model.forward_features(x, n).dtype == torch.bfloat16
                logits = model(x, n)
            assert (logits - expected).abs().max() < 0.1 * expected.std()


# Compilers and copies.


@every_branched
def test_torchscript(name):
    model = create(name, num_members=2)
    scripted = torch.jit.script(model)
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted(x), model(x))
        for n in range(1, model.ensemble_size + 1):
            torch.testing.assert_close(scripted(x, n), model(x, n))
        for n in (0, model.ensemble_size + 1):
            with pytest.raises(torch.jit.Error, match=f'num_members .*1 .*{model.ensemble_size}.* {n}'):
                scripted(x, n)


@every_family
def test_torchscript_of_a_frozen_model(name):
    model = freeze_batch_norm_2d(create(name))
    x = images(model)
    torch.testing.assert_close(torch.jit.script(model)(x, 3), model(x, 3))


@every_model
def test_fx(name):
    model = create(name, num_members=3)
    traced = torch.fx.symbolic_trace(model)
    x = images(model, batch_size=3)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(ValueError, match='pixels'):
        traced(x[:, :, :0])


@every_family
def test_torch_export_gives_one_program_for_each_number_of_members(name, shallow):
    model = create(name)
    x = images(model)
    for n in (1, 3, model.ensemble_size):
        program = torch.export.export(model, (x, n), dynamic_shapes=({0: torch.export.Dim('batch')}, None))
        many = images(model, batch_size=5)
        torch.testing.assert_close(program.module()(many, n), model(many, n), rtol=1e-4, atol=1e-4)


@every_family
def test_torch_compile_has_no_graph_breaks(name, shallow):
    torch._dynamo.reset()
    model = create(name)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    compiled_members = torch.compile(model.forward_members, fullgraph=True, backend='eager')
    with torch.no_grad():
        for batch_size, n in [(2, None), (2, 1), (2, 2), (5, 3), (6, 3)]:
            x = images(model, batch_size)
            torch.testing.assert_close(compiled(x, n), model(x, n))
        torch.testing.assert_close(compiled_members(x, 3), model.forward_members(x, 3))


@every_family
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_torch_compile_trains(name, grad_checkpointing, shallow):
    torch._dynamo.reset()
    model = create(name).train()
    model.set_grad_checkpointing(grad_checkpointing)
    other = copy.deepcopy(model)
    x = images(model)
    torch.compile(model, fullgraph=True, backend='aot_eager')(x).square().sum().backward()
    other(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item(), msg=key)
    if not grad_checkpointing:  # which normalises twice, so that the running statistics depend on the compiler
        torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()), rtol=1e-4, atol=1e-4)


@every_model
def test_copies_are_equal_and_independent(name):
    model = create(name, num_members=3)
    x = images(model)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for other in copies:
        assert other.num_members == 3 and other.nodes == model.nodes
        torch.testing.assert_close(other(x), expected)
        other.num_members = 1
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    assert model.num_members == 3
    torch.testing.assert_close(model(x), expected)


@every_model
def test_the_state_dict_holds_all_there_is(name):
    model, other = create(name), create(name)
    other.load_state_dict(model.state_dict())
    x = images(model)
    torch.testing.assert_close(other(x), model(x))


# Parallel training.


@contextlib.contextmanager
def process_group(path, rank=0, world_size=1):
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.FileStore(str(path), world_size), rank=rank, world_size=world_size,
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def train_rank(rank, path, name, world_size=2):
    """One process of two: the gradients of half a batch, averaged by DDP, are those of the batch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = freeze_batch_norm_2d(create(name)).train()
    x = images(model, batch_size=4)
    alone = copy.deepcopy(model)
    alone(x).square().sum().backward()
    with process_group(path, rank, world_size):
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(x[rank::world_size]).square().sum().backward()
        for p, q in zip(model.parameters(), alone.parameters()):
            torch.testing.assert_close(p.grad * world_size, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item())


@every_family
def test_distributed_data_parallel_in_one_process(name, tmp_path):
    model = create(name).train()
    x = images(model)
    alone = copy.deepcopy(model)
    with process_group(tmp_path / 'store'):
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # an unused parameter would fail in the second step
            torch.testing.assert_close(parallel(x), alone(x))
            parallel(x).sum().backward()
            alone(x).sum().backward()
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_distributed_data_parallel_in_two_processes(tmp_path):
    start_processes(train_rank, tmp_path / 'store', 'hne_resnet50_c8')


@every_family
def test_conversion_to_synchronised_batch_normalisation(name):
    model = create(name)
    x = images(model)
    expected = {n: model(x, n) for n in some_prefixes(model)}
    model = convert_sync_batchnorm(model)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == sum(
        isinstance(m, ConvNormAct) for m in model.modules())
    for n, y in expected.items():
        torch.testing.assert_close(model(x, n), y)


# Images of all kinds.


@every_model
@torch.no_grad()
def test_any_batch_and_image_size(name):
    model = create(name)
    for batch, height, width in [(0, 32, 32), (1, 32, 32), (2, 33, 47), (1, 1, 1), (1, 2, 100), (2, 17, 8)]:
        x = torch.randn(batch, 3, height, width)
        for n in (1, 3, model.ensemble_size):
            members = model.forward_members(x, n)
            assert members.shape == (batch, n, 5) and members.isfinite().all()
            assert model(x, n).shape == (batch, 5)
        if batch == 1:
            twice = torch.cat([x, torch.randn_like(x)])
            torch.testing.assert_close(model(twice)[:1], model(x), rtol=1e-4, atol=1e-4)


@every_model
def test_one_image_trains(name):
    model = create(name).train()
    model(images(model, batch_size=1)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_family
@pytest.mark.parametrize('shape', [(2, 3, 0, 8), (2, 3, 8, 0), (3, 8, 8), (2, 3, 8)])
def test_no_image(name, shape):
    model = create(name)
    for call in (model, model.forward_members, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r'x .*1x1') as info:
            call(torch.randn(shape))
        assert str(list(shape)) in str(info.value)
