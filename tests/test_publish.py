"""Publishing to a Hub that is strict, and that fails at every step."""
import argparse
import copy
import json
import pkgutil
import re
import resource
import shutil
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

import timm_hne.hub.folder
from timm_hne.__main__ import main
from timm_hne.hub.publishing import publish
from timm_hne.pretrained import digest, read_digests, read_results, state_digest

FILES = {
    'README.md', 'SHA256SUMS', 'accuracy.png', 'config.json', 'evaluation.json', 'model.safetensors', 'recipe.yaml'}
RECIPE = dict(epochs=2, objective='hierarchical_codistillation', seed=1)

pytestmark = pytest.mark.usefixtures('shallow_module')


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
    monkeypatch.setattr(timm_hne.hub.folder, 'plot_accuracy', lambda rows, path: path.write_bytes(b'a plot'))


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


def test_the_owner_may_be_left_out(alice, quick, model, monkeypatch):
    send(model, 'net')
    assert_published(alice, model)
    assert "'hf-hub:alice/net'" in Path('net/README.md').read_text()
    assert send(model, 'net', dry_run=True) == 'net'
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(OSError, match=r"repo_id 'net'.*user/name"):
        send(model, 'net')


def test_a_pull_request(alice, quick, model, monkeypatch):
    send(model)
    monkeypatch.setenv('HF_TOKEN', 'hf_bob')
    url = send(model, recipe=dict(epochs=3), create_pr=True, commit_message='Three epochs')
    assert url == f'{alice.url}/alice/net/discussions/1'
    assert_published(alice, model)
    assert alice.commits('alice/net', 'refs/pr/1')[-1] == 'Three epochs'
    assert yaml.safe_load(alice.files('alice/net', 'refs/pr/1')['recipe.yaml']) == dict(epochs=3)
    with pytest.raises(HfHubHTTPError, match='404'):
        send(model, 'alice/no-such', create_pr=True)


def test_private_is_not_what_a_public_repository_becomes(alice, quick, model):
    send(model)
    with pytest.raises(ValueError, match=r'private.*alice/net .*public'):
        send(model, private=True, recipe=dict(epochs=3))
    assert_published(alice, model)
    alice.repos['alice/net'].private = True
    send(model, private=True, recipe=dict(epochs=3))
    assert_published(alice, model, commits=2)


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
    send(trained_model(nodes=NODES, num_members=4), dry_run=True)
    assert timm.create_model('local-dir:net', pretrained=True, nodes=(1, 1, 1, 1, 2)).num_members == 2


# The card


def test_the_card(alice, model):
    send(model, label_names=[f'class{i}' for i in range(10)])
    card = ModelCard.load('net/README.md')
    card.validate()
    assert card.data.library_name == 'timm'
    assert card.data.pipeline_tag == 'image-classification'
    assert card.data.license == 'apache-2.0'
    assert card.data.datasets == ['uoft-cs/cifar10']
    found = [(result.metric_name, result.metric_value) for result in card.data.eval_results]
    assert found == [
        ('Top-1 accuracy of 1 member', 81.0), ('Top-5 accuracy of 1 member', 99.0),
        ('Top-1 accuracy of 2 members', 82.0), ('Top-5 accuracy of 2 members', 99.0),
        ('Top-1 accuracy of 4 members', 84.0), ('Top-5 accuracy of 4 members', 99.0),
        ('Top-1 accuracy of 8 members', 88.0), ('Top-5 accuracy of 8 members', 99.0)]
    for result in card.data.eval_results:
        assert result.source_url == 'https://huggingface.co/alice/net/blob/main/evaluation.json'
        assert (result.dataset_type, result.dataset_name) == ('uoft-cs/cifar10', 'cifar10')
        assert result.dataset_split == 'test'
    assert '| 4 | 84.00 | 99.00 | 40.0 | 0.100 | 0.5000 | 0.0300 |' in card.text
    assert 'class0, class1' in card.text
    assert Image.open('net/accuracy.png').size == (720, 480)


@pytest.mark.parametrize('recipe, line', [
    (None, '2 epochs, objective `independent`.'),
    (dict(objective='codistillation', phases=[]), '2 epochs, objective `independent`.'),
    (dict(objective='codistillation', phases=[{'lr': 1}]), '2 epochs, objective `codistillation`.'),
    (
        dict(objective='codistillation', phases=[dict(objective='independent'), {}, dict(objective='independent')]),
        '2 epochs, objectives `independent` and `codistillation` in turn.',
    ),
])
def test_the_objectives_of_phases(alice, quick, model, recipe, line):
    send(model, results={**results_of(model), 'recipe': recipe}, dry_run=True)
    assert line in Path('net/README.md').read_text()


def test_what_the_owner_says_of_the_model(alice, quick, model):
    send(
        model, revision='dev', license='mit', base_model='bob/other', datasets=['bob/pictures', 'alice/more'],
        commit_message='A better one')
    assert alice.commits('alice/net', 'dev') == ['initial commit', 'A better one']
    data = ModelCard.load('net/README.md').data
    assert (data.license, data.base_model, data.datasets) == ('mit', 'bob/other', ['bob/pictures', 'alice/more'])
    assert data.eval_results[0].dataset_type == 'bob/pictures'
    assert data.eval_results[0].source_url == 'https://huggingface.co/alice/net/blob/dev/evaluation.json'
    assert json.loads(Path('net/config.json').read_text())['pretrained_cfg']['license'] == 'mit'


def test_data_that_the_hub_does_not_know_are_no_dataset(alice, quick, model):
    send(model, results={**results_of(model), 'data': 'digits'}, dry_run=True)
    data = ModelCard.load('net/README.md').data
    assert data.datasets is None
    assert data.eval_results[0].dataset_type == 'digits'


@pytest.mark.parametrize('kwargs', [
    dict(base_model='a b'), dict(base_model='a/b/c'), dict(datasets=['uoft-cs/cifar10', '../x']),
    dict(datasets='uoft-cs/cifar10'), dict(create_pr=True, revision='dev'), dict(create_pr=True, private=True),
])
def test_bad_options_of_the_card_and_the_commit(alice, model, kwargs):
    name, value = list(kwargs.items())[-1]
    with pytest.raises(ValueError, match=name) as error:
        send(model, **kwargs)
    assert (value[-1] if isinstance(value, list) else str(value)) in str(error.value)
    assert not alice.log
    assert not list(Path().iterdir())


OWN_TEXT = '# My pictures\n\nTrained on a **train**.\n\n'


def edit(hub, text):
    """Edit the card on the Hub as its web page does."""
    hub.add('alice/net', {'README.md': text.encode()}, title='Update README.md')


def card_on_the_hub(hub):
    return hub.files('alice/net')['README.md'].decode()


def test_a_card_that_was_edited_on_the_hub_is_kept(alice, quick, model):
    send(model)
    card = card_on_the_hub(alice)
    text = card.replace('license: apache-2.0', 'license: mit\nlanguage: en\nthumbnail: me.png')
    text = text.replace('# net\n\n', OWN_TEXT).replace('- ensemble\n', '- trains\n')
    text = text.replace('- uoft-cs/cifar10\n', '- uoft-cs/cifar10-x\n')
    edit(alice, text + '\n## Thanks\n\nTo all.\n')
    results = results_of(model)
    results['members'][0]['top1'] = 12.34
    send(model, results=results)
    new = card_on_the_hub(alice)
    data = ModelCard(new).data
    assert (data.license, data.language, data.thumbnail) == ('mit', 'en', 'me.png')
    assert 'trains' in data.tags and 'ensemble' not in data.tags
    assert data.datasets == ['uoft-cs/cifar10-x']
    assert data.eval_results[0].metric_value == 12.34
    assert OWN_TEXT in new and '\n## Thanks\n\nTo all.\n' in new
    assert '| 1 | 12.34 |' in new and '| 1 | 81.00 |' not in new
    assert new.count('## Results') == 1
    assert read_digests('net/SHA256SUMS')['README.md'] == digest(new.encode())
    assert Path('net/README.md').read_text() == new

    commits = len(alice.commits('alice/net'))
    send(model, results=results)
    assert len(alice.commits('alice/net')) == commits
    send(model, results=results, license='bsd-3-clause', datasets=['a/b'])
    data = ModelCard(card_on_the_hub(alice)).data
    assert (data.license, data.language, data.datasets) == ('bsd-3-clause', 'en', ['a/b'])


def test_a_card_that_was_there_before_the_model(alice, quick, model):
    """The web page of the Hub makes one with the license that the owner chose."""
    alice.add('alice/net', {'README.md': b'---\nlicense: mit\n---\n\nTo be written.\n'})
    send(model)
    card = card_on_the_hub(alice)
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ('mit', 'timm', 'image-classification')
    assert 'To be written.' in card and '| 1 | 81.00 |' in card


@pytest.mark.parametrize('text', ['---\nlicense: [\n---\n', '---\n- license\n---\n'])
def test_a_card_whose_metadata_cannot_be_read(alice, quick, model, text):
    alice.add('alice/net', {'README.md': text.encode()})
    with pytest.raises(ValueError, match=r'README\.md'):
        send(model)
    assert alice.commits('alice/net') == ['Add files']


@pytest.mark.parametrize('edited', [True, False])
def test_a_card_of_version_0_1(alice, quick, model, edited):
    """It does not say which part of it is generated: all of it, if it still has its digest."""
    old = Path(__file__).parent / 'data/v0_1/published'
    alice.add('alice/net', {path.name: path.read_bytes() for path in old.iterdir()})
    if edited:
        edit(alice, card_on_the_hub(alice) + OWN_TEXT)
    send(model)
    card = card_on_the_hub(alice)
    assert '| 1 | 81.00 |' in card
    assert (OWN_TEXT.strip() in card) == ('| 1 | 9.72 |' in card) == edited


def test_the_card_of_the_folder_is_kept_too(alice, quick, model):
    """After a dry run one looks at it, and may want to add something."""
    send(model, dry_run=True)
    path = Path('net/README.md')
    path.write_text(path.read_text().replace('# net\n\n', OWN_TEXT))
    send(model)
    assert OWN_TEXT in card_on_the_hub(alice)


def test_the_card_of_the_folder_is_kept_beside_one_on_the_hub(alice, quick, model):
    send(model)
    edit(alice, card_on_the_hub(alice).replace('license: apache-2.0', 'license: mit'))
    path = Path('net/README.md')
    path.write_text(path.read_text().replace('# net\n\n', OWN_TEXT))
    send(model)
    card = card_on_the_hub(alice)
    assert OWN_TEXT in card and ModelCard(card).data.license == 'mit'

    path.write_text(card.replace('My pictures', 'Our pictures'))  # again, and here alone
    send(model)
    card = card_on_the_hub(alice)
    assert 'Our pictures' in card

    for change in ('# All pictures\n', '', '# All\r\n\r\npictures\r\n'):  # again and again, and there alone
        head, begin, rest = card_on_the_hub(alice).partition('<!--')
        edit(alice, f'{head[:head.rindex("---") + 4]}{change}{begin}{rest}')
        send(model)
        send(model)
        assert change in card_on_the_hub(alice) and 'Our' not in card_on_the_hub(alice)

    path.write_text(path.read_text() + 'Mine.')
    edit(alice, card_on_the_hub(alice) + 'Yours.')
    commits = len(alice.commits('alice/net'))
    with pytest.raises(ValueError, match=r'README\.md .*folder and on the Hub'):
        send(model)
    assert len(alice.commits('alice/net')) == commits and 'Mine.' in path.read_text()
    path.unlink()
    send(model)
    assert 'Yours.' in card_on_the_hub(alice)


def test_what_a_killed_run_left_in_the_folder_is_no_obstacle(alice, quick, model):
    left = Path('net/.timm_hne-abc')
    left.mkdir(parents=True)
    (left / 'model.safetensors').write_bytes(b'half')
    send(model, dry_run=True)
    assert not left.exists() and Path('net/model.safetensors').exists()


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
    'repo_id', ['alice/', 'a/b/c', 'alice/ne t', 'alice/--net', 'alice/net.git', '../net', ''])
def test_malformed_names(alice, model, repo_id):
    with pytest.raises((HFValidationError, ValueError)):
        send(model, repo_id)
    assert not alice.log
    assert not list(Path().iterdir())


@pytest.mark.parametrize('token, repo_id, error, message', [
    (None, 'alice/net', OSError, 'alice/net.*Token is required'),
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
    with pytest.raises(ValueError, match=r"alice/net .*'config\.json', 'pytorch_model\.bin'"):
        send(model)
    assert alice.commits('alice/net') == ['Add files']


def test_the_folder_belongs_to_something_else(alice, model):
    Path('net').mkdir()
    Path('net/README.md').write_text('mine')
    with pytest.raises(ValueError, match=r'folder .*\bnet\b'):
        send(model)
    assert [path.read_text() for path in Path('net').iterdir()] == ['mine']
    assert not alice.log


def test_offline(alice, model, quick, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match='offline'):
        send(model)


def broken(model, change):
    model = trained_model(nodes=model.nodes)
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize('kwargs, message', [
    (dict(results=None), "results .*timm-hne eval.*'members'.*None"),
    (dict(results={}), 'results .*timm-hne eval'),
    (dict(results=dict(members=[])), 'results .*timm-hne eval'),
    (dict(results=dict(members=[dict(num_members=1)])), "results .*'top1': None"),
    (dict(results=dict(members='12345678')), 'results .*timm-hne eval'),
    (dict(recipe={}), 'recipe .*{}'),
    (dict(recipe=['epochs']), r"recipe .*\['epochs'\]"),
    (dict(recipe='epochs: 2'), 'recipe .*epochs: 2'),
    (dict(recipe=dict(criterion=torch.nn.Module)), 'recipe'),
    (dict(dtype='int8'), "dtype .*'int8'"),
    (dict(label_names=['a', 'b']), 'label_names .*10 .*2'),
])
def test_bad_arguments(alice, model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        send(model, **kwargs)
    assert not alice.log
    assert not list(Path().iterdir())


def test_results_of_another_model(alice, model):
    results = results_of(model)
    for change in dict(weights_sha256='0' * 64), dict(weights_sha256=None):
        with pytest.raises(ValueError, match=rf"weights_sha256 {results['weights_sha256']}.*timm-hne eval") as error:
            send(model, results={**results, **change})
        assert str(change['weights_sha256']) in str(error.value)
    for change in dict(members=results['members'][:4]), dict(nodes=[1, 2, 2, 4, 8]), dict(model='x'), dict(data=None):
        with pytest.raises(ValueError, match=r"results .*1 .*8 members .*'nodes': \[1, 1, 2, 4, 8\]"):
            send(model, results={**results, **change})
    rows = results['members']
    for members in rows[::-1], [*rows[:-1], rows[0]], [dict(row, num_members=row['num_members'] + 1) for row in rows]:
        with pytest.raises(ValueError, match=r'1 .*8 members .*\[\d, '):
            send(model, results={**results, 'members': members})
    with pytest.raises(ValueError, match=r"'num_members': True"):
        send(model, results={**results, 'members': [dict(rows[0], num_members=True), *rows[1:]]})
    rows[3]['top1'] = float('nan')
    with pytest.raises(ValueError, match=r"'top1': nan"):
        send(model, results=results)


@pytest.mark.parametrize('change', [
    lambda model: model.reset_classifier(7),  # as many members of the same tree, but other classes
    lambda model: model.classifier.bias.add_(0.01),  # another epoch
])
def test_results_of_other_weights(alice, model, change):
    other = broken(model, change)
    with pytest.raises(ValueError, match='weights_sha256'):
        send(other, results=results_of(model))
    assert not alice.log
    assert not list(Path().iterdir())


def with_another_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def with_another_activation(model):
    model.blocks[1][0].act = torch.nn.SiLU()
    return model


@pytest.mark.parametrize('dry_run', [False, True])
@pytest.mark.parametrize('change, message', [
    (lambda model: model.extract(3), r'model .*3 members.*nodes=\(1, 1, 1, 2, 4\)'),
    (timm.layers.freeze_batch_norm_2d, 'model .*num_batches_tracked'),
    (with_another_eps, 'model .*logits'),
    (with_another_activation, 'model .*logits'),
])
def test_a_model_that_timm_would_not_build_again(alice, model, change, message, dry_run):
    other = change(copy.deepcopy(model))
    with pytest.raises(ValueError, match=message):
        send(other, dry_run=dry_run)
    assert not alice.log
    assert not list(Path().iterdir())


def test_a_folder_stays_as_it_was_when_the_next_model_is_refused(alice, quick, model):
    send(model, dry_run=True)
    before = {path.name: path.read_bytes() for path in Path('net').iterdir()}
    with pytest.raises(ValueError, match='logits'):
        send(with_another_eps(copy.deepcopy(model)), dry_run=True)
    assert {path.name: path.read_bytes() for path in Path('net').iterdir()} == before


@pytest.mark.parametrize('change', [
    lambda model: model.extract(4),
    lambda model: model.reset_classifier(3, 'max'),
    lambda model: model.to(memory_format=torch.channels_last).train(),
    lambda model: model.set_grad_checkpointing(),
    lambda model: model.requires_grad_(False),
])
def test_models_that_timm_builds_again(alice, quick, model, change):
    other = copy.deepcopy(model)
    other = change(other) or other
    send(other, dry_run=True)
    loaded = timm.create_model('local-dir:net', pretrained=True).eval()
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded(image), other.eval()(image), rtol=0.02, atol=0.02)


@pytest.mark.parametrize('free, name', [(1000, 'model.safetensors'), (2_000_000, 'accuracy.png')])
def test_disk_full(alice, model, monkeypatch, free, name):
    """Files of more bytes than `free` cannot be written."""
    if name == 'accuracy.png':
        large = lambda rows, path: path.write_bytes(bytes(free + 1))  # noqa: E731
        monkeypatch.setattr(timm_hne.hub.folder, 'plot_accuracy', large)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match=f'net/{name}'):
            send(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not alice.log
    assert not list(Path().iterdir())


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
    with pytest.raises(TypeError, match=r'model must be .*ResNet'):
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
    with pytest.raises(OSError, match=r'alice/net|403|503'):
        send(model)
    assert len(alice.repos['alice/net'].history['main'] if 'alice/net' in alice.repos else []) <= 2
    alice.faults.clear()
    send(model)
    assert_published(alice, model)


def test_a_commit_whose_answer_is_lost(alice, model, quick):
    alice.fault('POST /api/models/alice/net/commit', 'cut')
    with pytest.raises(OSError, match='alice/net'):
        send(model)
    send(model)
    assert_published(alice, model)


def test_what_was_uploaded_is_compared(alice, model, quick):
    alice.fault('GET /cdn/', 'corrupt', times=None)
    with pytest.raises(ValueError, match='alice/net'):
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


def test_the_size_of_the_images_is_the_one_that_was_measured(alice, quick, model, run_folder):
    results = json.loads((run_folder / 'evaluation.json').read_text())
    (run_folder / 'evaluation.json').write_text(json.dumps({**results, 'input_size': [3, 48, 48]}))
    save_checkpoint(run_folder / 'last.pth.tar', model, img_size=32)
    command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net', '--dry-run')
    loaded = timm.create_model('local-dir:net', pretrained=True)
    assert loaded.pretrained_cfg['input_size'] == (3, 48, 48) and '3 x 48 x 48' in Path('net/README.md').read_text()
    assert read_results(Path('net'), loaded) is not None
    loaded.pretrained_cfg['input_size'] = (3, 32, 32)
    assert read_results(Path('net'), loaded) is None


def test_no_path_of_a_recipe_is_published(alice, quick, model, run_folder):
    (run_folder / 'r.yaml').write_text(yaml.safe_dump(dict(
        epochs=2, data_dir='/home/alice/images', initial_checkpoint='/home/alice/last.pth.tar')))
    command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net', '--dry-run', '--recipe', run_folder / 'r.yaml')
    assert yaml.safe_load(Path('net/recipe.yaml').read_text()) == dict(epochs=2)


RECIPE_OF_IMAGES = dict(
    epochs=2, in_memory=True, img_size=24, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.5)


def save_weights(run_folder, model, **recipe):
    safetensors.torch.save_file(model.state_dict(), run_folder / 'weights.safetensors')
    for name, content in recipe.items():
        (run_folder / f'{name}.yaml').write_text(yaml.safe_dump(content))
    return run_folder / 'weights.safetensors', '--model', 'hne_resnet50_c8', '--repo-id', 'alice/net', '--dry-run'


@pytest.mark.parametrize('given', [True, False])
def test_weights_alone_have_the_images_of_their_recipe(alice, quick, model, run_folder, given):
    (run_folder / 'last.pth.tar').unlink()
    arguments = save_weights(run_folder, model, **{'r' if given else 'recipe': RECIPE_OF_IMAGES})
    command(*arguments, *(('--recipe', run_folder / 'r.yaml') if given else ()))
    cfg = json.loads(Path('net/config.json').read_text())['pretrained_cfg']
    assert (cfg['mean'], cfg['std']) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert cfg['input_size'] == [3, 24, 24]
    assert cfg['crop_pct'] == 1.0  # in memory, images are seen whole
    assert yaml.safe_load(Path('net/recipe.yaml').read_text()) == RECIPE_OF_IMAGES


def test_the_base_of_a_recipe_counts(alice, quick, model, run_folder):
    arguments = save_weights(run_folder, model, base=RECIPE_OF_IMAGES, r=dict(base='base.yaml', epochs=9))
    command(*arguments, '--recipe', run_folder / 'r.yaml')
    assert yaml.safe_load(Path('net/recipe.yaml').read_text()) == {**RECIPE_OF_IMAGES, 'epochs': 9}
    assert json.loads(Path('net/config.json').read_text())['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]


def test_a_checkpoint_knows_better_than_a_recipe(alice, quick, run_folder):
    (run_folder / 'r.yaml').write_text(yaml.safe_dump(RECIPE_OF_IMAGES))
    path = run_folder / 'last.pth.tar'
    command(path, '--repo-id', 'alice/net', '--dry-run', '--recipe', run_folder / 'r.yaml')
    assert json.loads(Path('net/config.json').read_text())['pretrained_cfg']['mean'] == [0.3] * 3


def test_stale_results_beside_a_checkpoint(alice, quick, model, run_folder, capsys):
    save_checkpoint(run_folder / 'last.pth.tar', broken(model, lambda model: model.classifier.bias.add_(0.01)))
    with pytest.raises(SystemExit, match='1'):
        command(run_folder / 'last.pth.tar', '--repo-id', 'alice/net')
    assert re.search(r'weights_sha256.*timm-hne eval', capsys.readouterr().err)
    assert not alice.log


def test_results_of_version_0_1(alice, quick, whole, tmp_path, capsys):
    """They do not say which weights they are of; beside the weights, with a digest of each, they need not."""
    shutil.copytree(Path(__file__).parent / 'data/v0_1', tmp_path / 'old')
    command('old/published', '--repo-id', 'alice/net', '--dry-run')
    results = json.loads(Path('net/evaluation.json').read_text())
    weights = timm.create_model('local-dir:net', pretrained=True).state_dict()
    assert results == {**json.loads(Path('old/published/evaluation.json').read_text()),
                       'weights_sha256': state_digest(weights)}
    shutil.rmtree('net')

    with pytest.raises(SystemExit, match='1'):
        command('old/last.pth.tar', '--results', 'old/published/evaluation.json', '--repo-id', 'alice/net', '--dry-run')
    assert re.search('weights_sha256.*timm-hne eval', capsys.readouterr().err)
    (tmp_path / 'old/published/evaluation.json').write_text(json.dumps({**results, 'weights_sha256': None, 'seed': 9}))
    with pytest.raises(SystemExit, match='1'):
        command('old/published', '--repo-id', 'alice/net', '--dry-run')
    assert re.search('weights_sha256', capsys.readouterr().err)


def test_the_options_of_the_command(alice, quick, model, run_folder, capsys):
    command(
        run_folder / 'last.pth.tar', '--repo-id', 'net', '--license', 'mit', '--base-model', 'bob/other', '--datasets',
        'bob/pictures', '--commit-message', 'Hello')
    assert alice.commits('alice/net')[-1] == 'Hello'
    data = ModelCard(card_on_the_hub(alice)).data
    assert (data.license, data.base_model, data.datasets) == ('mit', 'bob/other', ['bob/pictures'])
    command(run_folder / 'last.pth.tar', '--repo-id', 'net', '--license', 'other', '--create-pr')
    assert '/discussions/1' in capsys.readouterr().out


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
    error = capsys.readouterr().err
    checkpoint, results = run_folder / 'last.pth.tar', run_folder / 'evaluation.json'
    assert f'results are missing: there is no {results}' in error
    assert f'timm-hne eval --checkpoint {checkpoint} --output {results}' in error
    assert not alice.log
