import argparse
import gc
import hashlib
import itertools
import json
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from pictures import load_image
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_loader
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from timm_hne.__main__ import main
from timm_hne.cli import evaluate as command
from timm_hne.evaluation.cost import member_macs
from timm_hne.evaluation.evaluate import evaluate, to_markdown
from timm_hne.models.hne_resnet import HNEResNet
from timm_hne.pretrained import DigestError, digest, state_digest
from timm_hne.training.checkpoint import RunCheckpoint, load_checkpoint
from timm_hne.training.datasets import create_datasets
from timm_hne.training.recipe import TrainConfig

NAME = 'hne_resnet50_c8'
NODES = (1, 1, 2, 2, 4)
OLD = Path(__file__).parent / 'data' / 'v0_1'
CLASSES = 6
KEYS = [
    'model', 'nodes', 'weights_sha256', 'data', 'split', 'input_size', 'num_images', 'objective', 'alpha', 'epochs',
    'seed', 'recipe', 'members', 'member_top1',
]

pytestmark = pytest.mark.usefixtures('shallow_module')


def create(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{'nodes': NODES, 'num_classes': CLASSES, 'zero_init_last': False, **kwargs})
    # The running statistics and the size of the logits of a model that was trained a little.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.2)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope='module')
def model():
    return create()


@pytest.fixture(scope='module')
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(22, 3, 8, 8, generator=generator)
    target = torch.randint(CLASSES, (22,), generator=generator)
    return list(zip(images.split(8), target.split(8)))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder with a training and a test split of `CLASSES` classes."""
    root = tmp_path_factory.mktemp('data') / 'Blobs'
    rng = np.random.default_rng(0)
    for split, count in (('train', 1), ('test', 4)):
        for label in range(CLASSES):
            path = root / split / f'class{label}'
            path.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / f'{i}.png')
    return root


def save(folder, model, arch=NAME, ema=None, **args):
    """Save a checkpoint as timm's train.py does."""
    args = argparse.Namespace(model=arch, **args)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), args=args, model_ema=ema,
                            checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(epoch=4)
    return folder / 'last.pth.tar'


def test_one_pass_gives_what_n_passes_give(model, batches, monkeypatch):
    calls = []
    forward_members = type(model).forward_members
    monkeypatch.setattr(type(model), 'forward_members', lambda self, x, n: calls.append(len(x)) or
                        forward_members(self, x, n))
    result = evaluate(model, batches)
    assert calls == [8, 8, 6]
    images, target = (torch.cat(parts) for parts in zip(*batches))
    macs = member_macs(model, (8, 8))
    with torch.no_grad():
        members = forward_members(model, images)
        for n, row in enumerate(result['members'], start=1):
            logits = model(images, num_members=n)
            assert row['num_members'] == n
            assert row['macs'] == macs[n]
            assert row['top1'] == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())
            assert row['nll'] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
            assert row['logit_std'] == pytest.approx(members[:, :n].std(1, correction=0).mean().item(), rel=1e-5)
    assert len(result['members']) == 4
    assert result['member_top1'] == pytest.approx((members.argmax(2) == target[:, None]).double().mean(0).mul(100))
    assert {key: result[key] for key in ('model', 'nodes', 'num_images')} == dict(
        model=NAME, nodes=list(NODES), num_images=22)


def test_all_members_are_evaluated_whatever_the_default(model, batches):
    other = create(num_members=1)
    assert evaluate(other, batches) == evaluate(model, batches)


def test_model_is_evaluated_in_evaluation_mode_and_left_as_it_was(model, batches):
    other = create()
    other.train()
    next(module for module in other.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    modes = [module.training for module in other.modules()]
    before = {name: value.clone() for name, value in other.state_dict().items()}
    assert evaluate(other, batches) == evaluate(model, batches)
    assert other.training and [module.training for module in other.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_mixed_precision(model, batches):
    exact = evaluate(model, batches)
    mixed = evaluate(model, batches, amp_dtype=torch.bfloat16)
    for row, expected in zip(mixed['members'], exact['members']):
        assert row['nll'] == pytest.approx(expected['nll'], rel=0.05)
        assert row['nll'] != expected['nll']


def test_evaluate_bad_input(model, batches):
    with pytest.raises(TypeError, match=r'model .*Flatten'):
        evaluate(torch.nn.Flatten(), batches)
    with pytest.raises(ValueError, match='no images'):
        evaluate(model, [])
    with pytest.raises(ValueError, match=f'{CLASSES}.* {CLASSES} classes'):
        evaluate(model, [(batches[0][0], torch.full((8,), CLASSES))])


def test_checkpoint_tells_nodes_classes_and_channels(tmp_path):
    model = create(in_chans=1, nodes=(2, 2, 4, 8, 8), num_classes=3)
    path = save(tmp_path, model, hne_objective='independent', seed=7)
    loaded, config = load_checkpoint(path)
    assert (loaded.nodes, loaded.num_classes, loaded.in_chans) == ((2, 2, 4, 8, 8), 3, 1)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert (config['epochs'], config['hne_objective'], config['seed']) == (5, 'independent', 7)


def test_other_model_arguments_come_from_the_checkpoint(tmp_path):
    model = create(width=4, global_pool='catavgmax')
    loaded, _ = load_checkpoint(save(tmp_path, model, model_kwargs={'width': 4}, gp='catavgmax'))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(x), model(x))


def test_pooling_among_the_model_arguments(tmp_path):
    """timm's option --gp is another place for it, and may say nothing."""
    model = create(global_pool='max')
    x = torch.randn(2, 3, 8, 8)
    for gp in ({}, {'gp': None}):
        loaded, _ = load_checkpoint(save(tmp_path, model, model_kwargs={'global_pool': 'max'}, **gp))
        assert torch.equal(loaded.eval()(x), model(x))


def test_a_checkpoint_of_version_0_1(whole):
    """Its logits were written down by that version."""
    checkpoint = RunCheckpoint.read(OLD / 'last.pth.tar')
    expected = json.loads((OLD / 'logits.json').read_text())
    assert checkpoint.is_finished and checkpoint.recipe['epochs'] == 3 and checkpoint.recipe['dataset'] == 'digits'
    assert checkpoint.data_config == {
        'img_size': 8, 'crop_pct': 1., 'crop_mode': 'center', 'interpolation': 'bilinear',
        'mean': (0.3,), 'std': (0.35,),
    }
    model, images = checkpoint.create_model().eval(), torch.tensor(expected['images'])
    with torch.no_grad():
        torch.testing.assert_close(model.forward_members(images), torch.tensor(expected['checkpoint']))


@pytest.mark.parametrize('place', [0.2, 0.5, 0.8])
def test_a_changed_bit_is_found(tmp_path, model, place):
    path = save(tmp_path, model)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint(path)


def test_averaged_weights_are_preferred(tmp_path, model):
    path = save(tmp_path, create(seed=3), ema=model)
    loaded, _ = load_checkpoint(path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_plain_weights(tmp_path, model, suffix):
    path = tmp_path / f'weights.{suffix}'
    (save_file if suffix == 'safetensors' else torch.save)(model.state_dict(), path)
    loaded, config = load_checkpoint(path, NAME)
    assert loaded.nodes == NODES and config == {}
    with pytest.raises(ValueError, match=f'{path.name} .*model'):
        load_checkpoint(path)


def test_weights_beside_their_digest_are_compared_with_it(tmp_path, model):
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    (tmp_path / 'SHA256SUMS').write_text(f'{digest(path.read_bytes())}  model.safetensors\n')
    assert load_checkpoint(path, NAME)[0].nodes == NODES
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, path)
    with pytest.raises(DigestError, match='SHA-256'):
        load_checkpoint(path, NAME)


@pytest.mark.parametrize('name', ['hne_resnet50_c16', 'hne_mobilenetv2_075_e4', 'resnet18'])
def test_checkpoint_of_another_model(tmp_path, model, name):
    path = save(tmp_path, model)
    with pytest.raises(ValueError, match=f'{path} .*{name}') as caught:
        load_checkpoint(path, name)
    assert len(str(caught.value)) < 600


def test_small_checkpoint_given_as_the_large_model(tmp_path, model):
    path = save(tmp_path, model)
    with pytest.raises(ValueError, match=r'hne_resnet50_c16.*blocks\.0.*hne_resnet50_c8'):
        load_checkpoint(path, 'hne_resnet50_c16')
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r'hne_resnet50_c16.*blocks\.0'):
        load_checkpoint(path, 'hne_resnet50_c16')


def test_model_that_timm_has_not_built(batches):
    assert evaluate(HNEResNet(nodes=NODES, num_classes=CLASSES), batches)['model'] == 'HNEResNet'


def test_checkpoint_that_cannot_be_read(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        load_checkpoint(tmp_path / 'none.pth')
    path = save(tmp_path, model)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint(path)
    for name, content in itertools.product(('some.pth', 'some.safetensors'), (b'', b'no checkpoint', bytes(1000))):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f'checkpoint {path}'):
            load_checkpoint(path)


def test_command_line(tmp_path, folder, model, capsys):
    path = save(tmp_path, model, hne_objective='codistillation', hne_alpha=0.25, seed=3, img_size=8)
    output = tmp_path / 'results' / 'run.json'
    main(['eval', '--checkpoint', str(path), '--data-dir', str(folder), '--split', 'test', '--batch-size', '5',
          '--workers', '0', '--device', 'cpu', '--output', str(output)])
    result = json.loads(output.read_text())
    assert list(result) == KEYS
    expected = dict(model=NAME, nodes=list(NODES), data='blobs', split='test', num_images=4 * CLASSES,
                    objective='codistillation', alpha=0.25, epochs=5, seed=3)
    assert {key: result[key] for key in expected} == expected
    assert result['weights_sha256'] == state_digest(model.state_dict())

    files = sorted((folder / 'test').glob('*/*.png'))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ('mean', 'std'))
    target = torch.arange(CLASSES).repeat_interleave(4)
    by_hand = evaluate(model, [((pixels - mean) / std, target)])
    for row, reference in zip(result['members'], by_hand['members']):
        assert row == pytest.approx(reference, rel=1e-4)
    assert result['member_top1'] == pytest.approx(by_hand['member_top1'])

    assert sorted(path.name for path in output.parent.iterdir()) == ['run.json', 'run.md']
    markdown = output.with_suffix('.md').read_text()
    assert capsys.readouterr().out == markdown == to_markdown(result)
    assert f'| 4 | {result["members"][3]["macs"]:,} | {result["members"][3]["top1"]:.2f} |' in markdown


def test_data_can_be_named(tmp_path, folder, model):
    output = tmp_path / 'run.json'
    main(['eval', '--checkpoint', str(save(tmp_path, model)), '--data-dir', str(folder), '--split', 'test',
          '--img-size', '8', '--workers', '0', '--data-name', 'cifar10', '--output', str(output)])
    assert json.loads(output.read_text())['data'] == 'cifar10'


def test_training_arguments_of_the_images_are_used(tmp_path, folder, model, monkeypatch):
    path = save(tmp_path, model, img_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    seen = []
    monkeypatch.setattr(command, 'evaluate', lambda model, loader, *args, **kwargs: seen.extend(loader) or
                        evaluate(model, seen))
    main(['eval', '--checkpoint', str(path), '--data-dir', str(folder), '--split', 'test', '--workers', '0'])
    images = torch.cat([images for images, _ in seen])
    assert images.shape == (4 * CLASSES, 3, 16, 16)
    darkest = -torch.tensor([0.1, 0.2, 0.3]) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(images.amin(dim=(0, 2, 3)), darkest, atol=0.05, rtol=0)


def test_digits(tmp_path):
    model = create(in_chans=1, num_classes=10)
    path = save(tmp_path, model, mean=(0.5,), std=(0.5,), img_size=8, objective='independent', alpha=0.5)
    output = tmp_path / 'digits.json'
    main(['eval', '--checkpoint', str(path), '--dataset', 'digits', '--workers', '0', '--output', str(output)])
    result = json.loads(output.read_text())
    assert (result['data'], result['num_images'], result['objective'], result['alpha']) == (
        'digits', 360, 'independent', None)


def test_data_are_those_of_the_checkpoint(tmp_path, folder, model):
    trained = dict(dataset='', data_dir=str(folder), val_split='test', img_size=8)
    path, output = save(tmp_path, model, **trained), tmp_path / 'run.json'

    def measure(*arguments):
        main(['eval', '--checkpoint', str(path), '--workers', '0', '--output', str(output), *arguments])
        result = json.loads(output.read_text())
        return result['data'], result['split'], result['num_images']

    assert measure() == ('blobs', 'test', 4 * CLASSES)
    assert measure('--split', 'train') == ('blobs', 'train', CLASSES)
    with pytest.raises(SystemExit):
        measure('--dataset', 'digits')  # grey
    path = save(tmp_path, create(in_chans=1, num_classes=10), mean=(0.5,), std=(0.5,), img_size=8, dataset='digits')
    assert measure() == ('digits', 'validation', 360)


def test_what_was_held_out_is_evaluated(tmp_path, folder, model, monkeypatch):
    """The images of `val_fraction`, which no split holds."""
    trained = asdict(TrainConfig(data_dir=str(folder), train_split='test', val_fraction=0.25, seed=3))
    del trained['model']
    *_, held_out, _ = create_datasets('', str(folder), 'test', '', 0.25, seed=3)
    expected = sorted(held_out.filename(i) for i in range(len(held_out)))
    assert len(expected) == CLASSES
    seen = []
    monkeypatch.setattr(command, 'create_loader', lambda dataset, *args, **kwargs: seen.append(dataset) or
                        create_loader(dataset, *args, **kwargs))
    path, output = save(tmp_path, model, **trained), tmp_path / 'run.json'
    main(['eval', '--checkpoint', str(path), '--img-size', '8', '--workers', '0', '--output', str(output)])
    assert sorted(seen[0].filename(i) for i in range(len(seen[0]))) == expected
    result = json.loads(output.read_text())
    assert (result['split'], result['num_images']) == ('test, held out 0.25', CLASSES)


@pytest.mark.parametrize('arguments, message', [
    (['--data-dir', '{tmp}/none'], 'data_dir does not exist: .*none'),
    ([], 'data_dir must be the folder'),
    (['--data-dir', '{tmp}/empty'], 'holds no images'),
    (['--data-dir', '{folder}'], r"has no folder for the split 'validation', only \['test', 'train'\]"),
    (['--data-dir', '{tmp}/two'], r'model has 6 classes, .* has 2: cat, dog'),
    (['--data-dir', '{folder}', '--split', 'test', '--batch-size', '0'], 'batch_size must be positive, got 0'),
    (['--data-dir', '{folder}', '--split', 'test', '--output', 'run.txt'], r'output must end in \.json'),
    (['--data-dir', '{folder}', '--split', 'test', '--img-size', '0'], r'img_size .* 0'),
    (['--data-dir', '{folder}', '--split', 'test', '--img-size', '8', '8', '8'], r'img_size .*\[8, 8, 8\]'),
    (['--dataset', 'digits'], 'digits are grey'),
    (['--dataset', 'torch/cifar10'], "data_dir must be the folder of dataset 'torch/cifar10', got None"),
    (['--dataset', 'cifar10', '--data-dir', '{folder}'], "such as torch/cifar10, got 'cifar10'"),
    (['resnet18', '--data-dir', '{folder}'], 'is not one of resnet18: model must be a hierarchical ensemble'),
])
def test_command_line_bad_input(tmp_path, folder, model, arguments, message, capsys):
    path = save(tmp_path, model)
    (tmp_path / 'empty').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'two' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'two' / name / '0.png')
    arguments = [argument.format(tmp=tmp_path, folder=folder) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        main(['eval', *arguments, '--checkpoint', str(path), '--workers', '0'])
    assert caught.value.code == 1
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors


@pytest.mark.parametrize('workers', [0, 1])
def test_unreadable_image_is_named(tmp_path, folder, model, capsys, monkeypatch, workers):
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)  # else 5 s until the worker is gone
    path = save(tmp_path, model)
    for label in range(CLASSES):
        (tmp_path / 'data' / f'class{label}').mkdir(parents=True)
        (tmp_path / 'data' / f'class{label}' / 'broken.png').write_bytes(b'no image')
    with pytest.raises(SystemExit):
        main(['eval', '--checkpoint', str(path), '--data-dir', str(tmp_path / 'data'), '--workers', str(workers)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('timm-hne eval: ') and 'class0/broken.png' in message
    gc.collect()


def test_16_bit_images_are_seen_as_predict_sees_them(tmp_path, monkeypatch):
    model = create(in_chans=1, num_classes=2)
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / 'data' / name / '0.png')
    path = save(tmp_path, model, mean=(0.5,), std=(0.25,), img_size=8)
    seen = []
    monkeypatch.setattr(command, 'evaluate', lambda model, loader, *args, **kwargs: seen.extend(loader) or
                        evaluate(model, seen))
    main(['eval', '--checkpoint', str(path), '--data-dir', str(tmp_path / 'data'), '--workers', '0'])
    model.pretrained_cfg.update(mean=(0.5,), std=(0.25,), input_size=(1, 8, 8))
    assert torch.equal(seen[0][0][:1], load_image(tmp_path / 'data' / 'a' / '0.png', model))


def test_hub_model(tmp_path, hub, folder, model):
    save_for_hf(model, tmp_path / 'repo', model_args={'nodes': NODES}, safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / 'repo').iterdir()}
    digests = ''.join(f'{hashlib.sha256(data).hexdigest()}  {name}\n' for name, data in files.items())
    hub.add('alice/net', {**files, 'SHA256SUMS': digests.encode()})
    checkpoint = save(tmp_path, model)
    results = []
    for number, source in enumerate((['hf-hub:alice/net'], ['--checkpoint', str(checkpoint)])):
        output = tmp_path / f'{number}.json'
        main(['eval', *source, '--data-dir', str(folder), '--split', 'test', '--img-size', '8', '--workers', '0',
              '--output', str(output)])
        results.append(json.loads(output.read_text()))
    assert results[1]['recipe'] == {'model': NAME, 'epochs': 5}
    assert results[0] == {**results[1], 'epochs': None, 'recipe': {}}


def test_a_model_of_timm_is_refused_before_anything_is_fetched(capsys, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: pytest.fail('the model was created'))
    with pytest.raises(SystemExit):
        main(['eval', 'resnet18', '--dataset', 'digits'])
    assert "model must be a hierarchical ensemble, such as ['hne_" in capsys.readouterr().err


def test_without_model_and_checkpoint(capsys):
    with pytest.raises(SystemExit):
        main(['eval', '--dataset', 'digits'])
    assert 'model or --checkpoint must be given' in capsys.readouterr().err


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--help'])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(__file__).parents[1] / 'train_scripts' / 'evaluate.py'), run_name='__main__')
    assert caught.value.code == 0
    assert '--checkpoint' in capsys.readouterr().out
