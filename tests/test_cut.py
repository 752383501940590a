"""Timm models cut into chains: what the parts must be. Every family is cut in `test_from_timm.py`."""
import copy
import io
import pickle
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn as nn

from timm_hne.models.cut import cut_model

# One small model of each of timm's families, by module.
FAMILIES = {
    'beit': 'beit_base_patch16_224',
    'byoanet': 'halonet_h1',
    'byobnet': 'test_byobnet',
    'cait': 'cait_xxs24_224',
    'convit': 'convit_tiny',
    'convmixer': 'convmixer_768_32',
    'convnext': 'test_convnext',
    'cpubone': 'cpubone_nano',
    'crossvit': 'crossvit_tiny_240',
    'csatv2': 'csatv2',
    'cspnet': 'cs3darknet_focus_s',
    'cspnext': 'cspnext_tiny',
    'davit': 'davit_tiny',
    'deepseek_vit': 'deepseek_vit_412m',
    'deit': 'deit_tiny_patch16_224',
    'densenet': 'densenet121',
    'dla': 'dla46x_c',
    'dpn': 'dpn48b',
    'edgenext': 'edgenext_xx_small',
    'efficientformer': 'efficientformer_l1',
    'efficientformer_v2': 'efficientformerv2_s0',
    'efficientnet': 'test_efficientnet',
    'efficientvim': 'efficientvim_m1',
    'efficientvit_mit': 'efficientvit_b0',
    'efficientvit_msra': 'efficientvit_m0',
    'eva': 'vit_tiny_patch16_dinov3_qkvb',
    'fasternet': 'fasternet_t0',
    'fastvit': 'fastvit_t8',
    'focalnet': 'focalnet_tiny_srf',
    'gcvit': 'gcvit_xxtiny',
    'ghostnet': 'ghostnet_050',
    'hardcorenas': 'hardcorenas_b',
    'hgnet': 'hgnetv2_b0',
    'hiera': 'hiera_tiny_224',
    'hieradet_sam2': 'sam2_hiera_tiny',
    'hrnet': 'hrnet_w18_small',
    'iformer': 'iformer_t',
    'inception_next': 'inception_next_atto',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'lcnetv2': 'lcnetv2_small',
    'levit': 'levit_128s',
    'lowformer': 'lowformer_b0',
    'mambaout': 'test_mambaout',
    'maxxvit': 'test_coatnet',
    'metaformer': 'poolformerv2_s12',
    'mlp_mixer': 'gmlp_ti16_224',
    'mobilenetv3': 'mobilenetv3_small_050',
    'mobilenetv5': 'mobilenetv5_base',
    'mobilevit': 'mobilevit_xxs',
    'mvitv2': 'mvitv2_tiny',
    'naflexvit': 'naflexvit_base_patch16_parfac_gap',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_tiny',
    'nextvit': 'nextvit_small',
    'nfnet': 'test_nfnet',
    'pit': 'pit_ti_224',
    'pnasnet': 'pnasnet5large',
    'pvt_v2': 'pvt_v2_b0',
    'qwen3_vit': 'qwen3_vit_88m',
    'rdnet': 'rdnet_tiny',
    'regnet': 'regnetx_002',
    'repghost': 'repghostnet_050',
    'repvit': 'repvit_m1',
    'res2net': 'res2next50',
    'resnest': 'resnest14d',
    'resnet': 'test_resnet',
    'resnetv2': 'resnetv2_18',
    'rexnet': 'rexnet_100',
    'selecsls': 'selecsls42',
    'senet': 'legacy_seresnet18',
    'sequencer': 'sequencer2d_s',
    'shvit': 'shvit_s1',
    'sknet': 'skresnet18',
    'starnet': 'starnet_s050',
    'swiftformer': 'swiftformer_xs',
    'swin_transformer': 'swin_tiny_patch4_window7_224',
    'swin_transformer_v2': 'swinv2_tiny_window8_256',
    'swin_transformer_v2_cr': 'swinv2_cr_tiny_224',
    'tiny_vit': 'tiny_vit_5m_224',
    'tnt': 'tnt_s_legacy_patch16_224',
    'tresnet': 'tresnet_m',
    'twins': 'twins_svt_small',
    'vgg': 'vgg11',
    'visformer': 'visformer_tiny',
    'vision_transformer': 'test_vit',
    'vision_transformer_hybrid': 'vit_tiny_r_s16_p8_224',
    'vision_transformer_relpos': 'test_vit_relpos',
    'vision_transformer_sam': 'samvit_base_patch16_224',
    'vitamin': 'vitamin_small_224',
    'volo': 'volo_d1_224',
    'vovnet': 'ese_vovnet19b_slim_dw',
    'xception': 'legacy_xception',
    'xception_aligned': 'xception41p',
    'xcit': 'xcit_nano_12_p8_224',
}
# A model of each family that cannot be cut, and what the error says.
REFUSED = {
    'coat': ('coat_tiny', 'both sides of a cut need cpe1'),
    'gemma4_vit': ('gemma4_vit_167m', 'cannot be traced'),
}
# Fewer layers, as many as quarters.
ISOTROPIC = (
    'beit_base_patch16_224', 'cait_xxs24_224', 'convit_tiny', 'deit_tiny_patch16_224',
    'tnt_s_legacy_patch16_224', 'vit_tiny_patch16_dinov3_qkvb', 'vit_tiny_r_s16_p8_224', 'samvit_base_patch16_224',
    'xcit_nano_12_p8_224', 'deepseek_vit_412m', 'qwen3_vit_88m', 'naflexvit_base_patch16_parfac_gap',
)
ARGUMENTS = {
    **{name: dict(depth=4) for name in ISOTROPIC},
    'sequencer2d_s': dict(layers=(1, 1, 1, 1)),
    'twins_svt_small': dict(depths=(1, 1, 1, 1)),
    'densenet121': dict(block_config=(2, 2, 2, 2)),
    'efficientvit_m0': dict(depth=(1, 1, 1)),
}
# Small models that run in a moment, of which each has something of its own: operations in place, a tuple across a cut,
# windows, a position embedding and sizes that all stages share, features in a dict or a list.
EXECUTED = (
    'test_resnet', 'test_efficientnet', 'test_vit', 'test_convnext', 'test_mambaout', 'crossvit_tiny_240',
    'efficientvim_m1', 'pit_ti_224', 'tnt_s_legacy_patch16_224', 'vit_tiny_patch16_dinov3_qkvb', 'xcit_nano_12_p8_224',
    'twins_svt_small', 'hrnet_w18_small',
)


def create(name, **kwargs):
    return timm.create_model(name, **{'num_classes': 10, **ARGUMENTS.get(name, {}), **kwargs})


def chain(cut, x):
    for part in (*cut.blocks, cut.head):
        x = part(x)
    return x


def names(module):
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def test_every_family_of_timm_is_listed():
    ours = {module for module in timm.list_modules() if module.startswith('hne_')}
    assert FAMILIES.keys() | REFUSED.keys() == set(timm.list_modules()) - ours
    assert len(FAMILIES) >= 85


@pytest.mark.parametrize('family', REFUSED)
def test_refuses_by_name_and_reason(family):
    name, reason = REFUSED[family]
    with pytest.raises(ValueError, match=f'{name} .*{reason}'):
        cut_model(create(name, device='meta'))


@pytest.mark.parametrize('name', EXECUTED)
def test_parts_compute_what_the_model_does(name):
    torch.manual_seed(0)
    drops = {} if name == 'hrnet_w18_small' else dict(drop_path_rate=.2)
    model = create(name, drop_rate=.2, **drops)
    before = copy.deepcopy(model.state_dict())
    cut = cut_model(model)
    parts = nn.ModuleList((*cut.blocks, cut.head))
    assert model.training and all(part.training for part in parts)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in parts.parameters()}

    model.eval(), parts.eval()
    images = torch.randn(3, *cut.input_size)
    with torch.no_grad():
        for x in (images, images[:1]):
            assert torch.equal(chain(cut, x), model(x))
        for block in cut.blocks:  # neighbours share their input
            assert all(torch.equal(a, b) for a, b in zip(*(block(x) for _ in range(2))))
            x = block(x)
        x = images
        for part in copy.deepcopy(parts):
            x = part(x)
        assert torch.equal(x, model(images))
    model.train(), parts.train()
    x = torch.randn(2, *cut.input_size)
    outputs = []
    for network in (model, lambda x: chain(cut, x)):
        torch.manual_seed(1)
        outputs.append(network(x))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    state, gradients = {}, {}
    for part in parts:
        state |= part.state_dict()
        gradients |= {name: parameter.grad for name, parameter in part.named_parameters()}
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        assert gradients[name] is None if expected is None else torch.allclose(gradients[name], expected, atol=1e-6)


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_mambaout', 'test_efficientnet'])
def test_parts_take_other_image_sizes(name):
    model = create(name).eval()
    cut = cut_model(model)
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(chain(cut, x), model(x))


def test_sizes_that_cross_a_cut_follow_the_images():
    model = create('xcit_nano_12_p8_224').eval()
    cut = cut_model(model)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert isinstance(cut.blocks[0](x), tuple)
        assert torch.equal(chain(cut, x), model(x))


def test_attention_drops_in_training_only():
    model = create('test_vit', attn_drop_rate=.5)
    cut = cut_model(model)
    x = torch.randn(2, *cut.input_size)
    assert not torch.equal(chain(cut, x), chain(cut, x))
    for part in (*cut.blocks, cut.head):
        part.eval()
    assert torch.equal(chain(cut, x), chain(cut, x))


class Written(nn.Module):
    """Adds to its input in place."""

    def forward(self, x):
        return x.add_(1)


def test_no_block_writes_to_its_input():
    model = create('test_resnet').eval()
    for stage in (model.layer2, model.layer4):
        stage.insert(0, Written())
    cut = cut_model(model)
    x = torch.randn(2, *cut.input_size)
    with torch.no_grad():
        for block in cut.blocks:
            before = x.clone()
            y = block(x)
            assert torch.equal(x, before)
            x = y


def test_flags_around_the_stages_follow_the_mode():
    class Dropping(type(create('test_resnet', device='meta'))):
        def forward_features(self, x):
            return nn.functional.dropout(super().forward_features(x), .5, self.training)

    model = create('test_resnet')
    model.__class__ = Dropping
    cut = cut_model(model)
    x = torch.randn(2, *cut.input_size)
    for part in (*cut.blocks, cut.head):
        part.eval()
    assert torch.equal(chain(cut, x), chain(cut, x))
    cut.blocks[-1].training = True
    assert not torch.equal(chain(cut, x), chain(cut, x))


@pytest.mark.parametrize('name', ['test_resnet', 'tnt_s_legacy_patch16_224'])
def test_parts_can_be_pickled(name):
    cut = cut_model(create(name).eval())
    parts = pickle.loads(pickle.dumps((*cut.blocks, cut.head)))
    x = torch.randn(1, *cut.input_size)
    with torch.no_grad():
        y = x
        for part in parts:
            y = part(y)
        assert torch.equal(y, chain(cut, x))


@pytest.mark.parametrize('name', ['test_vit', 'xcit_nano_12_p8_224'])
def test_parts_are_exported(name):
    cut = cut_model(create(name).eval())
    model = nn.Sequential(*cut.blocks, cut.head)
    x = torch.randn(2, *cut.input_size)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    x = torch.randn(3, *cut.input_size)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('name', ['xcit_nano_12_p8_224'])
def test_parts_go_to_onnx(name):
    onnxruntime = pytest.importorskip('onnxruntime')
    cut = cut_model(create(name).eval())
    model = nn.Sequential(*cut.blocks, cut.head).eval()
    x = torch.randn(2, *cut.input_size)
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for batch_size in (1, 3):
        x = torch.randn(batch_size, *cut.input_size)
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_blocks_are_the_stages():
    cut = cut_model(create('test_resnet'))
    assert cut.taps == ('act1', 'layer1', 'layer2', 'layer3', 'layer4')
    assert names(cut.blocks[0]) >= {'conv1.0.weight', 'bn1.running_mean'}
    assert {name.partition('.')[0] for name in names(cut.blocks[2])} == {'layer2'}
    assert names(cut.head) == {'fc.weight', 'fc.bias'}
    assert cut.head.get_classifier() is cut.head.fc
    assert (cut.name, cut.reductions) == ('test_resnet', (2, 4, 8, 16, 32))


@pytest.mark.parametrize('taps, expected', [
    (2, ('blocks.2', 'blocks.5')),
    (('blocks.0', 'blocks.4', 'blocks.5'), ('blocks.0', 'blocks.4', 'blocks.5')),
    (('blocks.1.norm1', 'blocks.5'), ('blocks.1.norm1', 'blocks.5')),
])
def test_taps(taps, expected):
    model = create('test_vit').eval()
    cut = cut_model(model, taps)
    assert cut.taps == expected
    x = torch.randn(2, *cut.input_size)
    with torch.no_grad():
        assert torch.equal(chain(cut, x), model(x))


def test_dtype_image_size_and_channels():
    model = create('test_vit', img_size=96, in_chans=1).to(torch.bfloat16)
    cut = cut_model(model)
    assert cut.input_size == (1, 96, 96)
    assert chain(cut, torch.randn(2, 1, 96, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_frozen_parameters_and_modes_stay():
    model = create('test_resnet')
    model.layer1.requires_grad_(False)
    model.bn1.eval()
    cut = cut_model(model)
    assert not any(p.requires_grad for p in cut.blocks[1].parameters())
    assert all(p.requires_grad for p in cut.blocks[2].parameters())
    assert not cut.blocks[0].bn1.training and cut.blocks[0].training
    assert model.training and not model.bn1.training


class TwoInputs(nn.Module):
    pretrained_cfg: ClassVar = {'architecture': 'two_inputs'}
    num_classes = 2
    get_classifier = reset_classifier = forward_head = nn.Module.forward

    def forward_features(self, x, mask):
        return x

    forward = forward_features


class Broken(type(create('test_resnet', device='meta'))):
    def forward(self, x):
        return super().forward(x) + 1


class Branching(type(create('test_resnet', device='meta'))):
    def forward_features(self, x):
        return super().forward_features(x if x.mean() > 0 else -x)


def changed(model_class):
    model = create('test_resnet')
    model.__class__ = model_class
    return model


@pytest.mark.parametrize('make, taps, error, message', [
    (lambda: 'resnet18', None, TypeError, 'resnet18'),
    (lambda: nn.Linear(1, 1), None, TypeError, 'Linear'),
    (lambda: create('test_resnet', features_only=True), None, TypeError, 'FeatureListNet'),
    (lambda: create('hne_resnet50_c8'), None, ValueError, 'hne_resnet50_c8'),
    (lambda: create('test_resnet', num_classes=0), None, ValueError, 'test_resnet with num_classes=0'),
    (TwoInputs, None, ValueError, 'two_inputs takes x, mask'),
    (lambda: create('test_resnet'), ('layer1', 'layer9'), ValueError, "layer9.*test_resnet|test_resnet.*layer9"),
    (lambda: create('test_resnet'), ('layer1', 'layer1'), ValueError, 'layer1'),
    (lambda: create('test_resnet'), ('layer2', 'layer1'), ValueError, 'layer1 .*before'),
    (lambda: create('test_resnet'), ('layer1', 'fc'), ValueError, r'\bfc '),
    (lambda: create('test_resnet'), ('layer1',), ValueError, 'at least 2 blocks.*layer1.*layer4'),
    (lambda: create('test_resnet'), 'layer1', TypeError, "'layer1'"),
    (lambda: create('test_resnet'), (1, 2), TypeError, r'\(1, 2\)'),
    (lambda: create('test_resnet'), 2.5, TypeError, '2.5'),
    (lambda: create('test_resnet'), 1, ValueError, 'taps .*2 .*5 .*test_resnet.* 1'),
    (lambda: create('test_resnet'), 6, ValueError, 'taps .*2 .*5 .*6'),
    (lambda: create('test_resnet'), True, ValueError, 'taps .*True'),
    (lambda: changed(Broken), None, RuntimeError, 'test_resnet.* do not compute'),
    (lambda: changed(Branching), None, ValueError, 'test_resnet .*cannot be traced'),
])
def test_bad_input(make, taps, error, message):
    with pytest.raises(error, match=message):
        cut_model(make(), taps)
