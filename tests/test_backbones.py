"""Features for other libraries: what docs/backbones.md says of them is so, and its code runs."""
import re
from pathlib import Path

import pytest
import timm
import torch

PAGE = (Path(__file__).parent.parent / 'docs' / 'backbones.md').read_text(encoding='utf-8')
RESNET, MOBILENET = 'hne_resnet50_c8', 'hne_mobilenetv2_075_e4'


def run(section):
    """Run the code of a section of the page, and return its names."""
    text = PAGE.split(f'\n## {section}\n')[1].split('\n## ')[0]
    names = {}
    for code in re.findall(r'```python\n(.*?)```', text, re.S):
        exec(code, names)
    return names


def images(size=32, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_code_on_features():
    names = run('What the features are')
    model = names['model'].eval()
    assert [features.shape[1] for features in model(images())] == model.feature_info.channels()
    assert names['pooled'](images()).shape == (2, names['pooled'].head_hidden_size)


@pytest.mark.parametrize(('name', 'reductions'), [(RESNET, [1, 1, 2, 4, 4]), (MOBILENET, [4, 8, 16, 32])])
@torch.inference_mode()
def test_one_members_features(name, reductions):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    x = images()
    last, maps = model.forward_intermediates(x)
    info = timm.create_model(name, features_only=True).feature_info
    assert info.reduction() == reductions
    members = model.ensemble_size
    assert [features.shape[1] for features in maps] == info.channels()
    _, first = model.forward_intermediates(x, num_members=1)
    for b, nodes in enumerate(model.nodes):
        channels = maps[b].shape[1] // nodes
        torch.testing.assert_close(maps[b][:, :channels], first[b], rtol=1e-4, atol=1e-5)
    # The pooled features of any member are made of its own map.
    pooled = model.forward_members(x)
    assert pooled.shape == (2, members, model.head_hidden_size // members)
    torch.testing.assert_close(pooled.flatten(1), model(x))
    member = members - 1
    changed = last.clone()
    changed[:, member * channels:(member + 1) * channels] += 1
    moved = (model.forward_head(changed).view_as(pooled) != pooled).any(dim=2)
    assert moved.tolist() == [[False] * member + [True]] * 2
    # The first member alone, by each of its ways.
    for one in (model.extract(num_members=1), timm.create_model(name, num_classes=0, num_members=1).eval()):
        one.load_state_dict(model.state_dict(), strict=False) if one.ensemble_size == members else None
        torch.testing.assert_close(one(x), pooled[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['tu-hne_mobilenetv2_075_e4', 'tu-hne_mobilenetv2_075_e8'])
def test_unet(name):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet(name, encoder_weights=None, classes=2, num_members=1)
    output = model(images(64))
    assert output.shape == (2, 2, 64, 64)
    output.mean().backward()


def test_code_on_segmentation():
    smp = pytest.importorskip('segmentation_models_pytorch')
    try:
        unet = run('segmentation_models_pytorch')['unet']
        assert unet(images(48)).shape == (2, 2, 48, 48)
        with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
            smp.Unet(f'tu-{RESNET}', encoder_weights=None)
    finally:
        smp.encoders.encoders.pop(RESNET, None)


def test_code_on_detection():
    pytest.importorskip('torchvision.models.detection')
    detector = run("torchvision's detectors")['detector']
    targets = [dict(boxes=torch.tensor([[4., 4., 40., 40.]]), labels=torch.tensor([1]))] * 2
    losses = detector([*images(96)], targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.backbone.fpn.parameters())
    assert {*detector.eval()([*images(96)])[0]} == {'boxes', 'scores', 'labels'}
