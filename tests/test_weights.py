"""The packaged weights are those that were measured, and need no network.

    python tests/test_weights.py         # stores the logits of new weights, for review and commit
    CIFAR10_DIR=... CIFAR100_DIR=... TINY_IMAGENET_DIR=... python -m pytest tests/test_weights.py    # measures again

CIFAR10_DIR and CIFAR100_DIR hold test/CLASS images, TINY_IMAGENET_DIR is what train_scripts/tiny_imagenet.py makes.
"""
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, resolve_model_input_args, save_for_hf

import timm_hne  # noqa: F401, registers the models
from timm_hne.__main__ import main
from timm_hne.files import write_text
from timm_hne.pretrained import PACKAGED, digest, read_digests

NAMES = timm.list_models('hne_*', pretrained=True)
LOGITS = Path(__file__).parent / 'logits'
CARDS = Path(__file__).parents[1] / 'hub_cards'
DATA = {
    'hcd_cifar10': ('CIFAR10_DIR', 'test'),
    'hcd_cifar100': ('CIFAR100_DIR', 'test'),
    'hcd_tiny_imagenet': ('TINY_IMAGENET_DIR', 'validation'),
}
SIZES = {  # at most, in bytes
    'hne_resnet50_c16.hcd_cifar10': 12e6,
    'hne_resnet50_c8.hcd_cifar10': 3e6,
    'hne_resnet50_c8.hcd_cifar100': 3.5e6,
    'hne_mobilenetv2_075_e8.hcd_tiny_imagenet': 32e6,
}


def generated_images(model):
    """Four images that are the same on every machine: waves of growing frequency."""
    channels, height, width = model.pretrained_cfg['input_size']
    sizes = (torch.arange(size, dtype=torch.float64) for size in (channels, height, width))
    c, y, x = torch.meshgrid(*sizes, indexing='ij')
    return torch.stack([torch.sin((k * y + x + c) / 4) * torch.cos(x * k / 9 - c) for k in range(1, 5)]).float()


@torch.no_grad()
def logits_of(name):
    """Return the logits (n, image, class) of the first n = 1..N members."""
    model = timm.create_model(name, pretrained=True).eval()
    images = generated_images(model)
    return torch.stack([model(images, num_members=n) for n in range(1, model.ensemble_size + 1)])


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError('the network was used')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


def test_everything_that_is_packaged_has_a_tag_and_a_card():
    files = {path.stem for path in PACKAGED.glob('*.safetensors')}
    assert files == set(NAMES) == {path.parent.name for path in CARDS.glob('*.*/README.md')}
    assert files == SIZES.keys()
    recorded = read_digests(PACKAGED / 'SHA256SUMS')
    assert recorded == {path.name: digest(path.read_bytes()) for path in PACKAGED.glob('*.safetensors')}


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_that_were_stored(name, no_network):
    """Looser than rounding in float32 differs between machines, tighter than any change of a weight shows."""
    stored = torch.tensor(json.loads((LOGITS / f'{name}.json').read_text()))
    torch.testing.assert_close(logits_of(name), stored, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', NAMES)
def test_a_model_has_the_classes_of_its_weights(name, no_network):
    model = timm.create_model(name, pretrained=True)
    assert len(set(model.pretrained_cfg['label_names'])) == model.num_classes
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize('architecture, tag', [
    ('hne_resnet50_c8', 'hcd_cifar10'), ('hne_resnet50_c16', 'hcd_cifar10'),
    ('hne_mobilenetv2_075_e8', 'hcd_tiny_imagenet'),
])
def test_the_architecture_alone_means_its_first_tag(architecture, tag, no_network):
    model = timm.create_model(architecture, pretrained=True)
    assert model.pretrained_cfg['tag'] == tag == get_pretrained_cfg(architecture).tag


@pytest.mark.parametrize('name', NAMES)
def test_weights_adapt_as_timms_do(name, no_network):
    model = timm.create_model(name, pretrained=True).eval()
    images = generated_images(model)
    with torch.no_grad():
        other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
        assert other(images[:, :1]).shape == (4, 3)
        overlay = dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,))
        grey = timm.create_model(name, pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
        torch.testing.assert_close(grey(images[:, :1]), timm.create_model(
            name, pretrained=True, in_chans=1).eval()(images[:, :1]))
        assert grey.pretrained_cfg['input_size'] == (1, 28, 28)
        part = timm.create_model(name, pretrained=True, nodes=model.extract(4).nodes).eval()
        torch.testing.assert_close(part(images), model(images, num_members=4))


@pytest.mark.parametrize('name', NAMES)
def test_other_weights_have_no_names_of_these_classes(name, tmp_path, no_network):
    path = tmp_path / 'other.safetensors'
    shutil.copy(PACKAGED / f'{name}.safetensors', path)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert not model.pretrained_cfg.get('label_names')
    path.write_bytes(b'')
    with pytest.raises(ValueError, match=r'other\.safetensors'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('name', NAMES)
def test_random_weights_know_no_names(name):
    """They would be written as what a user's own weights see, by timm's inference.py."""
    assert timm.get_pretrained_cfg(name).label_names
    assert not timm.create_model(name).pretrained_cfg.get('label_names')


def test_names_of_classes_in_what_timms_scripts_pass_on(tmp_path, no_network):
    """They merge an overlay into the whole cfg."""
    name, path = 'hne_resnet50_c8', tmp_path / 'other.safetensors'
    shutil.copy(PACKAGED / f'{name}.hcd_cifar10.safetensors', path)

    def names(pretrained, overlay=None):
        kwargs = resolve_model_input_args(name, {}, pretrained=pretrained, pretrained_cfg_overlay=overlay)
        return timm.create_model(**kwargs).pretrained_cfg.get('label_names')

    assert names(True) == get_pretrained_cfg(name).label_names
    assert names(True, dict(mean=(0.5,) * 3)) == get_pretrained_cfg(name).label_names
    assert names(True, dict(file=str(path), num_classes=-1)) is None
    assert names(False) is None
    assert names(False, dict(label_names=['a', 'b'])) == ['a', 'b']


def test_other_weights_of_other_classes(tmp_path, no_network):
    name, path = 'hne_resnet50_c8', tmp_path / 'five.safetensors'
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, nodes=(1, 1, 1, 1, 2))
    safetensors.torch.save_file(model.state_dict(), path)
    overlay = dict(file=str(path))
    with pytest.raises(ValueError, match=r'num_classes must be given, the weights have 5 classes .* 10'):
        timm.create_model(name, pretrained=True, nodes=model.nodes, pretrained_cfg_overlay=overlay)
    loaded = timm.create_model(name, pretrained=True, nodes=model.nodes, pretrained_cfg_overlay=overlay, num_classes=5)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    stated = dict(overlay, num_classes=5)
    loaded = timm.create_model(name, pretrained=True, nodes=model.nodes, pretrained_cfg_overlay=stated)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    features = timm.create_model(
        name, pretrained=True, nodes=model.nodes, pretrained_cfg_overlay=overlay, features_only=True)
    assert len(features(torch.randn(1, 3, 32, 32))) == 5
    with pytest.raises(ValueError, match=r'url is not read.*https://host/x\.safetensors'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(url='https://host/x.safetensors'))
    # As train.py's --pretrained-path has it with a model of a folder or the Hub.
    save_for_hf(timm.create_model(name, nodes=model.nodes), tmp_path / 'net', safe_serialization=True)
    kwargs = resolve_model_input_args(
        f'local-dir:{tmp_path / "net"}', {}, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=-1), num_classes=7)
    loaded = timm.create_model(**kwargs)
    assert torch.equal(loaded.blocks[0][0].conv.weight, model.blocks[0][0].conv.weight) and loaded.num_classes == 7


@pytest.mark.parametrize('name', NAMES)
def test_weights_are_small(name):
    assert (PACKAGED / f'{name}.safetensors').stat().st_size < SIZES[name]


@pytest.mark.parametrize('name', NAMES)
def test_stated_accuracies(name, tmp_path, no_network):
    variable, split = DATA[name.partition('.')[2]]
    if not os.environ.get(variable):
        pytest.skip(f'{variable} does not name a folder with the images')
    folder, output = os.environ[variable], tmp_path / 'again.json'
    main(['eval', name, '--data-dir', folder, '--split', split, '--workers', '0', '--output', str(output)])
    again = json.loads(output.read_text())
    stated = json.loads((CARDS / name / 'evaluation.json').read_text())
    assert again['num_images'] == stated['num_images'] == 10_000
    for row, stated_row in zip(again['members'], stated['members'], strict=True):
        assert row['top1'] == pytest.approx(stated_row['top1'], abs=0.1)
        assert row['macs'] == stated_row['macs']


if __name__ == '__main__':
    for name in NAMES:
        rounded = [[[round(x, 4) for x in image] for image in n] for n in logits_of(name).tolist()]
        rows = ',\n'.join(json.dumps(n) for n in rounded)
        write_text(LOGITS / f'{name}.json', f'[\n{rows}\n]\n')
