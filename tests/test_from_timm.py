"""Any timm model as an ensemble: against the model itself, and against copies of it put together by hand."""
import copy
import io
import json
import pickle
import re
import shutil
from dataclasses import replace

import naive
import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from test_cut import FAMILIES, REFUSED, create, names
from test_hub import results_of
from test_trainer import make_images
from timm.models import _registry, get_pretrained_cfg, group_parameters, resolve_model_input_args, save_for_hf

import timm_hne
from timm_hne.__main__ import main
from timm_hne.evaluation.cost import member_macs
from timm_hne.models.from_timm import default_nodes
from timm_hne.models.weights import read_sizes
from timm_hne.pretrained import state_digest
from timm_hne.training.checkpoint import RunCheckpoint, load_checkpoint
from timm_hne.tree import node_span

NAME = 'hne_from_timm'
# A tensor across the cuts; tokens; channels last within; a tuple of tensors across a cut.
BASES = ['test_resnet', 'test_vit', 'test_convnext', 'xcit_nano_12_p8_224']
every_base = pytest.mark.parametrize('base', BASES)
small_bases = pytest.mark.parametrize('base', BASES[:3])
# More than a second each on one core. Their members are compared by names and shapes only.
SLOW = {
    'beit', 'byoanet', 'convmixer', 'csatv2', 'davit', 'deepseek_vit', 'focalnet', 'hiera', 'hieradet_sam2',
    'inception_resnet_v2', 'inception_v3', 'inception_v4', 'mobilenetv5', 'mvitv2', 'naflexvit', 'nasnet', 'nest',
    'nextvit', 'pnasnet', 'qwen3_vit', 'rdnet', 'res2net', 'sequencer', 'swin_transformer', 'swin_transformer_v2',
    'swin_transformer_v2_cr', 'tresnet', 'vgg', 'vitamin', 'volo', 'xception', 'xception_aligned',
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_base(name='test_resnet', **kwargs):
    size = {} if name in ('test_resnet', 'test_convnext') else dict(img_size=32)
    return naive.randomize(create(name, **{**size, **kwargs})).eval()


def tree_for(base, *nodes):
    """The last levels of a tree, before them one shared node a block."""
    blocks = 5 if base == 'test_resnet' else 4
    return (1,) * (blocks - len(nodes)) + nodes


def by_name(base='test_resnet', **kwargs):
    size = {} if base in ('test_resnet', 'test_convnext') else dict(img_size=32)
    return timm.create_model(NAME, **{
        'base': base, 'nodes': tree_for(base, 2, 4), 'num_classes': 5, 'init': 'perturb', **size, **kwargs})


def make_ensemble(base, nodes=(2, 4), **kwargs):
    """A model whose every tensor is its own, and its base."""
    model = make_base(base, **kwargs)
    return naive.randomize(timm_hne.hierarchize(model, tree_for(base, *nodes))).eval(), model


def images(model, batch_size=2, size=32, **kwargs):
    return torch.randn(batch_size, model.in_chans, size, size, **kwargs)


def path_state(ensemble, member):
    """The weights of one member under the names that they have in the base."""
    state = {}
    for block in ensemble.blocks:
        state |= block[member * block.nodes // ensemble.nodes[-1]].state_dict()
    return state | ensemble.heads[member].state_dict()


@torch.no_grad()
def members_by_hand(ensemble, base, x):
    logits = []
    for member in range(ensemble.ensemble_size):
        network = copy.deepcopy(base).eval()
        network.load_state_dict(path_state(ensemble, member))
        logits.append(network(x))
    return torch.stack(logits, 1)


# Every family


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family(family):
    """The first member is the model, on real numbers where that takes a moment; its parts are the model's."""
    device = 'meta' if family in SLOW else 'cpu'
    model = create(FAMILIES[family], device=device).eval()
    assert FAMILIES[family] in timm.list_models(module=family)
    if device != 'meta':
        for p in model.parameters():  # some start with a head of zeros, whose logits would be equal
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)
    ensemble = timm_hne.hierarchize(model, ensemble_size=2)
    assert ensemble.ensemble_size == 2 and ensemble.nodes[0] == 1
    first = path_state(ensemble, 0)
    assert first.keys() == model.state_dict().keys()
    x = torch.randn(1, *ensemble.pretrained_cfg['input_size'], device=device)
    with torch.inference_mode():
        logits = ensemble.forward_members(x)
        assert logits.shape == (1, 2, 10)
        if device != 'meta':
            assert torch.equal(ensemble(x, num_members=1), model(x))
            assert all(torch.equal(first[name], tensor) for name, tensor in model.state_dict().items())
            assert not torch.equal(logits[:, 0], logits[:, 1])
    assert_parts_of(ensemble, model)


def assert_parts_of(ensemble, model):
    """Each tensor of the model is in one part, and features are as the blocks say; all goes to the meta device."""
    assert len(ensemble.blocks) >= 3 or type(model).__name__ == 'Nest'
    *stages, head = parts = [part[0] for part in (*ensemble.blocks, ensemble.heads)]
    assert set().union(*map(names, parts)) == names(model)
    assert sum(len(names(part)) for part in parts) == len(names(model))

    batch = 3
    x = torch.empty(batch, *ensemble.pretrained_cfg['input_size'], device='meta')
    for stage, block in zip(stages, ensemble.blocks):
        x = stage.to('meta')(x)
        features = (x,) if isinstance(x, torch.Tensor) else x
        assert isinstance(features, tuple)
        assert all(tensor.shape[0] == batch for tensor in features)
        assert features[block.main or 0].shape[block.channel_axis] == block.out_channels
    assert head.to('meta')(x).shape == (batch, 10)
    head.reset_classifier(7)
    assert isinstance(head.get_classifier(), (nn.Module, tuple))
    assert head(x).shape == (batch, 7)
    assert head(x, pre_logits=True).shape == (batch, head.head_hidden_size)


@pytest.mark.parametrize('family', REFUSED)
def test_what_is_refused_is_named_and_unchanged(family):
    name, reason = REFUSED[family]
    model = create(name, device='meta')
    with pytest.raises(ValueError, match=f'{name} .*{reason}'):
        timm_hne.hierarchize(model)
    assert type(model).__module__.startswith('timm.')


# Against the base


@every_base
def test_members_are_copies_of_the_base(base):
    for nodes in ((2, 4), (1, 3), (3, 3)):
        ensemble, model = make_ensemble(base, nodes)
        x = images(model)
        expected = members_by_hand(ensemble, model, x)
        leaves = ensemble.ensemble_size
        assert expected.std(1).min() > 0
        with torch.no_grad():
            torch.testing.assert_close(ensemble.forward_members(x), expected)
            for n in range(1, leaves + 1):
                torch.testing.assert_close(ensemble.forward_members(x, n), expected[:, :n])
                torch.testing.assert_close(ensemble(x, n), expected[:, :n].mean(1))
                part = ensemble.extract(n)
                torch.testing.assert_close(part(x), expected[:, :n].mean(1))
                assert sum(p.numel() for p in part.parameters()) == sum(
                    p.numel() for block in (*ensemble.blocks, ensemble.heads)
                    for node in list(block)[:node_span(block.nodes, 0, n, leaves)[1]] for p in node.parameters())
        for schedule in (range(1, leaves + 1), (1, leaves), (2, 3)):
            for n, logits in zip(schedule, ensemble.anytime(x, tuple(schedule)), strict=True):
                torch.testing.assert_close(logits, expected[:, :n].mean(1))


@small_bases
def test_training_trains_what_copies_would(base):
    ensemble, model = make_ensemble(base)
    x = images(model, 3)
    ensemble.train()
    model.train()
    ensemble.forward_members(x).square().sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())
    gradients = {}
    for member in range(4):
        network = copy.deepcopy(model)
        network.load_state_dict(path_state(ensemble.eval(), member))
        ensemble.train()
        for module, other in ((network, model),):
            assert module.training and other.training
        network(x).square().sum().backward()
        for name, p in network.named_parameters():
            key = (name, next(id(q) for part in (*ensemble.blocks, ensemble.heads) for key, q in part[
                member * part.nodes // 4].named_parameters() if key == name))
            gradients[key] = gradients.get(key, 0) + p.grad
    by_id = {id(p): p.grad for p in ensemble.parameters()}
    for (name, key), gradient in gradients.items():
        torch.testing.assert_close(by_id[key], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


@small_bases
def test_early_exit_is_the_mean_of_the_members_so_far(base):
    ensemble, model = make_ensemble(base)
    x = images(model, 6)
    expected = members_by_hand(ensemble, model, x)
    result = timm_hne.early_exit(ensemble, x, threshold=0.5)
    for i, n in enumerate(result.num_members.tolist()):
        torch.testing.assert_close(result.logits[i], expected[i, :n].mean(0))
    always = timm_hne.early_exit(ensemble, x, threshold=0.)
    assert always.num_members.tolist() == [1] * 6


def test_cost_is_that_of_the_nodes():
    model = make_base('test_resnet')
    one = member_macs(timm_hne.hierarchize(model, (1,) * 5), 32)[1]
    many = member_macs(timm_hne.hierarchize(model, (3,) * 5), 32)
    assert many == {1: one, 2: 2 * one, 3: 3 * one}


# How members start


def snapshot(model):
    return {
        'tensors': {name: tensor.clone() for name, tensor in model.state_dict().items()},
        'ids': [id(p) for p in (*model.parameters(), *model.modules())],
        'modes': [(module.training, type(module)) for module in model.modules()],
        'hooks': [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        'frozen': [p.requires_grad for p in model.parameters()],
        'keys': [sorted(vars(module)) for module in model.modules()],
        'random': torch.get_rng_state(),
    }


def same(a, b):
    return all(
        torch.equal(a[key], b[key]) if key == 'random' else a[key] == b[key] if key != 'tensors' else
        a[key].keys() == b[key].keys() and all(torch.equal(a[key][k], b[key][k]) for k in a[key])
        for key in a)


@pytest.mark.parametrize('init', ['copy', 'perturb', 'fresh'])
@small_bases
def test_init(base, init):
    model = make_base(base).train()
    model.get_classifier().requires_grad_(False)
    before = snapshot(model)
    nodes = tree_for(base, 2, 4)
    ensemble = timm_hne.hierarchize(model, nodes, init=init, seed=3)
    assert same(before, snapshot(model))
    assert all(module.training for module in ensemble.modules())
    assert sum(not p.requires_grad for p in ensemble.parameters()) == 4 * 2
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in path_state(ensemble, 0).items())
    with torch.no_grad():
        x = images(model)
        logits = ensemble.eval().forward_members(x)
        assert torch.equal(logits[:, 0], model.eval()(x))
    distances = [(a - b).abs().max().item() for i, a in enumerate(logits.unbind(1)) for b in logits.unbind(1)[:i]]
    assert (max(distances) == 0) if init == 'copy' else (min(distances) > 0)

    torch.rand(5)  # no matter what the generator of the process has done since
    again = timm_hne.hierarchize(model.train(), nodes, init=init, seed=3).state_dict()
    other = timm_hne.hierarchize(model, nodes, init=init, seed=4).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ensemble.state_dict().items())
    assert (init == 'copy') == all(torch.equal(tensor, other[name]) for name, tensor in again.items())
    for name, buffer in ensemble.named_buffers():
        own = re.sub(r'^(blocks\.\d+|heads)\.\d+\.', '', name)
        assert init == 'fresh' or torch.equal(buffer, path_state(ensemble, 0)[own])


def test_noise_is_relative_to_each_tensor():
    model = make_base('test_resnet')
    ensemble = timm_hne.hierarchize(model, (1, 1, 1, 1, 2), noise=0.25)
    first, second = (ensemble.blocks[4][node].state_dict() for node in (0, 1))
    for name, tensor in first.items():
        if name.endswith('conv1.weight'):
            assert (second[name] - tensor).std() / tensor.square().mean().sqrt() == pytest.approx(0.25, rel=0.1)
    without = timm_hne.hierarchize(model, (1, 1, 1, 1, 2), noise=0).blocks[4][1].state_dict()
    assert without.keys() == first.keys() and all(torch.equal(without[name], first[name]) for name in first)


@pytest.mark.parametrize('nodes', [(1, 1, 2, 4, 8), (1, 1, 1, 4, 4), (3, 3, 3, 3, 3), (1, 2, 6, 6, 12)])
def test_of_the_copies_those_with_an_elder_sibling_get_noise(nodes):
    ensemble = timm_hne.hierarchize(make_base('test_resnet'), nodes)
    for block, count, parents in zip(ensemble.blocks, nodes, (1, *nodes)):
        weights = [torch.cat([w.flatten() for w in node.parameters()]) for node in block]
        has_elder = [bool(node % (count // parents)) for node in range(count)]
        assert [not torch.equal(w, weights[0]) for w in weights] == has_elder
        noisy = [w for w, elder in zip(weights, has_elder) if elder]
        assert all(not torch.equal(a, b) for i, a in enumerate(noisy) for b in noisy[:i])


def test_members_part_where_the_block_that_branches_has_no_weights():
    model = make_base('test_resnet')
    ensemble = timm_hne.hierarchize(model, (1, 2, 2, 4), taps=('act1', 'maxpool', 'layer2', 'layer4')).eval()
    logits = ensemble.forward_members(images(model))
    assert all(not torch.equal(logits[:, i], logits[:, j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize('blocks, size, nodes', [
    (5, 8, (1, 1, 2, 4, 8)), (4, 8, (1, 1, 2, 8)), (2, 8, (1, 8)), (4, 6, (1, 1, 2, 6)), (5, 1, (1,) * 5),
    (3, 5, (1, 1, 5)),
])
def test_default_tree(blocks, size, nodes):
    assert default_nodes(blocks, size) == nodes


# timm's contract


@small_bases
def test_heads(base):
    ensemble, model = make_ensemble(base)
    ensemble.double()
    x = images(model, dtype=torch.float64)
    hidden = ensemble.forward_head(ensemble.forward_features(x), pre_logits=True)
    assert hidden.shape == (2, ensemble.head_hidden_size)
    ensemble.reset_classifier(3)
    assert ensemble(x).shape == (2, 3) and ensemble.forward_members(x, 3).shape == (2, 3, 3)
    assert {p.dtype for p in ensemble.parameters()} == {torch.float64}
    assert not any(module.training for module in ensemble.modules())
    ensemble.reset_classifier(0)
    torch.testing.assert_close(ensemble(x), hidden)
    ensemble.requires_grad_(False).reset_classifier(4)
    assert sum(p.requires_grad for p in ensemble.parameters()) == 8
    assert ensemble(x).dtype == torch.float64 and ensemble(x).shape == (2, 4)
    expected = ensemble(x)
    for args, error in (((-1,), 'num_classes .* -1'), ((3, ''), "global_pool=''"), ((3, 'median'), 'median|pool')):
        with pytest.raises((ValueError, AssertionError), match=error):
            ensemble.reset_classifier(*args)
        torch.testing.assert_close(ensemble(x), expected)
    ensemble.reset_classifier(0, '')
    torch.testing.assert_close(ensemble(x), ensemble.forward_features(x))
    with pytest.raises(ValueError, match='global_pool'):
        ensemble.forward_members(x)
    ensemble.train().reset_classifier(7, 'avg')
    assert all(module.training for module in ensemble.modules()) and ensemble(x).shape == (2, 7)


def test_heads_without_a_pooling_have_no_classifier():
    made, reset = by_name(num_classes=0, global_pool=''), by_name()
    reset.reset_classifier(0, '')
    reset.load_state_dict(made.state_dict())
    made(images(made)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_fresh_members_leave_other_generators_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('seeds the GPUs'))
    state = torch.get_rng_state()
    one, other = (by_name(init='fresh', seed=1).heads[1].state_dict() for _ in range(2))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    by_name(init='copy')
    assert not torch.equal(torch.get_rng_state(), state)  # the base itself is drawn from them


def test_feature_maps_of_channels_last():
    model = by_name('swin_tiny_patch4_window7_224', img_size=224, features_only=True, device='meta')
    found = model(torch.empty(1, 3, 224, 224, device='meta'))
    assert [tuple(y.shape[2:]) for y in found] == [(224 // r,) * 2 for r in model.feature_info.reduction()]
    assert [y.shape[1] for y in found] == model.feature_info.channels()


def test_a_head_that_needs_more_than_one_tensor():
    model = by_name('crossvit_tiny_240', img_size=240, nodes=None, ensemble_size=2, device='meta')
    features = model.forward_features(torch.empty(2, 3, 240, 240, device='meta'))
    with pytest.raises(ValueError, match='forward_members'):
        model.forward_head(features)


@small_bases
def test_features(base):
    ensemble, model = make_ensemble(base)
    ensemble.num_members = 3
    x = images(model)
    with torch.no_grad():
        last, features = ensemble.forward_intermediates(x)
        assert len(features) == len(ensemble.blocks)
        torch.testing.assert_close(last, ensemble.forward_features(x))
        axis = ensemble.blocks[-1].channel_axis
        assert [y.shape[1 if y.dim() == 4 else axis] for y in features] == [
            info['num_chs'] for info in ensemble.feature_info]
        # The features of the first member are those of the base.
        network = copy.deepcopy(model)
        network.load_state_dict(path_state(ensemble, 0))
        expected = network.forward_features(x)
        torch.testing.assert_close(last.narrow(axis, 0, expected.shape[axis]), expected)
        if last.dim() == 4:
            expected, = network.forward_intermediates(x, 1, norm=True, intermediates_only=True)
            torch.testing.assert_close(features[-1][:, :expected.shape[1]], expected)
    wrapped = by_name(base, features_only=True, num_members=3).eval()
    found = wrapped(x)
    assert [y.shape for y in found] == [y.shape for y in features]
    assert wrapped.feature_info.channels() == [y.shape[1 if y.dim() == 4 else axis] for y in found]
    assert len(by_name(base, features_only=True, out_indices=(0, -1), device='meta')(x.to('meta'))) == 2
    with pytest.raises(ValueError, match='feature_cls'):
        by_name(base, features_only=True, feature_cls='hook')


@small_bases
def test_pruned(base):
    ensemble, model = make_ensemble(base)
    x = images(model)
    expected = ensemble.forward_intermediates(x, intermediates_only=True)
    for index, features in enumerate(expected):
        pruned = copy.deepcopy(ensemble)
        assert pruned.prune_intermediate_layers([index]) == [index]
        torch.testing.assert_close(pruned.forward_intermediates(x, 1, intermediates_only=True)[0], features)
        last = x
        for block in ensemble.blocks[:index + 1]:
            last = block(last)
        torch.testing.assert_close(pruned(x), block.merge(last))
        pruned.train()(x).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
        with pytest.raises(ValueError, match='num_classes=3'):
            pruned.reset_classifier(3)


@every_base
def test_by_name_and_its_arguments(base):
    dd = dict(device='meta', dtype=torch.bfloat16)
    ensemble = by_name(base, in_chans=1, num_classes=3, drop_rate=0.3, num_members=2, **dd)
    assert ensemble.in_chans == 1 and ensemble.pretrained_cfg['input_size'][0] == 1
    x = images(ensemble, device='meta', dtype=torch.bfloat16)
    assert ensemble(x).shape == (2, 3) and ensemble(x).dtype == torch.bfloat16
    assert ensemble.forward_members(x).shape == (2, 2, 3)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in ensemble.parameters())
    model = by_name(base, device='meta')
    assert by_name(base, num_classes=0, device='meta')(images(model, device='meta')).dim() == 2
    raw = by_name(base, num_classes=0, global_pool='', device='meta')(images(model, device='meta'))
    assert raw.shape == model.forward_features(images(model, device='meta')).shape
    assert {name for name in model.state_dict() if name.endswith('.weight')} >= {
        f'{name}.weight' for name in (*model.classifier_names, *[model.pretrained_cfg['first_conv']])}


@small_bases
def test_dropout_and_drop_path_act_in_training_only(base):
    for kwargs in (dict(drop_rate=0.5), dict(drop_path_rate=0.5)):
        # Not as initialised: a path that is zero is dropped without a trace.
        ensemble = naive.randomize(by_name(base, **kwargs))
        x = images(ensemble, 8)
        with torch.no_grad():
            assert torch.equal(ensemble.eval()(x), ensemble(x))
            assert not torch.equal(ensemble.train()(x), ensemble(x))


def test_pooling_and_image_size():
    ensemble = by_name('test_resnet', global_pool='max').eval()
    model = timm.create_model('test_resnet', num_classes=5, global_pool='max').eval()
    model.load_state_dict(path_state(ensemble, 0))
    x = images(ensemble, size=64)
    torch.testing.assert_close(ensemble(x, 1), model(x))
    assert ensemble.model_args['global_pool'] == 'max'
    ensemble = by_name('test_vit', img_size=(48, 32))
    assert ensemble.pretrained_cfg['input_size'] == (3, 48, 32)
    assert ensemble(torch.randn(2, 3, 48, 32)).shape == (2, 5)
    assert by_name('test_convnext', img_size=64, device='meta').pretrained_cfg['input_size'] == (3, 64, 64)


@small_bases
def test_memory_formats_dtypes_and_checkpointing(base):
    ensemble, model = make_ensemble(base)
    x = images(model, 3)
    with torch.no_grad():
        expected = ensemble(x)
        last = copy.deepcopy(ensemble).to(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3)
        low = copy.deepcopy(ensemble).bfloat16()(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert (low.float() - expected).abs().max() < 0.15 * expected.abs().max()
    checkpointed = copy.deepcopy(ensemble)
    checkpointed.set_grad_checkpointing()
    for network in (ensemble, checkpointed):
        network.train().double().forward_members(x.double(), 3).square().sum().backward()
    for p, q in zip(ensemble.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@every_base
def test_copies_and_files(base, tmp_path):
    ensemble, model = make_ensemble(base)
    x = images(model)
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(ensemble.state_dict(), path)
    given = dict(num_classes=10, img_size=ensemble.pretrained_cfg['input_size'][1:], **ensemble.model_args)
    rebuilt = timm.create_model(NAME, **given, init='copy')
    rebuilt.load_state_dict(safetensors.torch.load_file(path))
    loaded = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **given)
    others = [
        copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble)), torch.load(file, weights_only=False), rebuilt,
        loaded]
    with torch.no_grad():
        expected = ensemble(x, 3)
        for other in others:
            assert other.nodes == ensemble.nodes and other.taps == ensemble.taps and other.base == ensemble.base
            assert torch.equal(other.eval()(x, 3), expected)
            for p in other.parameters():
                p.zero_()
        assert torch.equal(ensemble(x, 3), expected)


@small_bases
def test_only_what_decays_in_the_base_decays(base):
    model = make_base(base)
    ensemble = timm_hne.hierarchize(model, tree_for(base, 2, 4))
    skipped = getattr(model, 'no_weight_decay', set)()
    assert {re.sub(r'^(blocks\.\d+|heads)\.\d+\.', '', name) for name in ensemble.no_weight_decay()} == {
        name for name, _ in model.named_parameters() if name in skipped}


def test_patterns_of_what_does_not_decay():
    model = make_base('test_vit')
    model.no_weight_decay = lambda: {'pos_*', 'blocks.?.attn.qkv.weight'}
    ensemble = timm_hne.hierarchize(model, tree_for('test_vit', 2, 4))
    found = {re.sub(r'^(blocks\.\d+|heads)\.\d+\.', '', name) for name in ensemble.no_weight_decay()}
    assert 'pos_embed' in found and {name for name in found if 'qkv' in name} == {
        name for name, _ in model.named_parameters() if name.endswith('qkv.weight')}


@every_base
def test_learning_rates_by_depth_and_frozen_weights(base):
    ensemble = timm_hne.hierarchize(make_base(base), tree_for(base, 2, 4))
    groups = group_parameters(ensemble, ensemble.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in ensemble.named_parameters()}
    depths = [groups[name] for name, _ in ensemble.named_parameters()]  # registered in the order of the data
    assert depths == sorted(depths) and len(set(depths)) == len(ensemble.blocks) + any(
        True for _ in ensemble.heads.parameters())
    ensemble.requires_grad_(False)
    ensemble.reset_classifier(4)
    trained = {name for name, p in ensemble.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(ensemble.classifier_names) for name in trained)


@small_bases
def test_features_are_taken_by_getter_only(base):
    with pytest.raises(ValueError, match=r'feature_cls .*list'):
        by_name(base, features_only=True, feature_cls='list')


# Weights


@pytest.fixture
def trained_base(tmp_path, monkeypatch):
    """A base with weights of its own on the disk, of 1000 classes, which timm finds as if they were published."""
    model = naive.randomize(timm.create_model('test_resnet')).eval()
    path = tmp_path / 'base.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    cfg = get_pretrained_cfg('test_resnet')
    cfg = replace(cfg, file=str(path), label_names=[f'thing {i}' for i in range(1000)])
    for name in ('test_resnet', f'test_resnet.{cfg.tag}'):
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)  # timm registers with the model only
    return model, path


@pytest.mark.parametrize('way', ['pretrained', 'file', 'instance'])
def test_the_weights_of_the_base(trained_base, way):
    model, path = trained_base
    kwargs = dict(base='test_resnet', nodes=(1, 1, 1, 2, 4), pretrained=True)
    if way == 'file':
        kwargs['pretrained_cfg_overlay'] = dict(file=str(path))
    ensemble = timm_hne.hierarchize(timm.create_model('test_resnet', pretrained=True), (1, 1, 1, 2, 4)) \
        if way == 'instance' else timm.create_model(NAME, **kwargs)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(ensemble.eval()(x, 1), model(x))
        logits = ensemble.forward_members(x)
    assert all(not torch.equal(logits[:, i], logits[:, j]) for i in range(4) for j in range(i))
    assert (way == 'file') == (not ensemble.pretrained_cfg.get('label_names'))
    assert ensemble.pretrained_cfg['mean'] == model.pretrained_cfg['mean']
    if way != 'instance':
        other = timm.create_model(NAME, num_classes=3, in_chans=1, **kwargs).eval()
        assert other(x[:, :1]).shape == (2, 3)
        assert torch.equal(other.blocks[1][0].state_dict()['0.conv1.weight'] if '0.conv1.weight' in
                           other.blocks[1][0].state_dict() else path_state(other, 0)['layer1.0.conv1.weight'],
                           model.state_dict()['layer1.0.conv1.weight'])


def test_the_classes_of_a_file_are_read_off_it(tmp_path):
    model = make_base('test_resnet', num_classes=7, in_chans=1)
    path = tmp_path / 'base.safetensors'
    safetensors.torch.save_file(model.state_dict(), path)
    ensemble = timm.create_model(
        NAME, base='test_resnet', nodes=(1, 1, 1, 1, 2), pretrained=True, num_classes=7, in_chans=1,
        pretrained_cfg_overlay=dict(file=str(path))).eval()
    x = images(model)
    assert torch.equal(ensemble(x, 1), model(x))


@pytest.mark.parametrize('name', ['hne_resnet50_c8', NAME])
def test_growing(name, tmp_path):
    kwargs = dict(width=2) if name != NAME else dict(base='test_resnet', init='copy')
    small = naive.randomize(timm.create_model(name, nodes=(1, 1, 1, 1, 2), num_classes=5, **kwargs)).eval()
    path = tmp_path / 'small.safetensors'
    safetensors.torch.save_file(small.state_dict(), path)
    x = images(small)
    for nodes in ((1, 1, 2, 2, 4), (2, 2, 2, 2, 2), (1, 1, 1, 3, 6)):
        parent = [m * 2 // nodes[-1] for m in range(nodes[-1])]
        by_timm = timm.create_model(
            name, nodes=nodes, num_classes=5, pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path), num_classes=5), **kwargs).eval()
        by_file = timm.create_model(name, nodes=nodes, num_classes=5, **kwargs).eval()
        RunCheckpoint.read(path).load_into(by_file, noise=0.05)
        with torch.no_grad():
            expected = small.forward_members(x)
            for grown in (by_timm, by_file):
                logits = grown.forward_members(x)
                torch.testing.assert_close(logits[:, 0], expected[:, 0])
                assert all(not torch.equal(logits[:, i], logits[:, j]) for i in range(nodes[-1]) for j in range(i))
            for member, m in enumerate(parent):  # with little noise, near the member that it comes from
                distances = (logits[:, member, None] - expected).norm(dim=-1).sum(0)
                assert distances.argmin() == m or nodes == (2, 2, 2, 2, 2)
    larger = timm.create_model(name, nodes=(1, 1, 1, 1, 3), num_classes=5, **kwargs)
    before = copy.deepcopy(larger.state_dict())
    with pytest.raises(ValueError, match=r'nodes=\(1, 1, 1, 1, 2\).*nodes=\(1, 1, 1, 1, 3\).*multiple'):
        RunCheckpoint.read(path, 'initial_checkpoint').load_into(larger)
    assert all(torch.equal(tensor, before[key]) for key, tensor in larger.state_dict().items())


def test_published_weights_grow():
    published = timm.create_model('hne_resnet50_c8', pretrained=True, nodes=(1, 1, 1, 1, 1)).eval()
    wide = timm.create_model('hne_resnet50_c8', pretrained=True, nodes=(1, 2, 4, 8, 32)).eval()
    x = images(published)
    torch.testing.assert_close(wide(x, 1), published(x))


# Commands, recipes, checkpoints, the Hub


def test_cost_command(capsys):
    main(['cost', NAME, '--base', 'test_resnet', '--nodes', '1', '1', '1', '2', '4', '--img-size', '32'])
    by_options = capsys.readouterr().out
    main(['cost', NAME, '--model-kwargs', 'base=test_resnet', 'nodes=1,1,1,2,4', '--img-size', '32'])
    assert capsys.readouterr().out == by_options
    model = timm_hne.hierarchize(timm.create_model('test_resnet'), (1, 1, 1, 2, 4))
    assert f'{member_macs(model, 32)[4]:,}' in by_options and 'nodes (1, 1, 1, 2, 4)' in by_options
    with pytest.raises(SystemExit, match='2'):
        main(['cost', NAME, '--model-kwargs', 'test_resnet'])
    assert 'NAME=VALUE' in capsys.readouterr().err


def test_the_size_of_the_images_is_that_of_a_base_that_is_built_for_one(capsys):
    main(['cost', NAME, '--base', 'vit_tiny_patch16_224', '--nodes', '1', '1', '1', '2', '--img-size', '64'])
    found = capsys.readouterr().out
    model = timm_hne.hierarchize(timm.create_model('vit_tiny_patch16_224', img_size=64, device='meta'), (1, 1, 1, 2))
    assert f'{member_macs(model, 64)[2]:,}' in found and '64x64' in found
    main(['cost', NAME, '--model-kwargs', 'base=vit_tiny_patch16_224', 'nodes=1,1,1,2', 'img_size=64'])
    assert capsys.readouterr().out == found
    with pytest.raises(SystemExit):
        main(['cost', NAME, '--model-kwargs', 'base=vit_tiny_patch16_224', 'img_size=64', '--img-size', '96'])
    assert '96' in capsys.readouterr().err


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'), size=32)


@pytest.mark.parametrize('base', ['test_vit', 'test_convnext'])
def test_from_a_base_to_the_hub(base, data_dir, tmp_path, hub, monkeypatch, capsys):
    """The base alone, then a tree from its checkpoint, resumed, evaluated, published and loaded again."""
    monkeypatch.setenv('HF_TOKEN', 'hf_alice')
    monkeypatch.chdir(tmp_path)
    model = make_base(base, num_classes=3, img_size=32) if base == 'test_vit' else make_base(base, num_classes=3)
    torch.save(model.state_dict(), 'base.pth')
    options = [
        'train', '--model', NAME, '--data-dir', str(data_dir), '--val-split', 'test', '--in-memory', '--img-size', '32',
        '--batch-size', '8', '--opt', 'adamw', '--lr', '1e-3', '--device', 'cpu', '--no-progress']
    tree = ['--model-kwargs', f'base={base}', 'nodes=1,1,2,4']
    main([*options, *tree, '--initial-checkpoint', 'base.pth', '--epochs', '1', '--lr', '0', '--output-dir', 'still'])
    started, config = load_checkpoint('still/last.pth.tar')
    x = images(model)
    if base == 'test_vit':  # no statistics that change at a learning rate of 0
        torch.testing.assert_close(started.eval()(x, 1), model(x))
    assert config['model_kwargs'] == {'base': base, 'nodes': (1, 1, 2, 4)}

    main([*options, *tree, '--initial-checkpoint', 'base.pth', '--epochs', '2', '--output-dir', 'run'])
    main([*options, *tree, '--initial-checkpoint', 'base.pth', '--epochs', '2', '--output-dir', 'run', '--resume'])
    trained, _ = load_checkpoint('run/last.pth.tar')
    trained.eval()
    assert (trained.base, trained.nodes, trained.num_classes) == (base, (1, 1, 2, 4), 3)
    assert trained.pretrained_cfg['input_size'] == (3, 32, 32)
    capsys.readouterr()
    main(['eval', '--checkpoint', 'run/last.pth.tar', '--data-dir', str(data_dir), '--split', 'test', '--workers', '0',
          '--device', 'cpu', '--output', 'run/evaluation.json'])
    results = json.loads((tmp_path / 'run' / 'evaluation.json').read_text())
    assert results['nodes'] == [1, 1, 2, 4] and results['weights_sha256'] == state_digest(trained.state_dict())

    main(['publish', 'run/last.pth.tar', '--repo-id', 'alice/net', '--dtype', 'float32'])
    for source in ('hf-hub:alice/net', f'local-dir:{tmp_path / "net"}'):
        loaded = timm.create_model(source, pretrained=True).eval()
        assert (loaded.base, loaded.nodes, loaded.taps) == (trained.base, trained.nodes, trained.taps)
        torch.testing.assert_close(loaded(x, 3), trained(x, 3))
    assert 'init' not in json.loads((tmp_path / 'net' / 'config.json').read_text())['model_args']
    image = next(data_dir.glob('test/*/*.png'))
    main(['predict', str(image), '--model', f'local-dir:{tmp_path / "net"}', '--num-members', '2', '--device', 'cpu'])
    assert 'class' in capsys.readouterr().out
    weights = tmp_path / 'net' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\1')
    with pytest.raises(RuntimeError, match='SHA-256'):
        timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


def test_a_checkpoint_whose_images_have_another_size_than_its_model(tmp_path):
    """As timm's `train.py --img-size` makes it of a base that takes images of any size."""
    ensemble = by_name('test_vit', img_size=None).eval()
    args = dict(model=NAME, img_size=32, model_kwargs=dict(base='test_vit', nodes=ensemble.nodes))
    torch.save(dict(arch=NAME, epoch=0, state_dict=ensemble.state_dict(), args=args), tmp_path / 'last.pth.tar')
    loaded, config = load_checkpoint(tmp_path / 'last.pth.tar')
    x = images(ensemble, size=config['img_size'])
    torch.testing.assert_close(loaded.eval()(x), ensemble(x))


def test_an_instance_is_published_with_the_arguments_of_its_base(tmp_path):
    model = make_base('test_convnext', num_classes=4, depths=(1, 1, 1, 1))
    ensemble = naive.randomize(timm_hne.hierarchize(model, (1, 1, 2), taps=('stages.0', 'stages.2', 'stages.3'))).eval()
    ensemble.pretrained_cfg['input_size'] = (3, 32, 32)
    timm_hne.publish(ensemble, 'a/net', results_of(ensemble), dict(epochs=1), folder=tmp_path / 'net', dry_run=True,
                     dtype='float32')
    loaded = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True).eval()
    x = images(model)
    torch.testing.assert_close(loaded(x), ensemble(x))
    assert loaded.taps == ensemble.taps


def saved(model, folder):
    """Return what timm makes of a model that its own function has saved."""
    save_for_hf(model, folder, safe_serialization=True)
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def assert_same_weights(model, other):
    state = model.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize('kwargs', [
    dict(base='vgg11', base_args=dict(mlp_ratio=0.05), ensemble_size=2),
    dict(base='test_resnet', taps=('act1', 'maxpool', 'layer2', 'layer4'), nodes=(1, 1, 2, 4)),
])
def test_blocks_that_have_no_weights(kwargs, tmp_path):
    """As those that end with a pooling; of a VGG the last one does."""
    model = timm.create_model(NAME, num_classes=10, **kwargs)
    assert not all(block.state_dict() for block in model.blocks)
    assert_same_weights(saved(model, tmp_path / 'net'), model)
    file = tmp_path / 'weights.safetensors'
    safetensors.torch.save_file(model.state_dict(), file)
    overlay = dict(file=str(file))
    assert_same_weights(
        timm.create_model(NAME, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay, **kwargs), model)
    unknown = {key: value for key, value in kwargs.items() if key not in ('nodes', 'ensemble_size')}
    found = RunCheckpoint.read(file).create_model(NAME, **unknown)
    assert_same_weights(found, model)
    assert found.nodes[-1] == model.nodes[-1]
    config = json.loads((tmp_path / 'net' / 'config.json').read_text())
    config['model_args']['nodes'] = [*model.nodes[:-1], 2 ** 20]
    (tmp_path / 'net' / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='nodes is'):
        timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


def test_a_cfg_that_timms_scripts_have_changed(tmp_path):
    """As `train.py --pretrained-path` does."""
    base = make_base('test_resnet')
    safetensors.torch.save_file(base.state_dict(), tmp_path / 'base.safetensors')
    kwargs = dict(base='test_resnet', nodes=(1, 1, 1, 2, 4), pretrained=True, num_classes=base.num_classes,
                  pretrained_cfg_overlay=dict(file=str(tmp_path / 'base.safetensors'), num_classes=-1))
    changed = timm.create_model(**resolve_model_input_args(NAME, {}, **kwargs))
    assert changed.pretrained_cfg == timm.create_model(NAME, **kwargs).pretrained_cfg
    small = dict(num_classes=7, input_size=(1, 64, 64), mean=(0.,), std=(1.,))
    model = timm.create_model(NAME, base='test_resnet', pretrained_cfg=small)
    assert (model.num_classes, model.in_chans, model.pretrained_cfg['mean']) == (7, 1, (0.,))
    # What is given holds, also where it is what is registered for all bases; the rest is the base's.
    vit = timm.create_model(NAME, base='test_vit', nodes=(1, 1, 1, 2), pretrained_cfg=dict(num_classes=1000))
    assert vit.num_classes == 1000 and vit.pretrained_cfg['fixed_input_size']
    mean = (0.485, 0.456, 0.406)
    vit = timm.create_model(NAME, base='test_vit', nodes=(1, 1, 1, 2), pretrained_cfg=dict(mean=mean))
    assert vit.pretrained_cfg['mean'] == mean and vit.pretrained_cfg['std'] == (0.5, 0.5, 0.5)


def test_a_base_with_rotary_embeddings_is_pickled():
    base = timm.create_model('vit_tiny_patch16_dinov3_qkvb', depth=2, img_size=32, num_classes=3)
    ensemble = timm_hne.hierarchize(base, (1, 2), taps=('blocks.0', 'blocks.1')).eval()
    x = torch.randn(2, 3, 32, 32)
    twice = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(ensemble))))
    torch.testing.assert_close(twice(x), ensemble(x))


@pytest.mark.parametrize('before, after', [(None, 'max'), ('max', 'avg'), (None, 'catavgmax')])
def test_a_pooling_that_was_changed_is_published(before, after, tmp_path):
    kwargs = {} if before is None else dict(global_pool=before)
    model = by_name('test_resnet', **kwargs)
    model.reset_classifier(10, after)
    naive.randomize(model).eval()
    x = images(model)
    loaded = saved(model, tmp_path / 'net')
    torch.testing.assert_close(loaded(x), model(x))
    name = f'local-dir:{tmp_path / "net"}'
    features = timm.create_model(name, pretrained=True, num_classes=0, global_pool='').eval()
    torch.testing.assert_close(features(x), model.forward_features(x))
    features.reset_classifier(0)
    assert features(x).dim() == 4
    assert timm.create_model(name, pretrained=True, num_classes=7, global_pool='catavgmax')(x).shape == (len(x), 7)


@pytest.mark.parametrize('pool', ['max', ''])
def test_a_pooling_that_was_changed_before_or_removed(pool, tmp_path):
    base = make_base('test_resnet')
    if pool:
        base.reset_classifier(base.num_classes, pool)
    model = naive.randomize(timm_hne.hierarchize(base, (1, 1, 1, 2, 2))).eval()
    if not pool:
        model.reset_classifier(0, '')
    x = images(model)
    assert model(x).dim() == (2 if pool else 4)
    torch.testing.assert_close(saved(model, tmp_path / 'net')(x), model(x))
    model.reset_classifier(3, 'avg')
    torch.testing.assert_close(saved(model, tmp_path / 'other')(x), model(x))


def test_new_classifiers_of_members_differ(tmp_path):
    model = by_name('test_resnet', nodes=(1, 1, 1, 1, 3))
    saved(model, tmp_path / 'net')
    other = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True, num_classes=7)
    first, *rest = (classifier.weight for classifier in other.get_classifier())
    assert len(first) == 7 and len(rest) == 2 and not any(torch.equal(first, weight) for weight in rest)
    assert all(torch.equal(weight.flatten().sort()[0], first.flatten().sort()[0]) for weight in rest)


def test_a_model_that_grew_is_published(tmp_path):
    model = timm.create_model(
        'hne_resnet50_c8', pretrained=True, nodes=(1, 2, 4, 8, 32), grow_noise=0.1, grow_seed=3)
    assert_same_weights(saved(model, tmp_path / 'net'), model)
    other = by_name('test_resnet', grow_noise=0.1, grow_seed=2)
    assert_same_weights(saved(other, tmp_path / 'other'), other)


@pytest.mark.parametrize('base, args', [
    ('tresnet_m', {}), ('naflexvit_base_patch16_parfac_gap', dict(depth=4, embed_dim=48, num_heads=3)),
])
def test_bases_that_take_patches_as_channels(base, args, tmp_path):
    model = timm.create_model(NAME, base=base, base_args=args, nodes=(1, 1, 1, 2), num_classes=10, init='copy')
    assert read_sizes(model.state_dict(), model).get('in_chans', 3) == 3
    assert_same_weights(saved(model, tmp_path / 'net'), model)


def test_attention_costs_the_same_however_it_is_computed():
    costs = [
        member_macs(timm.create_model(NAME, base='test_vit', nodes=(1, 1, 1, 2), exportable=exportable))
        for exportable in (None, True)]
    assert costs[0] == costs[1]


def test_a_checkpoint_in_the_cfg_of_a_base_is_not_copied():
    state = make_base('test_resnet').state_dict()
    base = timm.create_model(
        'test_resnet', pretrained=True, num_classes=10, pretrained_cfg_overlay=dict(state_dict=state, num_classes=10))
    ensemble = timm_hne.hierarchize(base, (1, 1, 1, 2, 8))
    assert base.pretrained_cfg['state_dict']
    assert not any(head.pretrained_cfg['state_dict'] for head in ensemble.heads)


def test_checkpointing_of_the_base_is_left_to_the_ensemble():
    base = timm.create_model('test_convnext', num_classes=3)
    base.set_grad_checkpointing(True)
    ensemble = timm_hne.hierarchize(base, ensemble_size=2).train()
    layers = [module for name, module in ensemble.named_modules() if name.endswith('conv_dw')]
    calls = []
    for layer in layers:
        layer.register_forward_hook(lambda *args: calls.append(1))
    for enable, times in ((False, 1), (True, 2)):
        ensemble.set_grad_checkpointing(enable)
        calls.clear()
        ensemble(torch.randn(2, 3, 64, 64)).sum().backward()
        assert len(calls) == times * len(layers)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A published folder without digests."""
    torch.manual_seed(0)
    ensemble, _ = make_ensemble('test_convnext')
    ensemble.pretrained_cfg['input_size'] = (3, 32, 32)
    folder = tmp_path_factory.mktemp('published') / 'net'
    timm_hne.publish(ensemble, 'a/net', results_of(ensemble), dict(epochs=1), folder=folder, dry_run=True)
    (folder / 'SHA256SUMS').unlink()
    return folder


def test_a_published_config_that_was_not_changed(published):
    assert timm.create_model(f'local-dir:{published}', pretrained=True).base == 'test_convnext'


@pytest.mark.parametrize('changes, message', [
    ({'base_args': {'pretrained': True}}, 'base_args must not hold pretrained'),
    ({'base_args': {'checkpoint_path': '/etc/passwd'}}, 'base_args must not hold checkpoint_path'),
    ({'base_args': {'pretrained_cfg_overlay': {'file': '/etc/passwd'}}}, 'base_args must not hold pretrained_cfg_'),
    ({'base_pretrained': True}, 'base_pretrained'),
    ({'cache_dir': '/tmp/elsewhere'}, 'cache_dir'),
    ({'base': 'hne_resnet50_c8'}, "no hierarchical ensemble already, got 'hne_resnet50_c8'"),
    ({'base': 'hf-hub:alice/other'}, "base must name a timm model.*'hf-hub:alice/other'"),
    ({'base': 'test_vit'}, 'taps=.* do not fit test_vit'),
])
def test_a_published_config_cannot_ask_for_files_or_other_models(changes, message, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / 'net')
    config = json.loads((folder / 'config.json').read_text())
    config['model_args'].update(changes)
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=message):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


# Bad input


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(nodes=(1, 2)), ValueError, r'5 entries for test_resnet.*layer4.*\(1, 2\)'),
    (dict(nodes=(1, 1, 2, 3, 6)), ValueError, 'nodes'),
    (dict(nodes=(1, 1, 1, 1, 2.)), TypeError, 'nodes'),
    (dict(nodes=12345), TypeError, 'nodes'),
    (dict(ensemble_size=0), ValueError, 'ensemble_size'),
    (dict(ensemble_size=2.), TypeError, 'ensemble_size'),
    (dict(ensemble_size=10 ** 9), ValueError, 'ensemble_size .*1024.* 1000000000'),
    (dict(nodes=(1, 1, 1, 1, 16384)), ValueError, 'nodes .*1024.* 16384'),
    (dict(init='random'), ValueError, "init .*copy, perturb, fresh.* 'random'"),
    (dict(init=None), ValueError, 'init'),
    (dict(noise=-1), ValueError, 'noise'),
    (dict(seed=-1), ValueError, 'seed'),
    (dict(taps=9), ValueError, 'taps'),
    (dict(taps=('layer1', 'fc')), ValueError, 'test_resnet.* fc '),
])
def test_bad_arguments_leave_the_model_as_it_is(kwargs, error, message):
    model = make_base('test_resnet')
    before = snapshot(model)
    with pytest.raises(error, match=message):
        timm_hne.hierarchize(model, **kwargs)
    assert same(before, snapshot(model))


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(base='resnet9000'), ValueError, 'resnet9000'),
    (dict(base=3), TypeError, 'base.*3'),
    (dict(base='hne_resnet50_c8'), ValueError, 'base .*hne_resnet50_c8'),
    (dict(base_args=[1]), TypeError, 'base_args'),
    (dict(base_args=dict(num_classes=3)), ValueError, 'num_classes'),
    (dict(base_pretrained=True), TypeError, 'pretrained'),
    (dict(members=3), TypeError, 'members'),
    (dict(num_members=9), ValueError, 'num_members'),
    (dict(global_pool=''), ValueError, 'global_pool'),
])
def test_bad_names_and_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        by_name(**{'device': 'meta', **kwargs})


def test_fresh_nodes_need_a_base_that_timm_can_make():
    model = make_base('test_resnet')
    model.fc = nn.Linear(model.fc.in_features, 10, bias=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'fresh.*test_resnet'):
        timm_hne.hierarchize(model, init='fresh')
    assert same(before, snapshot(model))


def test_growing_from_given_weights_heeds_the_noise():
    base = make_base(num_classes=5)
    x, overlay = images(base), dict(state_dict=base.state_dict(), num_classes=5)

    def spread(**kwargs):
        model = by_name(pretrained=True, pretrained_cfg_overlay=overlay, **{'init': None, **kwargs}).eval()
        return model.forward_members(x).std(dim=1).mean().item()

    assert 1e-6 > spread(noise=0.) < spread(noise=0.1) < spread()
