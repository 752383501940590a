"""The scripts of benchmarks/ run, in small, and count as they say."""
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_hne
from timm_hne.evaluation.evaluate import evaluate


@pytest.fixture
def script(monkeypatch):
    """Import a script and call its `main` with options."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks')

    def call(name, *options, **replaced):
        module = importlib.import_module(name)
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, options)])
        module.main()

    return call


@pytest.fixture
def folder(tmp_path):
    """Ten classes of 6 images of 40x32 noise, for training and for a test."""
    generator = np.random.default_rng(0)
    for split in 'train', 'test':
        for label in range(10):
            (tmp_path / split / f'c{label}').mkdir(parents=True)
            for index in range(6):
                pixels = generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / f'c{label}' / f'{index}.png')
    return tmp_path


def images_of(folder, split):
    """Return the images as packaged weights of CIFAR-10 take them, and their classes."""
    cfg = timm.get_pretrained_cfg('hne_resnet50_c8')
    images = [np.asarray(Image.open(path))[4:36] for path in sorted((folder / split).glob('*/*.png'))]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value)[:, None, None] for value in (cfg.mean, cfg.std))
    return (pixels - mean) / std, torch.arange(10).repeat_interleave(6)


def test_subject_is_prepared_as_for_evaluation(script, folder):
    from common import load_images, load_subject

    class Arguments:
        checkpoint, data_dir, split, model = None, folder, 'test', 'hne_resnet50_c8'

    model, images, classes = load_subject(Arguments)
    expected, labels = images_of(folder, 'test')
    assert not model.training
    torch.testing.assert_close(images, expected)
    assert torch.equal(classes, labels)
    some, their = load_images(Arguments, model, 'train', 7)
    expected, labels = images_of(folder, 'train')
    found = [next(i for i, one in enumerate(expected) if torch.allclose(one, image)) for image in some]
    assert len(set(found)) == 7 and torch.equal(labels[found], their)


def test_early_exit(script, folder, tmp_path):
    script('early_exit', '--data-dir', folder, '--output', tmp_path / 'out')
    table = (tmp_path / 'out' / 'early_exit.md').read_text()
    assert table.startswith('hne_resnet50_c8: ') and 'on 30 images' in table
    assert re.findall(r'n = (\d+) for all', table) == ['1', '2', '4', '8', '16']
    assert (tmp_path / 'out' / 'early_exit.png').stat().st_size


@pytest.mark.parametrize('size', [5, 60])
def test_int8_counts_as_evaluation_does(script, folder, tmp_path, size):
    """Without an engine of 8 bits: what stands in for it computes in float32, so all rows are those of the model."""
    calibrated = []

    def quantize(model, images, engine):
        calibrated.append(len(images))
        return timm_hne.optimize_for_inference(model)

    script('int8', '--data-dir', folder, '--output', tmp_path / 'out', '--calibration-images', size, quantize=quantize)
    results = json.loads((tmp_path / 'out' / 'int8.json').read_text())
    model = timm.create_model('hne_resnet50_c8', pretrained=True)
    expected = {row['num_members']: row for row in evaluate(model, [images_of(folder, 'test')])['members']}
    assert calibrated == [size] * 2 and len(results) == 3
    for rows in results.values():
        assert list(rows) == ['1', '2', '4', '8', '16']
        for n, row in rows.items():
            assert row['top1'] == pytest.approx(expected[int(n)]['top1'], abs=1e-6)
            assert row['logit_std'] == pytest.approx(expected[int(n)]['logit_std'], rel=1e-4)


def test_load_weights(script, tmp_path):
    script('load_weights', '--models', 'hne_resnet50_c8', '--repeats', 1, '--output', tmp_path)
    assert json.loads((tmp_path / 'load_weights.json').read_text())['models']['hne_resnet50_c8']['ratio'] > 0


def test_another_engine_is_measured_anew(script, tmp_path, capsys):
    asked = []

    def measure(base, engine, batch_sizes, repeats):
        for size in batch_sizes:
            asked.append((engine, size))
            yield [{'base': base, 'batch_size': size, 'n': 1, 'engine': engine, 'macs': 1e9, 'tree_ms': 1.,
                    'separate_ms': 1., 'base_ms': 1., 'compiled_ms': 1.}]

    for engine in 'a', 'a', 'b':
        script('from_timm', '--bases', 'resnet18', '--engine', engine, '--output', tmp_path, measure=measure)
    assert asked == [('a', 1), ('a', 32), ('b', 1), ('b', 32)]
    assert {row['engine'] for row in json.loads((tmp_path / 'from_timm.json').read_text())['rows']} == {'b'}


def test_a_batch_that_cores_cannot_share(script, monkeypatch, capsys):
    monkeypatch.setattr('os.cpu_count', lambda: 6)
    with pytest.raises(SystemExit):
        script('train_processes', '--batch-size', 64)
    assert '6 cores, got 64' in capsys.readouterr().err
