"""Publishing to a Hub that is strict, and that fails at every step."""
import argparse
import json
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from test_hub import NODES, results_of, trained_model

import timm_hne
from timm_hne.__main__ import main
from timm_hne.hub import read_digests
from timm_hne.publishing import publish

FILES = {
    'README.md', 'SHA256SUMS', 'accuracy.png', 'config.json', 'evaluation.json', 'model.safetensors', 'recipe.yaml'}
RECIPE = dict(epochs=2, objective='hierarchical_codistillation', seed=1)


@pytest.fixture(scope='module')
def model():
    return trained_model(nodes=NODES)


@pytest.fixture
def alice(hub, monkeypatch, tmp_path):
    """The Hub, with a token of its user alice and an empty current directory."""
    monkeypatch.setenv('HF_TOKEN', 'hf_alice')
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.fixture
def quick(monkeypatch):
    """Drawing takes longer than all else."""
    monkeypatch.setattr(timm_hne.publishing, 'plot_accuracy', lambda rows, path: path.write_bytes(b'a plot'))


def send(model, repo_id='alice/net', **kwargs):
    return publish(model, repo_id, **{**dict(results=results_of(model), recipe=RECIPE), **kwargs})


def assert_published(hub, model, commits=1):
    """The repository holds one complete model, or nothing."""
    assert len(hub.commits('alice/net')) == 1 + commits
    if commits:
        assert set(hub.files('alice/net')) == {*FILES, '.gitattributes'}
        loaded, expected = timm.create_model('hf-hub:alice/net', pretrained=True), model.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[name].half().to(tensor.dtype)), name


def test_publish(alice, model):
    url = send(model)
    assert_published(alice, model)
    assert url == f'{alice.url}/alice/net/commit/{alice.repos["alice/net"].at("main").oid}'
    assert {path.name for path in Path('net').iterdir()} == FILES
    digests = subprocess.run(['sha256sum', '-c', 'SHA256SUMS'], cwd='net', capture_output=True, text=True, check=True)
    assert digests.stdout.count(': OK') == len(FILES) - 1
    assert set(read_digests('net/SHA256SUMS')) == FILES - {'SHA256SUMS'}
    assert json.loads(Path('net/evaluation.json').read_text()) == results_of(model)
    assert yaml.safe_load(Path('net/recipe.yaml').read_text()) == RECIPE
    assert not alice.repos['alice/net'].private
    assert Path('net/model.safetensors').stat().st_mode == Path('net/config.json').stat().st_mode
    assert model.training is False and next(model.parameters()).dtype == torch.float32


def test_no_module_has_the_name_of_a_function():
    """Importing such a module would replace the function."""
    assert not {module.name for module in pkgutil.iter_modules(timm_hne.__path__)} & set(timm_hne.__all__)


@pytest.mark.parametrize('package', ['huggingface_hub', 'jinja2', 'pyyaml', 'safetensors', 'timm', 'torch'])
def test_what_publishing_needs_is_declared(package):
    text = (Path(__file__).parent.parent / 'pyproject.toml').read_text()
    assert f'"{package}' in text.partition('dependencies = [')[2].partition(']')[0]


def test_the_same_thing_twice_is_one_commit(alice, model):
    assert send(model) == send(model)
    assert_published(alice, model)
    uploads = sum('PUT /cdn/' in line for line in alice.log)
    other = {**results_of(model), 'num_images': 5}
    assert send(model, results=other) != send(model)
    assert sum('PUT /cdn/' in line for line in alice.log) == uploads
    assert len(alice.commits('alice/net')) == 4


def test_private_and_branch(alice, model):
    send(model, private=True, revision='dev', dtype='float32', label_names=list('abcdefghij'))
    assert alice.repos['alice/net'].private
    assert alice.commits('alice/net') == ['initial commit']
    assert alice.commits('alice/net', 'dev') == ['initial commit', 'Publish net']
    loaded = timm.create_model('hf-hub:alice/net@dev', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
    assert loaded.pretrained_cfg['label_names'] == list('abcdefghij')
    card = ModelCard.load('net/README.md')
    assert "timm.create_model('hf-hub:alice/net@dev', pretrained=True)" in card.text
    assert card.data.model_name == 'net'


def test_dry_run(alice, model):
    assert send(model, dry_run=True) == 'net'
    assert not alice.log
    loaded = timm.create_model('local-dir:net', pretrained=True, num_members=2)
    assert loaded.num_members == 2
    assert torch.equal(loaded.classifier.bias, model.classifier.bias.half().float())


def test_names_of_classes_go_with_the_weights(alice, model):
    """Those of the packaged weights of an architecture are not those of a model that was trained anew."""
    send(model, dry_run=True)
    assert 'label_names' not in timm.create_model('local-dir:net', pretrained=True).pretrained_cfg
    cfg = {**model.pretrained_cfg, 'label_names': ['another'] * 10}
    other = trained_model(nodes=NODES, pretrained_cfg=cfg)
    assert other.pretrained_cfg['label_names'] == cfg['label_names']
    send(other, dry_run=True)
    assert 'another' not in Path('net/config.json').read_text()

    send(model, dry_run=True, label_names=list('abcdefghij'))
    loaded = timm.create_model('local-dir:net', pretrained=True)
    send(loaded, dry_run=True)
    again = timm.create_model('local-dir:net', pretrained=True)
    assert again.pretrained_cfg['label_names'] == list('abcdefghij')
    again.reset_classifier(7)
    send(again, dry_run=True)
    assert 'label_names' not in timm.create_model('local-dir:net', pretrained=True).pretrained_cfg


def test_the_default_member_count_is_not_published(alice):
    """It would be out of range for a prefix of the tree."""
    send(trained_model(nodes=NODES, num_members=8), dry_run=True)
    assert timm.create_model('local-dir:net', pretrained=True, nodes=(1, 1, 1, 1, 2)).num_members == 2


# The card


def test_the_card(alice, model):
    send(model, label_names=[f'class{i}' for i in range(10)])
    card = ModelCard.load('net/README.md')
    card.validate()
    assert card.data.library_name == 'timm'
    assert card.data.pipeline_tag == 'image-classification'
    assert card.data.license == 'apache-2.0'
    assert card.data.datasets == ['cifar10']
    assert [result.metric_value for result in card.data.eval_results] == [81.0, 82.0, 84.0, 88.0]
    assert '| 4 | 84.00 | 99.00 | 40.0 | 0.100 | 0.5000 | 0.0300 |' in card.text
    assert 'class0, class1' in card.text
    assert Image.open('net/accuracy.png').size == (720, 480)


@pytest.mark.parametrize('in_chans', [1, 3])
def test_the_code_of_the_card_runs(alice, quick, in_chans):
    cfg = dict(input_size=(in_chans, 32, 32), mean=(0.5,) * in_chans, std=(0.5,) * in_chans)
    send(trained_model(nodes=NODES, in_chans=in_chans, pretrained_cfg_overlay=cfg))
    Image.new('RGB', (40, 32), 'red').save('image.png')
    code = re.findall(r'```python\n(.*?)```', Path('net/README.md').read_text(), re.DOTALL)
    assert len(code) == 1
    values = {}
    exec(code[0], values)
    assert values['probabilities'].shape == values['quick'].shape == (1, 10)
    assert not torch.equal(values['probabilities'], values['quick'])
    assert 'hf-hub:alice/net' in code[0]


# What is refused


@pytest.mark.parametrize(
    'repo_id', ['net', 'alice/', 'a/b/c', 'alice/ne t', 'alice/--net', 'alice/net.git', '../net', ''])
def test_malformed_names(alice, model, repo_id):
    with pytest.raises((HFValidationError, ValueError)):
        send(model, repo_id)
    assert not alice.log
    assert not list(Path().iterdir())


@pytest.mark.parametrize('token, repo_id, error, message', [
    (None, 'alice/net', OSError, 'Publishing to alice/net failed.*Token is required'),
    ('hf_wrong', 'alice/net', HfHubHTTPError, 'Invalid user token'),
    ('hf_alice_read', 'alice/net', HfHubHTTPError, '403 Forbidden'),
    ('hf_bob', 'alice/net', HfHubHTTPError, '403 Forbidden'),
    ('hf_bob', 'alice/new', HfHubHTTPError, '403 Forbidden'),
])
def test_no_permission(alice, model, quick, monkeypatch, token, repo_id, error, message):
    alice.add('alice/net', {'SHA256SUMS': b''})
    monkeypatch.delenv('HF_TOKEN')
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    with pytest.raises(error, match=message):
        send(model, repo_id)
    assert alice.commits('alice/net') == ['Add files']
    assert 'alice/new' not in alice.repos
    assert not any('PUT' in line for line in alice.log)


def test_the_name_belongs_to_something_else(alice, model):
    alice.add('alice/net', {'config.json': b'{}', 'pytorch_model.bin': b'x'})
    with pytest.raises(ValueError, match=r"alice/net holds \['config\.json', 'pytorch_model\.bin'\]"):
        send(model)
    assert alice.commits('alice/net') == ['Add files']


def test_the_folder_belongs_to_something_else(alice, model):
    Path('net').mkdir()
    Path('net/README.md').write_text('mine')
    with pytest.raises(ValueError, match='folder must be new or one that was written before, but net holds'):
        send(model)
    assert [path.read_text() for path in Path('net').iterdir()] == ['mine']
    assert not alice.log


def test_offline(alice, model, quick, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='offline mode is enabled'):
        send(model)


def broken(model, change):
    model = trained_model(nodes=model.nodes)
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize('kwargs, message', [
    (dict(results=None), "results must be what `timm-hne eval` wrote, with 'members', got None"),
    (dict(results={}), 'results must be'),
    (dict(results=dict(members=[])), 'results must be'),
    (dict(results=dict(members=[dict(num_members=1)])), "results must have a number for each of .*'top1': None"),
    (dict(results=dict(members='12345678')), 'results must be'),
    (dict(recipe={}), 'recipe must say'),
    (dict(recipe=['epochs']), r"recipe must say .* as names and values, got \['epochs'\]"),
    (dict(recipe='epochs: 2'), 'recipe must say'),
    (dict(recipe=dict(criterion=torch.nn.Module)), 'recipe must hold plain values only'),
    (dict(dtype='int8'), "dtype must be one of .*, got 'int8'"),
    (dict(label_names=['a', 'b']), 'label_names must have 10 entries, got 2'),
])
def test_bad_arguments(alice, model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        send(model, **kwargs)
    assert not alice.log
    assert not list(Path().iterdir())


def test_results_of_another_model(alice, model):
    results = results_of(model)
    for change in dict(members=results['members'][:4]), dict(nodes=[1, 2, 2, 4, 8]), dict(model='x'), dict(data=None):
        with pytest.raises(ValueError, match=r"results must be those of 1 to 8 members .*'nodes': \[1, 1, 2, 4, 8\]"):
            send(model, results={**results, **change})
    rows = results['members']
    for members in rows[::-1], [*rows[:-1], rows[0]], [dict(row, num_members=row['num_members'] + 1) for row in rows]:
        with pytest.raises(ValueError, match=r'1 to 8 members of .*, got \[\d, '):
            send(model, results={**results, 'members': members})
    with pytest.raises(ValueError, match=r"'num_members': True"):
        send(model, results={**results, 'members': [dict(rows[0], num_members=True), *rows[1:]]})
    rows[3]['top1'] = float('nan')
    with pytest.raises(ValueError, match=r"'top1': nan"):
        send(model, results=results)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e5])
def test_weights_that_are_not_finite(alice, value):
    model = trained_model(nodes=NODES)
    model.blocks[2][0].conv1.bn.running_var[0] = value
    with pytest.raises(ValueError, match=r'not finite in float16: blocks\.2\.0\.conv1\.bn\.running_var'):
        send(model)
    assert not alice.log
    if value == 1e5:
        assert send(model, dtype='float32', dry_run=True)


def test_not_an_ensemble(alice, model):
    with pytest.raises(TypeError, match=r'model must be an hne_\* model made by timm\.create_model, got ResNet'):
        publish(timm.create_model('resnet10t'), 'alice/net', results_of(model), RECIPE)


# Faults

STEPS = [
    'GET /api/whoami-v2', 'POST /api/repos/create', 'GET /api/models/alice/net', 'POST /api/validate-yaml',
    'POST /api/models/alice/net/preupload', 'POST /alice/net.git/info/lfs/objects/batch', 'PUT /cdn/',
    'POST /alice/net.git/info/lfs/objects/verify', 'POST /api/models/alice/net/commit', 'HEAD /alice/net/resolve',
    'GET /cdn/',
]


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('kind', ['reset', 403, 503])
def test_every_step_may_fail(alice, model, quick, step, kind):
    alice.fault(step, kind, times=None)
    with pytest.raises(OSError, match=r'Publishing to alice/net failed|403|503'):
        send(model)
    assert len(alice.repos['alice/net'].history['main'] if 'alice/net' in alice.repos else []) <= 2
    alice.faults.clear()
    send(model)
    assert_published(alice, model)


def test_a_commit_whose_answer_is_lost(alice, model, quick):
    alice.fault('POST /api/models/alice/net/commit', 'cut')
    with pytest.raises(OSError, match='Publishing to alice/net failed, it can be tried again'):
        send(model)
    send(model)
    assert_published(alice, model)


def test_what_was_uploaded_is_compared(alice, model, quick):
    alice.fault('GET /cdn/', 'corrupt', times=None)
    with pytest.raises(ValueError, match=r'differs after a download from .*, publish it again'):
        send(model)
    alice.faults.clear()
    send(model)
    assert_published(alice, model)


def test_a_commit_in_between_is_not_overwritten(alice, model, quick, monkeypatch):
    send(model)
    preupload = alice.http.RequestHandlerClass.preupload

    def meanwhile(handler, repo_id, revision):
        alice.add('alice/net', {'notes.md': b'by somebody else'})
        return preupload(handler, repo_id, revision)

    monkeypatch.setattr(alice.http.RequestHandlerClass, 'preupload', meanwhile)
    with pytest.raises(HfHubHTTPError, match='A commit has happened since'):
        send(model, recipe=dict(epochs=3))
    assert alice.files('alice/net')['notes.md'] == b'by somebody else'


# Checkpoints and the command


def save_checkpoint(path, model, epoch=1, **args):
    """Save what timm's training saves."""
    args = argparse.Namespace(**{
        **dict(model='hne_resnet50_c8', epochs=2, seed=1, data_dir=str(path.parent), mean=[0.3] * 3), **args})
    torch.save(dict(arch=args.model, args=args, epoch=epoch, state_dict=model.state_dict()), path)


@pytest.fixture
def run_folder(model, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    save_checkpoint(folder / 'model_best.pth.tar', model, epoch=0)
    save_checkpoint(folder / 'last.pth.tar', model, epoch=1)
    (folder / 'evaluation.json').write_text(json.dumps(results_of(model)))
    return folder


def command(*arguments):
    main(['publish', *map(str, arguments)])


def test_command(alice, model, run_folder, capsys):
    command(run_folder / 'model_best.pth.tar', '--repo-id', 'alice/net', '--private')
    assert 'Published and verified: http' in capsys.readouterr().out
    assert_published(alice, model)
    assert alice.repos['alice/net'].private
    recipe = yaml.safe_load(alice.files('alice/net')['recipe.yaml'])
    assert recipe['seed'] == 1 and 'data_dir' not in recipe
    config = json.loads(alice.files('alice/net')['config.json'])
    assert config['pretrained_cfg']['mean'] == [0.3] * 3
    assert 'label_names' not in config


def test_numbers_of_the_evaluation_stay_numbers(alice, model, run_folder):
    results = {**results_of(model), 'recipe': {'lr': 1e-05}}
    (run_folder / 'evaluation.json').write_text(json.dumps(results))
    command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net', '--dry-run')
    assert json.loads(Path('net/evaluation.json').read_text()) == results


def test_command_knows_the_classes_of_the_training_data(alice, model, run_folder):
    save_checkpoint(run_folder / 'last.pth.tar', model, label_names=list('abcdefghij'))
    path = run_folder / 'last.pth.tar'
    command(path, '--repo-id', 'alice/net', '--dry-run')
    assert timm.create_model('local-dir:net', pretrained=True).pretrained_cfg['label_names'] == list('abcdefghij')
    assert 'label_names' not in yaml.safe_load(Path('net/recipe.yaml').read_text())
    command(path, '--repo-id', 'alice/net', '--dry-run', '--label-names', *'0123456789')
    assert timm.create_model('local-dir:net', pretrained=True).pretrained_cfg['label_names'] == list('0123456789')


def test_command_from_other_files(alice, quick, run_folder, capsys):
    (run_folder / 'recipe.yaml').write_text(yaml.safe_dump(RECIPE))
    command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net', '--dry-run', '--folder', 'first')
    assert capsys.readouterr().out == 'Wrote first\n'
    assert yaml.safe_load(Path('first/recipe.yaml').read_text()) == RECIPE
    command('first', '--repo-id', 'alice/net', '--dry-run', '--folder', 'second')
    assert not alice.log
    for name in FILES:
        assert Path('first', name).read_bytes() == Path('second', name).read_bytes(), name
    command(
        'first/model.safetensors', '--model', 'hne_resnet50_c8', '--repo-id', 'alice/net', '--dry-run', '--folder',
        'third')
    assert Path('first/model.safetensors').read_bytes() == Path('third/model.safetensors').read_bytes()


@pytest.mark.parametrize('damage, message', [
    (lambda path, model: save_checkpoint(path, model, epoch=0), r'model_best\.pth\.tar is unfinished: 1 of 2 epochs'),
    (lambda path, model: torch.save({**torch.load(path, weights_only=False), 'epoch': 0, 'args': dict(epochs=2)}, path),
     r'model_best\.pth\.tar is unfinished: 1 of 2 epochs'),
    (lambda path, model: path.write_bytes(path.read_bytes()[:-5000]), r'last\.pth\.tar cannot be read'),
    (lambda path, model: path.write_bytes(b''), r'last\.pth\.tar cannot be read'),
    (lambda path, model: path.write_bytes(b'PK' + bytes(2000)), r'last\.pth\.tar cannot be read'),
    (lambda path, model: path.write_bytes(b'\x80\x02J'), r'last\.pth\.tar cannot be read'),
    (lambda path, model: torch.save([1, 2], path), r'last\.pth\.tar cannot be read'),
])
def test_unfinished_runs(alice, model, run_folder, capsys, damage, message):
    damage(run_folder / 'last.pth.tar', model)
    with pytest.raises(SystemExit, match='1'):
        command(run_folder / 'model_best.pth.tar', '--repo-id', 'alice/net')
    assert re.search(message, capsys.readouterr().err)
    assert not alice.log


@pytest.mark.parametrize('name, arguments, message', [
    ('nothing.pth.tar', [], 'does not exist'),
    ('cut.pth.tar', [], 'cannot be read'),
    ('other.pth.tar', [], 'is not one of hne_resnet50_c8'),
    ('model.safetensors', [], 'does not say which model'),
    ('model.safetensors', ['--model', 'resnet10t'], 'must be a hierarchical ensemble'),
])
def test_bad_checkpoints(alice, model, run_folder, capsys, name, arguments, message):
    (run_folder / 'last.pth.tar').unlink()
    path = run_folder / name
    if name == 'cut.pth.tar':
        path.write_bytes((run_folder / 'model_best.pth.tar').read_bytes()[:-5000])
    elif name == 'other.pth.tar':
        save_checkpoint(path, trained_model('hne_resnet50_c16', nodes=NODES))
    elif name == 'model.safetensors':
        safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(SystemExit, match='1'):
        command(path, '--repo-id', 'alice/net', *arguments)
    assert message in capsys.readouterr().err
    assert not alice.log


@pytest.mark.parametrize('option, content, message', [
    ('--recipe', b'- epochs\n- 2\n', 'recipe must say how the model was trained, as names and values'),
    ('--recipe', b'', 'recipe must say'),
    ('--recipe', b'a: [', 'given.yaml is no YAML or JSON file'),
    ('--results', b'{"members": [', 'given.yaml is no YAML or JSON file'),
    ('--results', b'\xff\xfe\xfa', 'given.yaml is no YAML or JSON file'),
])
def test_bad_files(alice, quick, run_folder, capsys, option, content, message):
    Path('given.yaml').write_bytes(content)
    with pytest.raises(SystemExit, match='1'):
        command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net', '--dry-run', option, 'given.yaml')
    assert message in capsys.readouterr().err
    assert not Path('net').exists()


def test_command_without_results(alice, run_folder, capsys):
    (run_folder / 'evaluation.json').unlink()
    with pytest.raises(SystemExit, match='1'):
        command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net')
    assert 'timm-hne publish: results must be what `timm-hne eval` wrote' in capsys.readouterr().err
    assert not alice.log
