"""Loading pretrained weights from the package, from folders and from a Hub that fails in every way it can."""
import copy
import hashlib
import inspect
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import timm_hne.pretrained
from timm_hne.hub import write_folder
from timm_hne.models import create_ensemble
from timm_hne.pretrained import DigestError, packaged, state_digest

NODES = (1, 1, 2, 4, 8)
NAME = 'hf-hub:alice/net'

pytestmark = pytest.mark.usefixtures('shallow_module')


def trained_model(name='hne_resnet50_c8', **kwargs):
    """A model whose every tensor differs from its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 10)
    return model.eval()


def results_of(model):
    rows = [
        dict(num_members=n, top1=80.0 + n, top5=99.0, macs=10 ** 7 * n, logit_std=0.1, nll=0.5, brier=0.2, ece=0.03)
        for n in range(1, model.ensemble_size + 1)
    ]
    return dict(
        model=model.pretrained_cfg['architecture'], nodes=list(model.nodes), data='cifar10', split='test',
        num_images=10000, objective='independent', epochs=2, members=rows,
        weights_sha256=state_digest(model.state_dict()))


@pytest.fixture(scope='module')
def model():
    return trained_model(nodes=NODES)


@pytest.fixture(scope='module')
def files(model, tmp_path_factory):
    """Name and bytes of every file of a published model."""
    folder = tmp_path_factory.mktemp('published') / 'net'
    names = write_folder(model, folder, NAME, results_of(model), dict(epochs=1))
    return {name: (folder / name).read_bytes() for name in names}


def put(hub, files, repo_id='alice/net', **changes):
    """Put files into a repository, some of them changed and the digests corrected."""
    files = {**files, **{name.replace('_', '.'): data for name, data in changes.items()}}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != 'SHA256SUMS'}
    files['SHA256SUMS'] = ''.join(f'{digest}  {name}\n' for name, digest in digests.items()).encode()
    return hub.add(repo_id, files)


@pytest.fixture
def published(hub, files):
    put(hub, files)
    return hub


def load(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def assert_same(model, expected):
    expected = expected.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name].half().to(tensor.dtype)), name


def assert_cache_is_sound(files):
    """Every file of the cache is complete and right; nothing temporary is left.

    A wrong SHA256SUMS can lead to a refusal, never to wrong weights.
    """
    digests = {hashlib.sha256(data).hexdigest() for data in files.values()}
    for path in Path(constants.HF_HUB_CACHE).rglob('*'):
        assert not path.name.endswith('.incomplete')
        if path.parent.name == 'blobs' and len(path.read_bytes()) != len(files['SHA256SUMS']):
            assert hashlib.sha256(path.read_bytes()).hexdigest() in digests


def safetensors_bytes(state_dict):
    return safetensors.torch.save(dict(state_dict))


# The right weights


def test_from_the_hub(published, model, tmp_path):
    loaded = load()
    assert_same(loaded, model)
    assert loaded.nodes == NODES
    assert loaded.pretrained_cfg['hf_hub_id'] == 'alice/net'
    assert 'state_dict' not in loaded.pretrained_cfg
    requests = len(published.log)
    assert_same(load(), model)
    assert not any('GET' in line for line in published.log[requests:])
    assert_same(load(cache_dir=tmp_path / 'elsewhere'), model)
    assert list((tmp_path / 'elsewhere').rglob('model.safetensors'))


def test_from_a_revision(hub, files, model):
    old = put(hub, files)
    put(hub, files, model_safetensors=safetensors_bytes(trained_model(nodes=NODES, in_chans=1).state_dict()))
    assert_same(load(f'{NAME}@{old}'), model)
    with pytest.raises(ValueError, match=r'config\.json.*blocks\.0\.0\.conv\.weight.*\(8, 1, 3, 3\).*\(8, 3, 3, 3\)'):
        load()


def test_from_a_folder(files, model, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert_same(load(f'local-dir:{tmp_path}'), model)
    (tmp_path / 'model.safetensors').write_bytes(files['model.safetensors'][:-1] + b'x')
    with pytest.raises(DigestError, match=r'model\.safetensors .*\w{64}.*\w{64}'):
        load(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('mark', ['  ', ' *', '  ./', ' *./'])
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_every_file_of_a_folder_is_checked(files, model, tmp_path, mark, name):
    files = {**files, 'SHA256SUMS': files['SHA256SUMS'].replace(b'  ', mark.encode())}
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    assert_same(load(f'local-dir:{tmp_path}'), model)
    changed = files[name].replace(b'0.4914', b'0.4915') if name == 'config.json' else files[name][:-1] + b'x'
    (tmp_path / name).write_bytes(changed)
    with pytest.raises(DigestError, match=rf'{name} .*\w{{64}}'):
        load(f'local-dir:{tmp_path}')

    (tmp_path / name).write_bytes(files[name])
    lines = files['SHA256SUMS'].decode().splitlines()
    (tmp_path / 'SHA256SUMS').write_text('\n'.join(line for line in lines if name not in line))
    with pytest.raises(DigestError, match=rf'{name} .*none'):
        load(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_stored_in_any_precision(hub, files, model, dtype):
    weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    put(hub, files, model_safetensors=safetensors_bytes(weights))
    for name, tensor in load().state_dict().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    assert next(load(dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize('kwargs', [dict(num_classes=7), dict(in_chans=1), dict(in_chans=5), dict(num_classes=0)])
def test_other_classes_and_channels_as_timm_does(published, files, model, kwargs, tmp_path):
    loaded = load(**kwargs)
    assert loaded(torch.rand(2, loaded.in_chans, 32, 32)).shape == (2, kwargs.get('num_classes', 10) or 8 * 128)
    expected = timm.create_model('hne_resnet50_c8', nodes=NODES, **kwargs)
    state_dict = safetensors.torch.load(files['model.safetensors'])
    timm.models.load_pretrained(
        expected, {**model.pretrained_cfg, 'state_dict': state_dict}, expected.num_classes, expected.in_chans)
    expected = expected.state_dict()
    for name, tensor in loaded.state_dict().items():
        if not name.startswith('classifier') or 'num_classes' not in kwargs:
            assert torch.equal(tensor, expected[name]), name


def test_features_only(published, model):
    features = load(features_only=True)(torch.zeros(1, 3, 32, 32))
    assert torch.allclose(features[-1], model.forward_features(torch.zeros(1, 3, 32, 32)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('nodes', [(1, 1, 1, 2, 4), (1, 1, 1, 1, 2), (1, 1, 1, 1, 1)])
def test_first_members_into_a_prefix_of_the_tree(published, nodes):
    x = torch.rand(2, 3, 32, 32)
    full, prefix = load(), load(nodes=nodes)
    assert torch.allclose(prefix(x), full(x, num_members=nodes[-1]), rtol=1e-4, atol=1e-4)


def test_prefix_of_the_mobilenet(hub, tmp_path):
    full = trained_model('hne_mobilenetv2_075_e8', num_classes=5)
    safetensors.torch.save_file(full.state_dict(), tmp_path / 'e8.safetensors')
    overlay = dict(file=str(tmp_path / 'e8.safetensors'), num_classes=5)
    prefix = load('hne_mobilenetv2_075_e4', pretrained_cfg_overlay=overlay)
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(prefix(x), full(x, num_members=4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'nodes', [(1, 1, 1, 8, 8), (1, 1, 1, 4, 16), (1, 1, 3, 3, 6), (1, 2, 2, 4, 4), (1, 1, 2, 2, 2)])
def test_other_trees_are_refused(published, nodes):
    with pytest.raises(ValueError, match='nodes') as error:
        load(nodes=nodes)
    assert str(NODES) in str(error.value)
    assert str(nodes) in str(error.value)


# Packaged weights


@pytest.fixture
def package(monkeypatch, tmp_path, files):
    """A package with weights for one tag, and how to ask for it."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    monkeypatch.setattr(timm_hne.pretrained, 'PACKAGED', folder)
    path = Path(packaged('hne_resnet50_c8.test'))
    path.write_bytes(files['model.safetensors'])
    (folder / 'SHA256SUMS').write_text(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n')
    return path


def load_packaged(path):
    return load('hne_resnet50_c8', nodes=NODES, pretrained_cfg_overlay=dict(file=str(path)))


def test_packaged_weights_need_no_network(hub, package, model):
    assert_same(load_packaged(package), model)
    assert not hub.log


def test_packaged_weights_must_be_recorded(package, files):
    package.write_bytes(files['model.safetensors'][::-1])
    with pytest.raises(DigestError, match=r'hne_resnet50_c8\.test\.safetensors .*\w{64}'):
        load_packaged(package)
    (package.parent / 'SHA256SUMS').unlink()
    with pytest.raises(DigestError, match='none'):
        load_packaged(package)


def test_the_record_of_the_package_counts_first(hub, package, files, model):
    """Weights of ours on the Hub are checked against the package, whatever the repository says."""
    evil = safetensors_bytes(trained_model(nodes=NODES, num_classes=10).half().state_dict())
    name = f'alice/net@{put(hub, files)}'
    (package.parent / 'SHA256SUMS').write_text(
        f'{hashlib.sha256(files["model.safetensors"]).hexdigest()}  {name}/model.safetensors\n')
    overlay = dict(hf_hub_id=name)
    assert_same(load('hne_resnet50_c8', nodes=NODES, pretrained_cfg_overlay=overlay), model)
    assert not any('SHA256SUMS' in line for line in hub.log)

    evil = bytearray(files['model.safetensors'])
    evil[-1] ^= 1
    name = f'alice/evil@{put(hub, files, "alice/evil", model_safetensors=bytes(evil))}'
    (package.parent / 'SHA256SUMS').write_text(
        f'{hashlib.sha256(files["model.safetensors"]).hexdigest()}  {name}/model.safetensors\n')
    with pytest.raises(DigestError, match=r'model\.safetensors of alice/evil'):
        load('hne_resnet50_c8', nodes=NODES, pretrained_cfg_overlay=dict(hf_hub_id=name))


def test_the_record_of_the_package_counts_before_the_manifest(hub, package, files, model):
    """The package records the weights alone, the repository its config.json too."""
    name = f'alice/net@{put(hub, files)}'
    record = package.parent / 'SHA256SUMS'
    record.write_text(f'{hashlib.sha256(files["model.safetensors"]).hexdigest()}  {name}/model.safetensors\n')
    assert_same(load(f'hf-hub:{name}'), model)
    record.write_text(f'{"0" * 64}  {name}/model.safetensors\n')
    with pytest.raises(DigestError, match=rf'model\.safetensors .*{name} .*{"0" * 64}'):
        load(f'hf-hub:{name}')


@pytest.mark.parametrize(
    'name', ['hne_mobilenetv2_075_e4', 'hne_mobilenetv2_075_e8.hcd_in1k', 'hne_resnet50_c8.no_such'])
def test_a_tag_without_weights_names_those_with(name):
    with pytest.raises(RuntimeError, match=r'hne_resnet50_c8\.hcd_cifar10') as error:
        load(name)
    assert name.split('.')[0] in str(error.value)


# Damage and faults


def test_a_damaged_cache_is_repaired(published, files, model):
    load()
    blob = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    assert_same(load(), model)
    assert_cache_is_sound(files)


def test_a_damaged_cache_without_network(published, files, model, monkeypatch):
    load()
    blob = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    found, expected = hashlib.sha256(blob.read_bytes()).hexdigest(), blob.name
    with pytest.raises(DigestError, match=rf'model\.safetensors .*alice/net .*{found}.*{expected}'):
        load()
    assert not blob.exists()
    assert next(Path(constants.HF_HUB_CACHE).rglob('SHA256SUMS')).read_bytes() == files['SHA256SUMS']
    with pytest.raises(OSError, match=r'model\.safetensors .*alice/net'):
        load()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    assert_same(load(), model)


def test_a_damaged_manifest_is_replaced(published, files, model):
    load()
    blob = next(Path(constants.HF_HUB_CACHE).rglob('SHA256SUMS')).resolve()
    blob.write_bytes(b'0' * len(blob.read_bytes()))
    assert_same(load(), model)
    assert blob.read_bytes() == files['SHA256SUMS']


def test_another_process_repairs_the_cache(published, files, model, monkeypatch):
    load()
    download, rounds = timm_hne.pretrained.hf_hub_download, 0

    def download_while_another_removes(repo_id, filename, **kwargs):
        nonlocal rounds
        path = download(repo_id, filename, **kwargs)
        rounds += filename == 'SHA256SUMS'  # which comes first
        if rounds <= len(kinds) and filename == kinds[rounds - 1]:
            Path(path).resolve().unlink()
        return path

    monkeypatch.setattr(timm_hne.pretrained, 'hf_hub_download', download_while_another_removes)
    kinds = ['model.safetensors', 'config.json', 'model.safetensors']
    assert_same(load(), model)
    assert rounds == 4
    kinds, rounds = ['model.safetensors'] * 100, 0
    with pytest.raises(OSError, match='alice/net'):
        load()


def test_wrong_bytes_from_the_hub(published, files, model):
    published.fault('GET /cdn/', 'corrupt')
    assert_same(load(), model)

    published.add('alice/other', published.files('alice/net'))
    published.fault('GET /cdn/', 'corrupt', times=2)
    with pytest.raises(DigestError, match=r'model\.safetensors of alice/other') as error:
        load('hf-hub:alice/other')
    found, expected = str(error.value).split('digest ')[1][:64], hashlib.sha256(files['model.safetensors']).hexdigest()
    assert found != expected and expected in str(error.value)
    assert_cache_is_sound(files)
    assert_same(load('hf-hub:alice/other'), model)


def test_a_wrong_config_is_replaced(published, files, model):
    """timm has read the file before its digest can be checked, so there is no model from it."""
    wrong = files['config.json'].replace(b'0.4914', b'0.4915')
    load()
    path = next(Path(constants.HF_HUB_CACHE).rglob('config.json')).resolve()
    path.write_bytes(wrong)
    with pytest.raises(DigestError, match=r'config\.json of alice/net .*mean.*0\.4915.*0\.4914'):
        load()
    assert_same(load(), model)


# A new version while the old one is read


def other_version(files):
    """Change what the weights mean: their order of classes, their images, or both."""
    config = json.loads(files['config.json'])
    config['label_names'] = list('abcdefghij')
    config['pretrained_cfg']['mean'] = [0.1, 0.2, 0.3]
    return json.dumps(config).encode()


def test_a_new_version_appears_while_the_old_one_is_loaded(published, files, model, monkeypatch):
    """timm has read config.json of one commit, the weights would be those of the next."""
    handler = published.http.RequestHandlerClass
    resolve, commits = handler.resolve, []

    def meanwhile(self, repo_id, revision, path):
        if path == 'SHA256SUMS' and not commits:
            weights = {name: tensor + 1 for name, tensor in model.half().state_dict().items()}
            commits.append(put(published, files, config_json=other_version(files),
                               model_safetensors=safetensors_bytes(weights)))
        return resolve(self, repo_id, revision, path)

    model = copy.deepcopy(model)
    monkeypatch.setattr(handler, 'resolve', meanwhile)
    with pytest.raises(DigestError, match=r'config\.json of alice/net .*label_names'):
        load()
    loaded = load()
    assert commits
    assert loaded.pretrained_cfg['label_names'] == list('abcdefghij')
    assert loaded.pretrained_cfg['mean'] == [0.1, 0.2, 0.3]
    assert torch.equal(loaded.classifier.bias, (model.half().classifier.bias + 1).float())


def test_the_old_config_is_in_the_cache_and_the_new_one_out_of_reach(published, files):
    load()
    put(published, files, config_json=other_version(files))
    published.fault('HEAD /alice/net/resolve/main/config.json', 503, times=None)
    with pytest.raises(DigestError, match=r'config\.json of alice/net .*label_names'):
        load()
    published.faults.clear()
    assert load().pretrained_cfg['label_names'] == list('abcdefghij')


@pytest.mark.parametrize('digests', [True, False])
@pytest.mark.parametrize('change', [
    dict(label_names=list('abcdefghij')), dict(model_args=dict(nodes=[1, 1, 1, 4, 8])),
    dict(architecture='hne_resnet50_c16')])
def test_a_folder_is_written_anew_while_it_is_loaded(files, model, tmp_path, monkeypatch, digests, change):
    old = {name: data for name, data in files.items() if digests or name != 'SHA256SUMS'}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(files['config.json'])
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    new = json.dumps(config).encode()
    read = timm.models._factory.load_model_config_from_path  # between what timm reads and what is read here

    def meanwhile(path):
        parsed = read(path)
        (tmp_path / 'config.json').write_bytes(new)
        if digests:
            right = hashlib.sha256(files['config.json']).hexdigest()
            record = files['SHA256SUMS'].decode().replace(right, hashlib.sha256(new).hexdigest())
            (tmp_path / 'SHA256SUMS').write_text(record)
        return parsed

    monkeypatch.setattr(timm.models._factory, 'load_model_config_from_path', meanwhile)
    with pytest.raises(DigestError, match=rf'config\.json of .*{next(iter(change))}'):
        load(f'local-dir:{tmp_path}')


def test_what_the_user_puts_in_the_place_of_the_config_is_no_change(published, model):
    overlay = dict(mean=(0.5, 0.5, 0.5), label_names=list('abcdefghij'))
    loaded = load(pretrained_cfg_overlay=overlay)
    assert_same(loaded, model)
    assert loaded.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize('channels', [1, 3])
def test_the_user_may_want_other_images(published, model, channels):
    overlay = dict(input_size=(channels, 40, 40))  # as recipes with img_size have it
    loaded = load(pretrained_cfg_overlay=overlay, in_chans=channels)
    assert loaded.in_chans == channels and loaded.pretrained_cfg['input_size'] == (channels, 40, 40)
    if channels == 3:
        assert_same(loaded, model)
    name = 'classifier.weight'
    assert torch.equal(loaded.state_dict()[name], load().state_dict()[name])


def test_other_weights_than_those_of_the_repository(published, tmp_path):
    other = trained_model(nodes=NODES)
    safetensors.torch.save_file(other.state_dict(), tmp_path / 'other.safetensors')
    for overlay in (dict(state_dict=other.state_dict()), dict(file=str(tmp_path / 'other.safetensors'))):
        loaded = load(pretrained_cfg_overlay=overlay).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in other.state_dict().items())


def test_damaged_weights_in_a_cache_that_cannot_be_written(published, model, monkeypatch):
    load()
    blob = next(Path(constants.HF_HUB_CACHE).rglob('model.safetensors')).resolve()
    blob.write_bytes(blob.read_bytes()[::-1])

    def refuse(path, missing_ok=False):
        raise PermissionError(13, 'Permission denied', str(path))

    with monkeypatch.context() as context:
        context.setattr(Path, 'unlink', refuse)
        with pytest.raises(DigestError, match=rf'model\.safetensors of alice/net .*{blob.name}.*Permission denied'):
            load()
    assert_same(load(), model)


@pytest.mark.parametrize('request_', ['GET /cdn/', '/SHA256SUMS'])
@pytest.mark.parametrize('kind', ['cut', 'reset', 'slow', 'truncate', 'corrupt', 401, 403, 404, 500, 503])
@pytest.mark.parametrize('times', [1, None])
def test_faults(published, files, model, monkeypatch, request_, kind, times):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.1)
    monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', 0.1)
    monkeypatch.setattr(file_download, '_ETAG_RETRY_TIMEOUT', 0.1)
    published.slow_seconds = 0.3
    published.fault(request_, kind, times)
    try:
        loaded = load()
    except (OSError, RuntimeError, ValueError) as error:
        assert 'alice/net' in str(error)
    else:
        assert_same(loaded, model)
    published.faults.clear()
    assert_same(load(), model)
    assert_cache_is_sound(files)


@pytest.mark.parametrize('kind', ['cut', 'reset', 'slow', 'truncate', 401, 403, 404, 500, 503])
def test_faults_before_there_is_a_config(published, files, model, monkeypatch, kind):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.1)
    published.slow_seconds = 0.3
    published.fault('GET /api/resolve-cache/models/alice/net', kind)
    try:
        loaded = load()
    except Exception as error:
        assert 'config.json' in str(error) or kind == 'reset'  # timm and the client speak here
    else:
        assert_same(loaded, model)
    assert_same(load(), model)
    assert_cache_is_sound(files)


def test_disk_full(published, files, model):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(files['model.safetensors']) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            load()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_cache_is_sound(files)
    assert_same(load(), model)


def test_offline(published, model, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(LocalEntryNotFoundError):
        load()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    load()
    published.fault('', 503, times=None)
    assert_same(load(), model)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    requests = len(published.log)
    assert_same(load(), model)
    assert len(published.log) == requests


def test_private_repositories(published, model, monkeypatch):
    published.repos['alice/net'].private = True
    with pytest.raises(RepositoryNotFoundError):
        load()
    monkeypatch.setenv('HF_TOKEN', 'hf_alice')
    assert_same(load(), model)


# What is refused


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('fault', [None, 500, 404])
def test_nothing_is_unpickled(published, files, tmp_path, fault):
    bomb = Bomb()
    bomb.path = str(tmp_path / 'exploded')
    pickled = {'pytorch_model.bin': pickle.dumps(bomb), 'model.pth': pickle.dumps(bomb)}
    if fault is None:
        put(published, {**pickled, 'config.json': files['config.json']}, 'alice/bomb')
    else:
        put(published, {**files, **pickled}, 'alice/bomb')
        published.fault('HEAD /alice/bomb/resolve/', fault, times=None)
        published.faults[-1].match = '/model.safetensors'
    with pytest.raises((OSError, RuntimeError), match=r'model\.safetensors|connection'):
        load('hf-hub:alice/bomb')
    assert not any('.bin' in line or '.pth' in line for line in published.log)
    overlay = dict(hf_hub_id='alice/bomb', hf_hub_filename='pytorch_model.bin')
    published.faults.clear()
    with pytest.raises(ValueError, match='safetensors'):
        load('hne_resnet50_c8', nodes=NODES, pretrained_cfg_overlay=overlay)
    assert not os.path.exists(bomb.path)


def test_a_repository_without_digests(hub, files):
    hub.add('alice/net', {name: files[name] for name in ('config.json', 'model.safetensors')})
    with pytest.raises(RuntimeError, match=r'alice/net .*SHA256SUMS.*timm-hne publish'):
        load()
    assert not any('GET /cdn/' in line for line in hub.log)


def change(weights, kind):
    name = 'blocks.2.0.conv1.conv.weight'
    if kind == 'missing':
        del weights[name]
    elif kind == 'extra':
        weights['extra.weight'] = torch.zeros(3)
    elif kind == 'shape':
        weights[name] = weights[name][:, :-1].contiguous()
    elif kind == 'rows':
        weights[name] = weights[name][:-1].contiguous()
    elif kind == 'type':
        weights[name] = weights[name].to(torch.int32)
    elif kind == 'scalar':
        weights[name] = torch.zeros(())
    elif kind == 'empty':
        weights = {key: value[:0] for key, value in weights.items() if value.ndim}
    return weights


@pytest.mark.parametrize('kind', ['missing', 'extra', 'shape', 'rows', 'type', 'scalar', 'empty'])
def test_wrong_tensors(hub, files, kind):
    weights = change(safetensors.torch.load(files['model.safetensors']), kind)
    put(hub, files, model_safetensors=safetensors_bytes(weights))
    with pytest.raises(ValueError, match='weights'):
        load()


@pytest.mark.parametrize('cut', [lambda data: data[:-1000], lambda data: data[:4], lambda data: b'', lambda data:
                                 (2 ** 40).to_bytes(8, 'little') + data[8:]])
def test_a_header_that_claims_more_than_the_file_holds(hub, files, cut):
    put(hub, files, model_safetensors=cut(files['model.safetensors']))
    with pytest.raises(ValueError, match=r'alice/net .*safetensors'):
        load()


def test_another_architecture(hub, files):
    config = files['config.json'].replace(b'hne_resnet50_c8', b'hne_resnet50_c16')
    put(hub, files, config_json=config)
    with pytest.raises(ValueError, match=r'hne_resnet50_c16|weights'):
        load()


def tamper(hub, files, change):
    config = json.loads(files['config.json'])
    for key, value in change.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    put(hub, files, config_json=json.dumps(config).encode())


@pytest.mark.parametrize('change', [
    dict(model_args=dict(nodes=[1, 1, 2, 4, 4])),
    dict(model_args=dict(nodes=[1, 1, 2, 16, 16], num_classes=5), num_classes=5),
    dict(model_args=dict(nodes=[1, 2, 4, 4, 8])),
    dict(model_args=dict(nodes=[8, 8, 8, 8, 8])),
    dict(model_args=dict(nodes=[1, 1, 2, 4, 2 ** 40])),
    dict(model_args=dict(nodes=[1, 1, 2, 4, '8'])),
    dict(model_args=dict(nodes=None)),
    dict(model_args=dict(width=10 ** 9)),
    dict(model_args=dict(width=2000)),
    dict(model_args=dict(num_members=10 ** 9)),
    dict(num_classes=10 ** 12),
    dict(num_classes=3),
    dict(pretrained_cfg=dict(first_conv='blocks.1.0.conv1.conv')),
])
def test_a_config_that_was_tampered_with(hub, files, change):
    tamper(hub, files, change)
    with pytest.raises((ValueError, TypeError)) as error:  # a digest that differs is a RuntimeError
        load()
    assert len(str(error.value)) < 1000


def watch_models(monkeypatch, most_nodes=8):
    """Fail if a model is made that holds memory, or that has more nodes than the weights."""
    create = timm_hne.HNEResNet.__init__

    def watched(self, *args, nodes=(1, 2, 4, 8, 16), device=None, **kwargs):
        assert device == 'meta', 'a model was made that holds memory'
        assert not isinstance(nodes[0], int) or max(nodes) <= most_nodes, f'a model was made of nodes={nodes}'
        create(self, *args, nodes=nodes, device=device, **kwargs)

    watched.__signature__ = inspect.signature(create)
    monkeypatch.setattr(timm_hne.HNEResNet, '__init__', watched)


@pytest.mark.parametrize('change', [
    dict(model_args=dict(num_classes=20)),
    dict(model_args=dict(num_classes=10 ** 9)),
    dict(model_args=dict(num_classes='10')),
    dict(model_args=dict(in_chans=10 ** 9)),
    dict(model_args=dict(in_chans=1)),
    dict(model_args=dict(nodes=[80] * 5, num_classes=1), num_classes=1),
    dict(model_args=dict(nodes=[1, 1, 2, 4])),
    dict(model_args=dict(nodes=[16384] * 5)),
    dict(model_args=dict(nodes=[2 ** 62] * 5)),
    dict(model_args=dict(nodes=[10 ** 30] * 5)),
    dict(model_args=dict(nodes=[1] * 100_000)),
    dict(model_args=dict(nodes='11111')),
    dict(model_args=dict(width=10 ** 6)),
    dict(model_args=dict(width=10 ** 30)),
    dict(model_args=dict(width=-8)),
    dict(model_args=dict(global_pool='catavgmax')),
    dict(model_args=dict(global_pool='x' * 3000)),
])
def test_a_config_is_refused_before_there_is_a_model(hub, files, change, monkeypatch):
    tamper(hub, files, change)
    watch_models(monkeypatch)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r'config\.json') as error:
        load()
    assert time.monotonic() - start < 20
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize('name, value', [
    ('features_only', True), ('device', 'cuda'), ('dtype', 'float16'), ('out_indices', [0]), ('pruned', True),
    ('no_such', 1), ('kwargs_filter', ['nodes']),
])
@pytest.mark.parametrize('pretrained', [False, True])
def test_a_config_may_hold_arguments_of_the_model_only(hub, files, name, value, pretrained, monkeypatch):
    tamper(hub, files, dict(model_args={name: value}))
    watch_models(monkeypatch)
    with pytest.raises(ValueError, match=rf'model_args.*nodes.*{name}'):
        timm.create_model(NAME, pretrained=pretrained)


def test_a_tree_that_does_not_fit_the_weights_is_refused_before_there_is_a_model(published, monkeypatch):
    watch_models(monkeypatch, most_nodes=16)
    with pytest.raises(ValueError, match='nodes'):
        load(nodes=(1, 1, 1, 4, 16))


def test_a_config_without_nodes(hub, files, monkeypatch):
    """The sizes are those of the architecture then, still compared before anything is allocated."""
    config = json.loads(files['config.json'])
    del config['model_args']['nodes']
    config['num_classes'] = config['model_args']['num_classes'] = 10 ** 9
    put(hub, files, config_json=json.dumps(config).encode())
    watch_models(monkeypatch, most_nodes=16)
    with pytest.raises(ValueError, match=r'config\.json'):
        load()


# Many at once


def test_four_processes_share_a_cache(published, tmp_path):
    """Also the ways in which a user configures the client: a mirror, a cache and the plug-in, by the environment.

    Once with an empty cache, once with a damaged one.
    """
    code = f"""
import multiprocessing
import os
import sys
import timm
from pathlib import Path

sys.modules['timm_hne'].HNEResNet.stages = {timm_hne.HNEResNet.stages}

def load(_):
    model = timm.create_model({NAME!r}, pretrained=True)
    return sum(tensor.double().sum().item() for tensor in model.state_dict().values())

for _ in range(2):
    with multiprocessing.get_context('fork').Pool(4) as pool:
        print(*pool.map(load, range(4), chunksize=1))
    blob = next(Path(os.environ['HF_HUB_CACHE']).rglob('model.safetensors')).resolve()
    blob.write_bytes(blob.read_bytes()[::-1])
"""
    env = {
        **os.environ, 'HF_ENDPOINT': published.url, 'HF_HUB_CACHE': str(tmp_path / 'shared'), 'OMP_NUM_THREADS': '1',
        'HF_HUB_DISABLE_XET': '1', 'TQDM_POSITION': '-1',  # the latter shows bars without a terminal
    }
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    total = sum(tensor.double().sum().item() for tensor in load().state_dict().values())
    assert done.stdout.split() == [str(total)] * 8, done.stderr
    assert re.search(r'model\.safetensors: 100%', done.stderr), 'no progress bar'


def test_a_repository_with_another_model_is_refused_before_its_weights_are_fetched(hub, monkeypatch, tmp_path):
    config = json.dumps(dict(architecture='resnet18', num_classes=3, pretrained_cfg={})).encode()
    files = {'config.json': config, 'pytorch_model.bin': pickle.dumps(dict(weight=1))}
    hub.add('alice/other', files)
    monkeypatch.setattr(timm, 'create_model', None)
    with pytest.raises(ValueError, match=r"model must be a hierarchical ensemble, .* got 'hf-hub:alice/other'"):
        create_ensemble('hf-hub:alice/other', pretrained=True)
    assert any('config.json' in request for request in hub.log)
    assert not any('pytorch_model' in request for request in hub.log)
    (tmp_path / 'other').mkdir()
    for name, data in files.items():
        (tmp_path / 'other' / name).write_bytes(data)
    with pytest.raises(ValueError, match='hierarchical ensemble'):
        create_ensemble(f'local-dir:{tmp_path / "other"}', pretrained=True)
