"""docs/publishing.md followed to the letter, and the cards of the published tags held against their data."""
import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from test_hub import results_of, trained_model

import timm_hne.pretrained
from timm_hne.__main__ import main
from timm_hne.cli.demo import demo_config
from timm_hne.pretrained import digest

ROOT = Path(__file__).parent.parent

spec = importlib.util.spec_from_file_location('render', ROOT / 'hub_cards/render.py')
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)


def test_the_steps_of_the_document(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_alice')
    monkeypatch.chdir(tmp_path)
    model = trained_model(in_chans=1)
    args = argparse.Namespace(**asdict(replace(demo_config(tmp_path), epochs=1)))
    torch.save(dict(arch=args.model, args=args, epoch=0, state_dict=model.state_dict()), 'last.pth.tar')

    text = (ROOT / 'docs/publishing.md').read_text().replace('USER', 'alice').replace('CHECKPOINT', 'last.pth.tar')
    blocks = re.findall(r'```(bash|python)\n(.*?)```', text, re.DOTALL)
    assert [language for language, _ in blocks] == ['bash', 'bash', 'bash', 'bash', 'python', 'python']
    for language, block in blocks[:-1]:
        if language == 'python':
            exec(block, {})
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            if command == 'timm-hne':
                main(arguments)
            else:
                subprocess.run(line, shell=True, check=True, capture_output=True)

    assert 'Published and verified' in capsys.readouterr().out
    assert hub.commits('alice/my-hne') == ['initial commit', 'Publish my-hne']
    assert hub.commits('alice/my-hne-2') == ['initial commit', 'Publish my-hne-2']
    assert hub.repos['alice/my-hne-2'].private
    config = json.loads(hub.files('alice/my-hne')['config.json'])
    assert config['pretrained_cfg']['input_size'] == [1, 16, 16]
    assert config['pretrained_cfg']['mean'] == [0.3]
    files = '|'.join(re.findall(r'`([\w.]+\.\w+|SHA256SUMS)`', text.split('| file |')[1].split('```')[0]))
    for name in set(hub.files('alice/my-hne')) - {'.gitattributes'}:
        assert re.fullmatch(files, name), f'{name} is not in the table of docs/publishing.md'

    # A user's process: nothing of this project is imported, everything comes from the environment.
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HUB_CACHE': str(tmp_path / 'other'), 'OMP_NUM_THREADS': '1'}
    env.pop('HF_TOKEN')
    code = blocks[-1][1] + 'print(model.ensemble_size, one.ensemble_size, model.classifier.bias.sum().item())'
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ['16', '1', str(model.classifier.bias.half().float().sum().item())], done.stderr


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A tag with packaged weights, and its folder of results."""
    name = 'hne_resnet50_c8.test'
    model = trained_model()
    weights = tmp_path / 'weights'
    weights.mkdir()
    monkeypatch.setattr(timm_hne.pretrained, 'PACKAGED', weights)
    data = safetensors.torch.save(model.half().state_dict())
    (weights / f'{name}.safetensors').write_bytes(data)
    (weights / 'SHA256SUMS').write_text(f'{digest(data)}  {name}.safetensors\n')
    cfg = timm.models.get_pretrained_cfg('hne_resnet50_c8')
    cfg.file, cfg.tag = timm_hne.pretrained.packaged(name), 'test'
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, name, cfg)
    folder = tmp_path / 'hub_cards' / name
    folder.mkdir(parents=True)
    (folder / 'evaluation.json').write_text(json.dumps(results_of(model)))
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(dict(epochs=2)))
    return folder


def test_cards_follow_their_data(card, capsys):
    render.main([], card.parent)
    assert capsys.readouterr().out == 'hne_resnet50_c8.test: rendered\n'
    assert {path.name for path in card.iterdir()} == {'README.md', 'accuracy.png', 'evaluation.json', 'recipe.yaml'}
    assert "timm.create_model('hne_resnet50_c8.test', pretrained=True)" in (card / 'README.md').read_text()
    render.main(['--check'], card.parent)
    results = json.loads((card / 'evaluation.json').read_text())
    results['members'][0]['top1'] = 12.34
    (card / 'evaluation.json').write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r'README\.md'):
        render.main(['--check'], card.parent)
    render.main([], card.parent)
    assert '12.34' in (card / 'README.md').read_text()


@pytest.mark.parametrize('name', timm.list_pretrained('hne_*') or [None])
def test_every_published_tag_has_its_card(name):
    if name is None:
        pytest.skip('no tag has weights yet')
    render.render(ROOT / 'hub_cards' / name, check=True)
