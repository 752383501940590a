"""`timm-hne predict`: the labels it prints are the model's, whatever the file."""
import argparse
import io
import itertools
import json
import os
import re
import shutil
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from pictures import load_image
from PIL import Image
from test_hub import results_of, trained_model
from timm.utils import CheckpointSaver

from timm_hne.__main__ import main
from timm_hne.cli.predict import load_images
from timm_hne.hub import write_folder
from timm_hne.models import anytime as anytime_module
from timm_hne.pretrained import read_results

NODES = (1, 1, 2, 2, 4)
LABELS = ['ant', 'bee', 'cow', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibex', 'jay']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('published') / 'net'
    model = trained_model(nodes=NODES)
    model.classifier.weight.data /= 100  # else one class is so sure that the others tie
    write_folder(model, folder, 'hf-hub:alice/net', results_of(model), dict(epochs=1), label_names=LABELS)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)).save(path)
    return path


def predict(capsys, *args):
    """Run the command; return of every image its name, the members used, and labels with percentages."""
    main(['predict', *map(str, args)])
    predictions = []
    for line in capsys.readouterr().out.splitlines():
        if found := re.fullmatch(r'(.*): (\d+) members?, \d+\.\d ms', line):
            predictions.append((found[1], int(found[2]), {}))
        else:
            percent, label = re.fullmatch(r' *(\d+\.\d)%  (.*)', line).groups()
            predictions[-1][2][label] = float(percent)
    return predictions


@pytest.mark.parametrize(('options', 'num_members'), [((), 4), (('--num-members', 1), 1), (('--num-members', 3), 3)])
@pytest.mark.parametrize('top_k', [1, 5, 100])
def test_labels_and_probabilities_are_the_models(folder, model, image, capsys, options, num_members, top_k):
    (name, used, found), = predict(capsys, image, '--model', f'local-dir:{folder}', '--top-k', top_k, *options)
    assert (name, used) == (str(image), num_members)
    with torch.no_grad():
        probabilities = model(load_image(image, model), num_members=num_members).softmax(-1)[0]
    best = probabilities.argsort(descending=True)[:top_k]
    assert list(found) == [LABELS[i] for i in best]
    assert list(found.values()) == pytest.approx([100 * probabilities[i].item() for i in best], abs=0.051)


def test_several_images_in_the_order_given(folder, image, tmp_path, capsys):
    other = tmp_path / 'other.jpg'
    Image.new('L', (8, 300), 77).save(other)
    found = predict(capsys, other, image, other, '--model', f'local-dir:{folder}')
    assert [name for name, *_ in found] == [str(other), str(image), str(other)]
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize(('budget_ms', 'num_members'), [(5, 1), (39, 1), (41, 2), (69, 2), (71, 4)])
def test_as_many_members_as_a_budget_allows(folder, image, capsys, monkeypatch, budget_ms, num_members):
    """With a clock that moves by 10 ms whenever it is looked at: before a step is chosen, when it begins and ends."""
    clock = itertools.count()
    monkeypatch.setattr(anytime_module, '_clock', lambda: next(clock) / 100)
    (_, used, _), = predict(capsys, image, '--model', f'local-dir:{folder}', '--budget-ms', budget_ms)
    assert used == num_members


def test_pictures_are_turned_upright_and_prepared_as_timm_does(model, image, tmp_path):
    picture = Image.open(image)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    assert torch.equal(load_image(image, model), transform(picture)[None])

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'turned.png', exif=exif)
    assert torch.equal(load_image(tmp_path / 'turned.png', model), load_image(image, model))

    picture.convert('RGBA').save(tmp_path / 'alpha.png')
    assert torch.equal(load_image(tmp_path / 'alpha.png', model), load_image(image, model))
    grey = timm.create_model('hne_resnet50_c8', in_chans=1, nodes=NODES, pretrained_cfg_overlay=dict(
        input_size=(1, 32, 32), mean=(0.5,), std=(0.25,)))
    assert load_image(image, grey).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(('options', 'message'), [
    (['--num-members', '5'], r'num_members .*4, got 5'),
    (['--num-members', '0'], r'num_members .*1 .*got 0'),
    (['--budget-ms', '0'], r'budget_ms .*0, got 0'),
    (['--budget-ms', 'nan'], r'budget_ms .*got nan'),
    (['--budget-ms', 'inf'], r'budget_ms .*got inf'),
    (['--budget-ms', '5', '--num-members', '1'], r'--num-members.*--budget-ms'),
    (['--top-k', '0'], r'top_k .*1, got 0'),
    (['--ray'], r'ray .*--output'),
    (['--batch-size', '8'], r'batch_size .*--output.* 8'),
    (['--model', 'resnet18'], r'model .*hierarchical ensemble.*resnet18'),
    (['--model', 'hne_mobilenetv2_075_e4'], r'hne_mobilenetv2_075_e4\.\S+ .*weights'),
])
def test_bad_arguments(folder, image, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(['predict', str(image), '--model', f'local-dir:{folder}', *options])
    assert error.value.code
    printed = capsys.readouterr()
    assert re.search(message, printed.err) and not printed.out


def test_files_that_are_no_images(folder, image, tmp_path, capsys):
    """They are named before anything is predicted."""
    (tmp_path / 'text.jpg').write_text('no image')
    (tmp_path / 'cut.png').write_bytes(image.read_bytes()[:200])
    for path in (tmp_path / 'missing.png', tmp_path / 'text.jpg', tmp_path / 'cut.png'):
        with pytest.raises(SystemExit):
            main(['predict', str(image), str(path), '--model', f'local-dir:{folder}'])
        printed = capsys.readouterr()
        assert f'image {path} cannot be read: ' in printed.err and not printed.out


def test_named_images_are_not_in_memory_all_at_once(tmp_path):
    alive = weakref.WeakSet()

    def open_image(path):
        tensor = torch.zeros(1)
        alive.add(tensor)
        return tensor

    files = [str(tmp_path / f'{i}.png') for i in range(9)]
    for file in files:
        Path(file).touch()
    for number, (path, _) in enumerate(load_images(files, SimpleNamespace(image=open_image))):
        assert path == files[number] and len(alive) <= 2


@pytest.mark.skipif(not Path('/dev/fd').exists(), reason='no /dev/fd')
def test_an_image_through_a_pipe(folder, image, capsys):
    read, write = os.pipe()
    try:
        os.write(write, image.read_bytes())  # a few kilobytes, which a pipe holds
        os.close(write)
        main(['predict', str(image), f'/dev/fd/{read}', '--model', f'local-dir:{folder}', '--top-k', '1'])
    finally:
        os.close(read)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1] == lines[3] and lines[2].startswith(f'/dev/fd/{read}: ')


def test_folders_of_images(folder, model, image, tmp_path, capsys):
    """Whatever lies in them: what cannot be read is named and passed over."""
    below = tmp_path / 'photos' / 'holiday'
    below.mkdir(parents=True)
    image.rename(below / 'b.PNG')
    Image.new('RGB', (20, 9), 'red').save(below.parent / 'z.jpeg')
    (below / 'a.jpg').write_text('no image')
    (below / 'notes.txt').write_text('no image')
    main(['predict', str(below.parent), '--model', str(folder), '--top-k', '1'])
    printed = capsys.readouterr()
    assert re.findall(r'^(\S+): 4 members', printed.out, re.M) == [str(below / 'b.PNG'), str(below.parent / 'z.jpeg')]
    assert f'image {below / "a.jpg"} cannot be read' in printed.err
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit):
        main(['predict', str(tmp_path / 'empty'), '--model', str(folder)])
    assert f'folder {tmp_path / "empty"} holds no images' in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != 'linux', reason='file names are text')
def test_file_names_that_are_no_text(folder, image, tmp_path, monkeypatch):
    shutil.copy(image, os.fsencode(tmp_path) + b'/b\xff.png')
    printed = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'strict')
    monkeypatch.setattr(sys, 'stdout', printed)
    main(['predict', str(tmp_path), '--model', str(folder), '--top-k', '1'])
    printed.flush()
    assert b'b\\xff.png: 4 members' in printed.buffer.getvalue()


@pytest.mark.parametrize('name', ['', 'last.pth.tar'])
def test_a_checkpoint_or_the_folder_of_a_run(model, image, tmp_path, capsys, name):
    """With the names of the classes, and images prepared as in training."""
    size = dict(img_size=16, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), in_memory=False, crop_pct=0.5)
    args = argparse.Namespace(model='hne_resnet50_c8', label_names=LABELS, **size)
    run = tmp_path / 'run'
    run.mkdir()
    CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), args=args, checkpoint_dir=str(run),
                    recovery_dir=str(run)).save_checkpoint(epoch=0)
    (_, used, found), = predict(capsys, image, '--model', run / name, '--top-k', 3)
    transform = timm.data.create_transform(
        (3, 16, 16), mean=size['mean'], std=size['std'], crop_pct=0.5, interpolation='bilinear')
    with torch.no_grad():
        probabilities = model(transform(Image.open(image))[None]).softmax(-1)[0]
    assert used == 4
    assert found == {
        LABELS[i]: pytest.approx(100 * probabilities[i].item(), abs=0.051)
        for i in probabilities.argsort(descending=True)[:3]}


def test_confidence_is_calibrated_and_an_unusual_image_is_named(model, image, tmp_path, capsys):
    results = results_of(model)
    for row in results['members']:
        row.update(temperature=4., usual_confidence=0.9 if row['num_members'] > 1 else 0.)
    write_folder(model, tmp_path / 'net', 'hf-hub:alice/net', results, dict(epochs=1), label_names=LABELS)
    with torch.no_grad():
        probabilities = (model(load_image(image, model)) / 4).softmax(-1)[0]
    assert probabilities.max() < 0.9
    main(['predict', str(image), '--model', str(tmp_path / 'net'), '--top-k', '1'])
    printed = capsys.readouterr()
    assert f'{probabilities.max():.1%}  {LABELS[probabilities.argmax()]}' in printed.out
    assert 'unsure: 95 % of the images that the model was evaluated on get 90.0% or more' in printed.out
    assert f'1 image may show nothing that the model knows: {", ".join(LABELS)}.' in printed.err
    main(['predict', str(image), '--model', str(tmp_path / 'net'), '--num-members', '1'])
    assert 'unsure' not in capsys.readouterr().out

    # An evaluation of other weights says nothing.
    results['weights_sha256'] = '0' * 64
    (tmp_path / 'net' / 'evaluation.json').write_text(json.dumps(results))
    main(['predict', str(image), '--model', str(tmp_path / 'net')])
    assert 'unsure' not in capsys.readouterr().out


def test_the_weights_of_the_package_know_their_confidence():
    model = timm.create_model('hne_resnet50_c8', pretrained=True)
    results = read_results('hne_resnet50_c8', model)
    assert [row['num_members'] for row in results['members']] == [*range(1, 17)]
    assert all(1 < row['temperature'] < 1.2 and 0.52 < row['usual_confidence'] < 0.56 for row in results['members'])
    measured = Path(__file__).parent.parent / 'hub_cards' / 'hne_resnet50_c8.hcd_cifar10' / 'evaluation.json'
    for row, other in zip(results['members'], json.loads(measured.read_text())['members']):
        assert row == {key: other[key] for key in row}
