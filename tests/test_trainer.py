"""The trainer: exact resumption, distributed training, and errors before any epoch."""
import argparse
import contextlib
import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from processes import free_port
from timm.models import load_state_dict
from timm.utils import load_checkpoint_metadata

from timm_hne.cli import main
from timm_hne.cli import train as cli_train
from timm_hne.cli.demo import demo_config
from timm_hne.models.ensemble import HierarchicalEnsemble
from timm_hne.models.weights import load_grown
from timm_hne.training import checkpoint, setup, trainer
from timm_hne.training.checkpoint import RunCheckpoint, load_checkpoint
from timm_hne.training.recipe import FREE_KEYS, RECIPES, TrainConfig, read_recipe
from timm_hne.training.summary import Summary
from timm_hne.training.task import HNETask
from timm_hne.training.trainer import NonFiniteLossError, train

SCRIPT = Path(__file__).parents[1] / 'train_scripts' / 'train.py'


def make_images(root: Path, classes=3, train_images=8, test_images=4, size=8) -> Path:
    """Write an image folder whose classes differ in brightness."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train_images), ('test', test_images)):
        for label in range(classes):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (size, size, 3)) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{index}.png')
    return root


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture
def options(data_dir, tmp_path, shallow):
    """Keys of a run of seconds: a tiny ensemble on tiny images."""
    return dict(
        data_dir=str(data_dir),
        val_split='test',
        in_memory=True,
        img_size=8,
        num_workers=0,
        model='hne_resnet50_c8',
        model_kwargs={'width': 2, 'nodes': [1, 1, 1, 2, 4]},
        epochs=4,
        batch_size=4,
        lr=0.01,
        device='cpu',
        progress=False,
        output_dir=str(tmp_path / 'run'),
    )


def rows(output_dir) -> list[dict[str, str]]:
    """The log of a run, without its speed."""
    with open(Path(output_dir) / 'summary.csv', newline='') as file:
        return [{k: v for k, v in row.items() if 'images_per_second' not in k} for row in csv.DictReader(file)]


def test_result_log_and_checkpoint(options):
    result = train(TrainConfig(**options))
    assert list(result.top1) == [1, 2, 4]
    assert all(0 <= value <= 100 for value in result.top1.values())
    log = rows(options['output_dir'])
    assert [row['epoch'] for row in log] == ['0', '1', '2', '3']
    assert {'train_loss', 'train_independent', 'train_hierarchical_codistillation', 'eval_top1_1', 'eval_top1_4',
            'eval_loss', 'lr'} <= set(log[0])
    assert float(log[-1]['eval_top1_4']) == result.top1[4]
    assert float(log[0]['train_loss']) == pytest.approx(
        0.5 * float(log[0]['train_independent']) + 0.5 * float(log[0]['train_hierarchical_codistillation']))
    assert result.images_per_second > 0

    # What is evaluated is what is saved, and timm reads it.
    model = timm.create_model(
        options['model'], num_classes=3, checkpoint_path=str(result.checkpoint), **options['model_kwargs']).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(images), result.model(images))


def test_it_learns(options):
    result = train(TrainConfig(**{**options, 'epochs': 12, 'lr': 0.05, 'hflip': 0., 'crop_padding': 1}))
    assert result.history[-1]['train_loss'] < result.history[0]['train_loss']
    assert result.top1[4] > 60  # chance is 33


VARIANTS = {
    'plain': {},
    'files': {'in_memory': False, 'num_workers': 1, 'scale': (0.5, 1.)},
    'everything': {
        'ema_decay': 0.9, 'mixup': 0.2, 'cutmix': 1., 'smoothing': 0.1, 'grad_accum_steps': 2, 'clip_grad': 1.,
        'amp': True, 'opt': 'adamw', 'warmup_epochs': 1., 'model_kwargs': {'width': 2, 'nodes': [1, 1, 1, 2, 4],
                                                                           'drop_rate': 0.1},
    },
    'cyclic': {'sched': 'cyclic', 'warmup_epochs': 1, 'decay_milestones': (2,)},
    'compiled': {'compile': True, 'ema_decay': 0.9, 'ema_warmup': False},
    'float16': {'amp': True, 'amp_dtype': 'float16', 'clip_grad': 1.},
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_stopped_run_continues_to_the_same_losses(options, tmp_path, monkeypatch, variant):
    options.update(VARIANTS[variant])
    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **kwargs: compile(model, backend='eager'))
    train(TrainConfig(**options))
    expected = rows(options['output_dir'])

    options['output_dir'] = str(tmp_path / 'stopped')
    add = Summary.add

    def stop_in_the_last_epoch(summary, epoch, *args):
        if epoch == 3:
            raise KeyboardInterrupt
        add(summary, epoch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Summary, 'add', stop_in_the_last_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**options))
    torch.rand(17)  # resumption must not depend on the state of the process
    np.random.rand(3)
    result = train(TrainConfig(**options, resume=True))
    assert [row['epoch'] for row in result.history] == [3]
    assert rows(options['output_dir']) == expected


def test_killed_at_any_moment(options, tmp_path, whole):
    options['epochs'] = 8
    train(TrainConfig(**options))
    expected = rows(options['output_dir'])

    options['output_dir'] = str(tmp_path / 'killed')
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(options))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), '--recipe', str(recipe), '--no-progress'],
        env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())},
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / 'killed').glob('checkpoint-*'))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = train(TrainConfig(**options, resume=True))
    assert 0 < len(result.history) < 8
    assert rows(options['output_dir']) == expected


def test_killed_while_the_first_checkpoint_is_written(options):
    """What is there under a temporary name is no checkpoint, whole or not."""
    expected = train(TrainConfig(**{**options, 'epochs': 1})).history
    folder = Path(options['output_dir'])
    whole = (folder / 'last.pth.tar').read_bytes()
    for content in (whole, whole[:-100]):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / 'tmp.pth.tar').write_bytes(content)
        result = train(TrainConfig(**{**options, 'epochs': 1}, resume=True))
        assert without_speed(result.history) == without_speed(expected)
        assert result.checkpoint.is_file() and not (folder / 'tmp.pth.tar').exists()


def without_speed(history):
    return [{key: value for key, value in row.items() if 'per_second' not in key} for row in history]


def test_broken_weights_are_not_saved(options, monkeypatch):
    """The last update of an epoch is followed by no loss that could tell."""
    options['epochs'] = 3
    update_ema = HNETask.update_ema

    def break_them(task, *args, step):
        if step == 12:  # the sixth update of the second epoch, its last
            next(task.get_trainable_module().parameters()).data.fill_(math.inf)
        update_ema(task, *args, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(HNETask, 'update_ema', break_them)
        with pytest.raises(NonFiniteLossError, match=r'weight .*epoch 2.*checkpoint'):
            train(TrainConfig(**options))
    assert [row['epoch'] for row in train(TrainConfig(**options, resume=True)).history] == [1, 2]


def test_a_run_that_is_older_than_a_key_goes_on(options):
    train(TrainConfig(**{**options, 'epochs': 1}))
    for path in Path(options['output_dir']).glob('*.pth.tar'):
        checkpoint = torch.load(path, weights_only=False)
        vars(checkpoint['args']).pop('pretrained', None)
        torch.save(checkpoint, path)
    assert not train(TrainConfig(**{**options, 'epochs': 1}, resume=True)).history


@pytest.mark.parametrize('kinds', [(tuple, list), (list, tuple)])
@pytest.mark.parametrize('phased', [False, True])
def test_nodes_are_the_same_as_a_tuple_and_as_a_list(options, kinds, phased):
    """A program writes a tuple, YAML and JSON read a list."""
    for resume, kind in enumerate(kinds):
        keys = {'model_kwargs': {'width': 2, 'nodes': kind((1, 1, 1, 2, 4))}}
        keys = {'phases': [{'epochs': 1, **keys}]} if phased else {'epochs': 1, **keys}
        history = train(TrainConfig(**{**options, 'epochs': 200, **keys, 'resume': bool(resume)})).history
        assert len(history) == 1 - resume


def test_other_classes_under_the_same_numbers(options, tmp_path):
    train(TrainConfig(**{**options, 'epochs': 1}))
    other = make_images(tmp_path / 'other')
    for split in ('train', 'test'):
        for path in (other / split).iterdir():
            path.rename(path.with_name(path.name.replace('class', 'kind')))
    with pytest.raises(ValueError, match=r'class0, .*kind0'):
        train(TrainConfig(**{**options, 'epochs': 1, 'data_dir': str(other)}, resume=True))


@pytest.mark.parametrize(('values', 'message'), [
    ({'in_memory': True}, r'in_memory .* false .* True\.$'),
    ({'unreadable': 'error'}, 'unreadable .*skip .*error'),
    ({'num_workers': 0}, r'num_workers .* at least 1.* 0\.$'),
    ({'num_workers': 3}, 'num_workers'),
    ({'phases': [{'epochs': 1, 'num_workers': 0}]}, r'num_workers .* at least 1.* 0\.$'),
    ({'phases': [{'epochs': 1}, {'epochs': 1, 'batch_size': 4}], 'epochs': 2}, r'batch_size .* 8 in all phases.* 4\.$'),
])
def test_streams(options, values, message, monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        """Two workers get 16 images each; of three, the first two get 8, the third nothing."""

        transform = None

        def __len__(self):
            return 32

        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            for index in range(16 if worker.num_workers < 3 else 8 if worker.id < 2 else 0):
                yield self.transform(Image.new('RGB', (8, 8))), index % 3

    monkeypatch.setattr(setup, 'create_datasets', lambda *args, **kwargs: (Stream(), Stream(), None))
    options.update(in_memory=False, unreadable='skip', num_workers=2, batch_size=8, num_classes=3, epochs=1)
    assert train(TrainConfig(**options)).history
    options['output_dir'] += '2'
    with pytest.raises((ValueError, RuntimeError), match=message):
        train(TrainConfig(**{**options, **values}))


def test_the_length_of_a_stream_is_that_of_one_process():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 8

        def __iter__(self):
            raise NotImplementedError

    config = TrainConfig(batch_size=8, model_kwargs={'width': 2})
    setup.check_phases(config, 3, Stream(), world_size=4)
    with pytest.raises(ValueError, match=r'batch_size 8 .* 4 process.* 8 training images'):
        setup.check_phases(config, 3, range(8), world_size=4)


def test_starting_from_published_weights(options, whole):
    options.update(
        model_kwargs={'nodes': [1, 1, 1, 2, 4]}, pretrained=True, epochs=1, lr=0., warmup_lr=0., max_train_images=8)
    model = train(TrainConfig(**options)).model
    assert model.num_classes == 3
    published = timm.create_model('hne_resnet50_c8', pretrained=True).extract(4)
    for block, expected in zip(model.blocks, published.blocks):
        for weight, other in zip(block.parameters(), expected.parameters()):
            assert torch.equal(weight, other)


def test_checkpoints_know_the_names_of_the_classes(options):
    train(TrainConfig(**{**options, 'epochs': 1}))
    _, config = load_checkpoint(Path(options['output_dir'], 'last.pth.tar'))
    assert config['label_names'] == ['class0', 'class1', 'class2']


@pytest.mark.parametrize('damage', ['cut', 'empty', 'middle'])
def test_a_checkpoint_cut_short_is_passed_over(options, caplog, damage):
    options['epochs'] = 3
    train(TrainConfig(**options))
    expected = rows(options['output_dir'])
    last = Path(options['output_dir'], 'last.pth.tar')
    content = bytearray(last.read_bytes())
    if damage == 'middle':
        content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    last.write_bytes(content[:{'cut': len(content) - 100, 'empty': 0}.get(damage)])  # checkpoint-2 is the same file
    result = train(TrainConfig(**options, resume=True))
    assert 'cannot be read' in caplog.text
    assert [row['epoch'] for row in result.history] == [2]
    assert rows(options['output_dir']) == expected



def resume_after(options, damage, epochs=3) -> list[str]:
    """Train for some epochs, damage the log, continue for one more; return the epochs that the log then has."""
    train(TrainConfig(**{**options, 'epochs': epochs, 'sched': 'constant'}))
    newest = Path(options['output_dir'], f'checkpoint-{epochs - 1}.pth.tar')
    for path in (newest, newest.with_name('last.pth.tar')):
        path.unlink()
    damage(newest.with_name('summary.csv'))
    train(TrainConfig(**{**options, 'epochs': epochs, 'sched': 'constant'}, resume=True))
    return [row['epoch'] for row in rows(options['output_dir'])]


def edit_lines(edit):
    return lambda path: path.write_text(''.join(edit(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(('damage', 'left', 'lost'), [
    (Path.unlink, '2', '0, 1'),
    (lambda path: path.write_bytes(b''), '2', '0, 1'),
    (edit_lines(lambda lines: [lines[0], *lines[2:]]), '12', '0'),
    (edit_lines(lambda lines: [lines[0], lines[1].rstrip('\n'), *lines[2:]]), '2', '0, 1'),
    (edit_lines(lambda lines: [*lines[:2], lines[2][:20]]), '02', '1'),
    (edit_lines(lambda lines: lines[1:]), '2', '0, 1'),
    (lambda path: path.write_bytes(bytes(range(256)) * 3), '2', '0, 1'),
])
def test_rows_that_the_log_has_lost_are_named(options, caplog, damage, left, lost):
    kept = []

    def damage_and_keep(path):
        damage(path)
        kept.append(path.exists() and path.read_bytes())

    assert resume_after(options, damage_and_keep) == [*left]
    assert [record for record in caplog.records if f'epochs: {lost}.' in record.message]
    copy = Path(options['output_dir'], 'summary.csv.damaged')
    assert not copy.exists() or copy.read_bytes() == kept[0]


def test_a_log_that_is_whole_says_nothing(options, caplog):
    assert resume_after(options, lambda path: None) == ['0', '1', '2']
    assert 'summary.csv' not in caplog.text


def test_a_damaged_log_does_not_take_the_place_of_an_earlier_one(options):
    Path(options['output_dir']).mkdir()
    Path(options['output_dir'], 'summary.csv.damaged').write_text('earlier')
    resume_after(options, edit_lines(lambda lines: lines[1:]), epochs=2)
    copies = [path.read_text() for path in Path(options['output_dir']).glob('summary.csv.damaged*')]
    assert len(copies) == 2 and 'earlier' in copies


def test_two_runs_do_not_share_a_folder(options, monkeypatch):
    monkeypatch.setattr(trainer, 'LOCK_PATIENCE', 0.1)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *(f'--{key.replace("_", "-")}={value}' for key, value in {
            **{name: options[name] for name in ('data_dir', 'val_split', 'output_dir', 'device')},
            'img_size': 8, 'num_workers': 0, 'epochs': 10000, 'batch_size': 4, 'model_kwargs': '{width: 2}',
        }.items()), '--in-memory', '--no-progress'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        log = Path(options['output_dir'], 'summary.csv')
        while not log.exists():
            assert process.poll() is None
            time.sleep(0.05)
        for resume in (False, True):
            with pytest.raises(FileExistsError, match=f'output_dir {options["output_dir"]}'):
                train(TrainConfig(**options, resume=resume))
    finally:
        process.kill()
        process.wait()
    with pytest.raises(FileExistsError, match='resume'):  # the lock is gone with the process, the run is there
        train(TrainConfig(**options))


def test_a_changed_bit_is_no_checkpoint_to_go_on_from(options, caplog):
    options['epochs'] = 2
    train(TrainConfig(**options))
    path = Path(options['output_dir'], 'last.pth.tar')  # checkpoint-1 is a link to the same file
    with zipfile.ZipFile(path) as file:
        largest = file.read(max(file.infolist(), key=lambda entry: entry.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(content)
    assert [row['epoch'] for row in train(TrainConfig(**options, resume=True)).history] == [1]
    assert 'last.pth.tar' in caplog.text and 'checkpoint-1.pth.tar' in caplog.text


def test_no_changed_bit_gives_other_weights(tmp_path):
    """Nor another error: all bits of the parts of the file that no check sum covers, one of each byte of the others."""
    path, expected = tmp_path / 'a.pth', {'weight': torch.arange(3.)}
    torch.save({'arch': 'a', 'epoch': 1, 'state_dict': expected}, path)
    content = path.read_bytes()
    directory = content.index(b'PK\x01\x02')
    for position in range(len(content)):
        for bit in range(8) if position >= directory else [position % 8]:
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                checkpoint = RunCheckpoint.read(path)
                weights = checkpoint.weights()
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert (checkpoint.arch, checkpoint.epoch) == ('a', 1)
                assert torch.equal(weights['weight'], expected['weight']), (position, bit)


def test_disk_full(options, monkeypatch):
    """As PyTorch reports it; the checkpoints before stay whole."""
    options['epochs'] = 3
    real, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) > 2:
            Path(path).write_bytes(b'half')
            raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0')
        real(state, path)

    monkeypatch.setattr(torch, 'save', save)
    with pytest.raises(OSError, match=r'last\.pth\.tar .*epoch 3 .*MB') as caught:
        train(TrainConfig(**options))
    assert 'enforce' not in str(caught.value)
    assert RunCheckpoint.read(Path(options['output_dir'], 'last.pth.tar')).epoch == 1
    assert not [path for path in Path(options['output_dir']).iterdir() if 'tmp' in path.name]
    monkeypatch.setattr(torch, 'save', real)
    assert [row['epoch'] for row in train(TrainConfig(**options, resume=True)).history] == [2]


def test_images_in_memory_are_evaluated_whole_later_too(options, tmp_path):
    """The model's own crop_pct is 0.875 and was saved, which `timm-hne eval` then applied."""
    options.update(
        model='hne_mobilenetv2_075_e4', model_kwargs={'nodes': [1, 1, 1, 2]}, img_size=32, epochs=1, max_train_images=4)
    result = train(TrainConfig(**options))
    assert RunCheckpoint.read(result.checkpoint).data_config['crop_pct'] == 1
    output = tmp_path / 'evaluation.json'
    main(['eval', '--checkpoint', str(result.checkpoint), '--data-dir', options['data_dir'], '--split', 'test',
          '--workers', '0', '--output', str(output)])
    measured = {row['num_members']: row for row in json.loads(output.read_text())['members']}
    # Memory and file differ in how they resize, by less than a grey value.
    assert measured[2]['nll'] == pytest.approx(result.history[0]['eval_loss'], rel=1e-2)


def test_an_interrupted_checkpoint_leaves_no_file(options, monkeypatch):
    def interrupted(state, path):
        Path(path).write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**options))
    assert not list(Path(options['output_dir']).glob('*.pth.tar'))


def test_tensorboard_log_if_it_is_installed(options, monkeypatch):
    written = {}

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            assert (log_dir, purge_step) == (options['output_dir'], 0)

        def add_scalar(self, name, value, step):
            written[name, step] = value

        def flush(self):
            pass

        def close(self):
            written['closed'] = True

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', SimpleNamespace(SummaryWriter=SummaryWriter))
    options['epochs'] = 2
    result = train(TrainConfig(**options))
    assert written['eval/top1_4', 1] == result.top1[4]
    assert written['train/loss', 0] == result.history[0]['train_loss']
    assert written['closed']


def test_a_finished_run_can_be_continued(options):
    options['epochs'] = 1
    first = train(TrainConfig(**options))
    again = train(TrainConfig(**options, resume=True))
    assert again.top1 == first.top1 and not again.history


def test_a_folder_with_a_run_is_not_overwritten(options):
    options['epochs'] = 1
    train(TrainConfig(**options))
    with pytest.raises(FileExistsError, match='resume'):
        train(TrainConfig(**options))


def test_non_finite_loss_stops_with_its_circumstances(options):
    options.update(epochs=2, batch_size=8, objective='independent+hierarchical', log_interval=1)
    real = trainer.HNETask.forward
    calls = []

    def forward(task, images, target):
        output = real(task, images, target)
        calls.append(1)
        if len(calls) == 5:
            output['hierarchical'] = output['hierarchical'] * math.nan
            output['loss'] = output['loss'] * math.nan
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.HNETask, 'forward', forward)
        with pytest.raises(
                NonFiniteLossError,
                match=r'epoch 2, step 4 .*0\.00.*loss = nan, hierarchical = nan.*checkpoint',
        ):
            train(TrainConfig(**options))
    kept = load_checkpoint_metadata(str(Path(options['output_dir'], 'last.pth.tar')))
    assert kept['epoch'] == 0
    assert all(value.isfinite().all() for value in kept['state_dict'].values())


def test_non_finite_loss_without_a_checkpoint(options):
    options.update(opt='momentum', lr=1e30, warmup_epochs=0., sched='constant')
    with pytest.raises(NonFiniteLossError) as caught:
        train(TrainConfig(**options))
    assert 'checkpoint' not in str(caught.value) and not list(Path(options['output_dir']).glob('*.pth.tar'))


class TestErrorsBeforeAnyEpoch:
    @pytest.fixture(autouse=True)
    def no_epoch(self, monkeypatch):
        def fail(seed, epoch, rank):
            pytest.fail('an epoch has started')

        monkeypatch.setattr(trainer, 'seed_epoch', fail)

    def test_missing_data(self, options, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'data_dir .*nowhere'):
            train(TrainConfig(**{**options, 'data_dir': str(tmp_path / 'nowhere')}))
        with pytest.raises(ValueError, match=r'data_dir .*None'):
            train(TrainConfig(**{**options, 'data_dir': None}))

    def test_missing_split(self, options):
        with pytest.raises(FileNotFoundError, match=r"'validation'.*'test', 'train'"):
            train(TrainConfig(**{**options, 'val_split': 'validation'}))

    def test_wrong_class_count(self, options):
        with pytest.raises(ValueError, match=r'10 .*num_classes.* 3'):
            train(TrainConfig(**options, num_classes=10))

    @pytest.mark.parametrize('split', ['train', 'test'])
    def test_empty_class_folder(self, options, tmp_path, split):
        root = make_images(tmp_path / 'images', train_images=1, test_images=1)
        (root / split / 'class1' / '0.png').unlink()
        with pytest.raises(ValueError, match=f'{split} .*class1'):
            train(TrainConfig(**{**options, 'data_dir': str(root)}))

    def test_images_of_another_data_set(self, options):
        del options['img_size']
        with pytest.raises(ValueError, match=r'8x8.*32x32'):
            train(TrainConfig(**options))

    def test_another_model_than_the_checkpoint(self, options, tmp_path, monkeypatch):
        monkeypatch.undo()
        options['epochs'] = 1
        checkpoint = train(TrainConfig(**options)).checkpoint
        for kwargs in ({'width': 4, 'nodes': [1, 1, 1, 2, 4]}, {'width': 2, 'nodes': [1, 1, 1, 3, 3]}):
            with pytest.raises(ValueError, match='model_kwargs'):
                train(TrainConfig(**{**options, 'resume': True, 'model_kwargs': kwargs}))
            with pytest.raises(ValueError, match=r'initial_checkpoint .*nodes'):
                train(TrainConfig(**{
                    **options, 'output_dir': str(tmp_path / 'other'), 'initial_checkpoint': str(checkpoint),
                    'model_kwargs': kwargs}))
        junk = tmp_path / 'junk.pth'
        for content in (b'no checkpoint', b''):
            junk.write_bytes(content)
            with pytest.raises(ValueError, match=r'initial_checkpoint .*junk\.pth'):
                RunCheckpoint.read(junk, 'initial_checkpoint').load_into(torch.nn.Linear(1, 1))
        torch.save({'weight': 'text'}, junk)
        with pytest.raises(ValueError, match=r'initial_checkpoint .*junk\.pth'):
            RunCheckpoint.read(junk, 'initial_checkpoint').load_into(torch.nn.Linear(1, 1))
        with pytest.raises(FileNotFoundError, match=r'initial_checkpoint .*nothing'):
            train(TrainConfig(**{**options, 'output_dir': str(tmp_path / 'other'), 'initial_checkpoint': 'nothing'}))

    def test_non_hne_model(self, options):
        options.update(model='resnet18', model_kwargs={})
        with pytest.raises(TypeError, match=r"'hierarchical_codistillation' .*'resnet18'"):
            train(TrainConfig(**options))

    def test_batch_larger_than_the_data(self, options):
        with pytest.raises(ValueError, match=r'batch_size 64 .*24'):
            train(TrainConfig(**{**options, 'batch_size': 64}))

    def test_unreadable_image(self, options, tmp_path):
        root = make_images(tmp_path / 'images', train_images=2, test_images=2)
        (root / 'train' / 'class1' / '0.png').write_bytes(b'no image')
        with pytest.raises(OSError, match=r'class1/0\.png'):
            train(TrainConfig(**{**options, 'data_dir': str(root)}))


@pytest.mark.parametrize('in_memory', [True, False])
def test_unreadable_images_are_skipped_by_choice(options, tmp_path, caplog, in_memory):
    root = make_images(tmp_path / 'images')
    for name in ('train/class1/0.png', 'test/class0/1.png', 'test/class2/0.png'):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:len(content) // 2])
    options.update(data_dir=str(root), unreadable='skip', epochs=1, in_memory=in_memory, num_workers=1)
    result = train(TrainConfig(**options))
    assert '1 unreadable training images skipped so far: ' in caplog.text and 'class1/0.png' in caplog.text
    assert '2 unreadable validation images skipped so far: ' in caplog.text and 'class2/0.png' in caplog.text
    with pytest.raises(ValueError, match=r'batch_size 24 .*can be read'):
        train(TrainConfig(**{**options, 'batch_size': 24, 'in_memory': True, 'output_dir': str(tmp_path / 'other')}))
    # Accuracy is over the ten images that can be read.
    assert result.top1[4] == pytest.approx(round(result.top1[4] / 10) * 10)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is CUDA')
def test_a_device_that_is_not_there(options):
    with pytest.raises(ValueError, match=r"device .*'cuda'.*no CUDA"):
        train(TrainConfig(**{**options, 'device': 'cuda'}))


def test_what_is_free_is_free_in_a_phase_too(options):
    phase = {'epochs': 1, 'num_workers': 0}
    run = {**options, 'epochs': 200, 'phases': [phase]}
    train(TrainConfig(**run))
    assert train(TrainConfig(**{**run, 'phases': [{**phase, 'log_interval': 1}], 'resume': True})).history == []


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(options, monkeypatch):
    train(TrainConfig(**{**options, 'epochs': 2}))

    def refuse(path, mode='r', *args, **kwargs):
        if str(path).endswith('checkpoint-1.pth.tar'):
            raise PermissionError(13, 'Permission denied', str(path))
        return open(path, mode, *args, **kwargs)

    monkeypatch.setattr(checkpoint, 'open', refuse, raising=False)
    with pytest.raises(PermissionError, match='checkpoint-1'):
        train(TrainConfig(**{**options, 'epochs': 2, 'resume': True}))


def test_unknown_key_names_the_nearest(options):
    with pytest.raises(ValueError, match=r"'epoch'.*'epochs'"):
        TrainConfig.from_dict({'epoch': 3})
    with pytest.raises(ValueError, match=r"'weight-decay'.*'weight_decay'"):
        TrainConfig.from_dict({'weight-decay': 3})


@pytest.mark.parametrize(('values', 'error', 'message'), [
    ({'epochs': 0}, ValueError, 'epochs .* 0'),
    ({'epochs': '3'}, TypeError, "epochs .*int.*'3'"),
    ({'epochs': True}, TypeError, 'epochs .*int.*True'),
    ({'lr': 'fast'}, TypeError, "lr .*float.*'fast'"),
    ({'mean': 0.5}, TypeError, 'mean .*tuple.*0.5'),
    ({'amp': 1}, TypeError, 'amp .*bool.*1'),
    ({'objective': 'best'}, ValueError, "objective .*independent.*'best'"),
    ({'sched': 'plateau'}, ValueError, "sched .*cosine, multistep, constant, cyclic.*'plateau'"),
    ({'sched': 'cyclic', 'warmup_epochs': 0.5}, ValueError, "warmup_epochs .*whole .*'cyclic'.*0.5"),
    ({'unreadable': 'ignore'}, ValueError, "unreadable .*error, skip.*'ignore'"),
    ({'val_fraction': 1.}, ValueError, 'val_fraction .*1.0'),
    ({'mixup': 0.2, 'batch_size': 3}, ValueError, 'batch_size .*3'),
    ({'max_train_images': -5}, ValueError, 'max_train_images .*1.*-5'),
    ({'max_train_images': 0}, ValueError, 'max_train_images .*1.* 0'),
    ({'img_size': 0}, ValueError, 'img_size .*1.* 0'),
    ({'in_chans': 2}, ValueError, 'in_chans .*1 .*3.*2'),
    ({'crop_padding': -1}, ValueError, 'crop_padding .*0.*-1'),
    ({'hflip': 1.5}, ValueError, 'hflip .*1.5'),
    ({'scale': (0., 1.)}, ValueError, r'scale .*0\.0'),
    ({'scale': (0.5,)}, ValueError, r'scale .*\(0.5,\)'),
    ({'scale': (0.9, 0.1)}, ValueError, r'scale .*\(0.9, 0.1\)'),
    ({'std': (0.2, 0., 0.2)}, ValueError, 'std .*0.0'),
    ({'mean': (0.2, math.nan, 0.2)}, ValueError, 'mean .*nan'),
    ({'lr': math.nan}, ValueError, 'lr .*nan'),
    ({'lr': math.inf}, ValueError, 'lr .*inf'),
    ({'weight_decay': -1.}, ValueError, 'weight_decay .*-1.0'),
    ({'clip_grad': 0.}, ValueError, 'clip_grad .*0.0'),
    ({'mean': ()}, ValueError, r'mean .*\(\)'),
    ({'seed': 2 ** 32}, ValueError, r'seed .*2\*\*32.*4294967296'),
    ({'lr': 10 ** 400}, TypeError, 'lr .*float'),
    ({'decay_milestones': (60, 30)}, ValueError, r'decay_milestones .*\(60, 30\)'),
    ({'decay_milestones': (-1, 30)}, ValueError, r'decay_milestones .*\(-1, 30\)'),
    ({'phases': ({'epochs': 1, 'model_kwargs': [1]},)}, TypeError, r'model_kwargs .*dict.*\[1\]'),
    ({'model_kwargs': {'num_classes': 3}}, ValueError, 'model_kwargs .*num_classes'),
    ({'model_kwargs': {'in_chans': 1}}, ValueError, 'model_kwargs .*in_chans'),
    ({'model_kwargs': {'pretrained': True}}, ValueError, 'model_kwargs .*pretrained'),
    ({'pretrained': True, 'initial_checkpoint': 'a.pth'}, ValueError, "pretrained .*initial_checkpoint.*'a.pth'"),
])
def test_bad_values_are_named(values, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**values)


def test_values_as_yaml_reads_them():
    config = TrainConfig(**yaml.safe_load('{weight_decay: 1e-5, lr: 1, mean: [0.5, 1, 0], max_train_images: null}'))
    assert (config.weight_decay, config.lr, config.mean) == (1e-5, 1., (0.5, 1., 0.))
    assert isinstance(config.lr, float) and config.max_train_images is None


WORKER = '''
import sys, torch, yaml
from timm_hne.models.ensemble import HierarchicalEnsemble
from timm_hne.models.weights import load_grown
from timm_hne.training.trainer import TrainConfig, train
HierarchicalEnsemble.train = lambda model, mode=True: torch.nn.Module.train(model, False)
train(TrainConfig(**yaml.safe_load(sys.argv[1])))
'''


def test_two_processes_give_the_gradients_of_one_with_the_joint_batch(options, whole, tmp_path, monkeypatch):
    """Two updates of plain SGD, whose weights are gradients. BatchNorm is in evaluation mode."""
    options.update(epochs=1, max_train_images=16, opt='momentum', momentum=0., weight_decay=0., sched='constant')
    port = free_port()
    joint = {**options, 'batch_size': 4, 'output_dir': str(tmp_path / 'joint')}
    environment = {
        **os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'OMP_NUM_THREADS': '1'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, yaml.safe_dump(joint)],
            env={**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=150) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()

    monkeypatch.setattr(HierarchicalEnsemble, 'train', lambda model, mode=True: torch.nn.Module.train(model, False))
    result = train(TrainConfig(**{**options, 'batch_size': 8}))
    weights = load_state_dict(str(tmp_path / 'joint' / 'last.pth.tar'))
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    log, joint_log = rows(options['output_dir'])[0], rows(tmp_path / 'joint')[0]
    assert float(joint_log['train_loss']) == pytest.approx(float(log['train_loss']), rel=1e-5)
    assert [float(joint_log[f'eval_top1_{n}']) for n in (1, 2, 4)] == [
        float(log[f'eval_top1_{n}']) for n in (1, 2, 4)]


def read_arguments(*arguments):
    """Return the configuration that `timm-hne train` makes of its arguments."""
    parser = argparse.ArgumentParser()
    cli_train.add_arguments(parser)
    return cli_train.read_config(parser.parse_args(arguments))


def test_options_that_phases_overrule_are_named(caplog):
    config = read_arguments('--recipe', 'cifar10_grow.yaml', '--objective', 'hierarchical', '--seed', '1')
    assert config.split()[0][1].objective == 'independent'
    assert len(caplog.records) == 1 and 'objective ' in caplog.text and 'phase 1, 2' in caplog.text


def test_arguments_of_the_model_add_to_those_of_the_recipe():
    config = read_arguments('--recipe', 'cifar10_from_timm.yaml', '--model-kwargs', 'drop_path_rate=0.1')
    recipe = read_arguments('--recipe', 'cifar10_from_timm.yaml').model_kwargs
    assert recipe and config.model_kwargs == {**recipe, 'drop_path_rate': 0.1}


def test_there_are_recipes():
    assert {'cifar10.yaml', 'digits.yaml', 'imagenet.yaml'} <= {path.name for path in RECIPES.glob('*.yaml')}


@pytest.mark.parametrize('path', sorted(RECIPES.glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes_are_valid(path):
    rates = []
    for _, config in read_arguments('--recipe', path.name).split():
        model = timm.create_model(
            config.model, num_classes=config.num_classes, in_chans=config.in_chans, device='meta',
            **config.model_kwargs)
        task = trainer.HNETask(
            model, objective=config.objective, alpha=config.alpha, temperature=config.temperature, verbose=False)
        optimizer = setup.create_optimizer(task.get_trainable_module(), config)
        scheduler = trainer.create_scheduler(optimizer, config, updates_per_epoch=10)
        for epoch in range(config.epochs):
            scheduler.step(epoch)
            for update in range(10 * epoch, 10 * epoch + 10):
                scheduler.step_update(update)
                rates.append(optimizer.param_groups[0]['lr'])
        assert max(rates[-10 * config.epochs:]) <= config.lr * (1 + 1e-9)
    assert rates[-1] < 0.01 * max(rates)  # of the last update, however few epochs the last phase has


def test_the_demo_trains_by_the_recipe_of_the_digits(tmp_path):
    recipe, demo = (
        {name: value for name, value in asdict(config).items() if name not in FREE_KEYS}
        for config in (read_arguments('--recipe', 'digits.yaml'), demo_config(tmp_path)))
    # The recipe says what the data set tells the demo.
    assert recipe == {**demo, 'num_classes': 10}


def test_options_override_the_recipe(tmp_path):
    (tmp_path / 'base.yaml').write_text('{epochs: 7, lr: 0.2, amp: true}')
    (tmp_path / 'mine.yaml').write_text('{base: base.yaml, lr: 0.3, model_kwargs: {nodes: [1, 1, 1, 2, 2]}}')
    config = read_arguments(
        '--recipe', str(tmp_path / 'mine.yaml'), '--no-amp', '--alpha', '0.25', '--weight-decay', '1e-5', '--mean',
        '[0.1, 0.2, 0.3]', '--data-dir', 'data')
    assert (config.epochs, config.lr, config.amp, config.alpha, config.weight_decay) == (7, 0.3, False, 0.25, 1e-5)
    assert config.model_kwargs == {'nodes': [1, 1, 1, 2, 2]}
    assert (config.mean, config.data_dir) == ((0.1, 0.2, 0.3), 'data')


def test_unknown_recipe_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"'cifar'.*cifar10\.yaml, .*imagenet\.yaml"):
        read_arguments('--recipe', 'cifar')


def test_text_options_are_taken_literally():
    assert read_arguments('--data-dir', '2024').data_dir == '2024'


def test_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        main(['train', '--weigth-decay=1'])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "'--weigth-decay=1'" in error and "'--weight-decay'" in error


def test_bad_yaml(tmp_path, capsys):
    with pytest.raises(SystemExit):
        read_arguments('--mean', '[0.1')
    assert "argument --mean: '[0.1' is not YAML" in capsys.readouterr().err
    for data in (b'{epochs: [', b'model: \xff', b'lr: 2024-13-45'):
        (tmp_path / 'bad.yaml').write_bytes(data)
        with pytest.raises(ValueError, match=r'bad\.yaml .*YAML'):
            read_recipe(str(tmp_path / 'bad.yaml'))
    (tmp_path / 'bad.yaml').write_text('base: 0')
    with pytest.raises(TypeError, match=r'base .*bad\.yaml .* 0'):
        read_recipe(str(tmp_path / 'bad.yaml'))


def test_a_base_is_the_recipe_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / 'cifar10.yaml').write_text('lr: 99')
    expected = read_recipe('cifar100.yaml')
    monkeypatch.chdir(tmp_path)
    assert read_recipe('cifar10.yaml') == {'lr': 99}
    assert read_recipe('cifar100.yaml') == expected


def test_a_recipe_must_not_be_its_own_base(tmp_path):
    (tmp_path / 'a.yaml').write_text('base: b.yaml')
    (tmp_path / 'b.yaml').write_text('base: a.yaml')
    with pytest.raises(ValueError, match=r'a\.yaml -> b\.yaml -> a\.yaml'):
        read_recipe(str(tmp_path / 'a.yaml'))


@pytest.mark.parametrize('error', [
    NonFiniteLossError('the loss\nis not finite'), ImportError('no package'), OSError('no file'), ValueError('bad'),
    TypeError('bad'),
])
def test_command_ends_with_one_line(monkeypatch, capsys, error):
    def fail(config, keep_memory):
        raise error

    monkeypatch.setattr(cli_train, 'train', fail)
    with pytest.raises(SystemExit) as caught:
        main(['train'])
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'timm-hne train: {" ".join(str(error).split())}')


class TestPhases:
    PHASES = (
        {'epochs': 2, 'model_kwargs': {'nodes': [1, 1, 1, 1, 1]}, 'objective': 'independent'},
        {'epochs': 3, 'model_kwargs': {'nodes': [1, 1, 1, 2, 4]}, 'lr': 0.02, 'img_size': 16, 'grow_noise': 0.1},
    )

    @pytest.fixture
    def phased(self, options):
        return {**options, 'model_kwargs': {'width': 2}, 'phases': self.PHASES, 'epochs': 5, 'ema_decay': 0.5}

    def test_each_starts_where_the_one_before_has_ended(self, phased, monkeypatch):
        starts = []

        def create(*args):
            model, config = setup.create_trained_model(*args)
            starts.append((args[2], copy.deepcopy(model.state_dict())))
            return model, config

        monkeypatch.setattr(trainer, 'create_trained_model', create)
        result = train(TrainConfig(**phased))
        log = rows(phased['output_dir'])
        assert result.model.nodes == (1, 1, 1, 2, 4)
        assert [row['epoch'] for row in log] == ['0', '1', '2', '3', '4'] and log[1]['eval_top1_4'] == ''
        assert max(float(row['lr']) for row in log[2:]) == pytest.approx(0.02, rel=0.3)

        alone = TrainConfig(**phased).split()[0][1]
        first = train(replace(alone, output_dir=phased['output_dir'] + '1'))
        for row, same in zip(rows(phased['output_dir'] + '1'), log):
            assert row['train_loss'] == same['train_loss'] and row['lr'] == same['lr']
        grown = timm.create_model('hne_resnet50_c8', width=2, nodes=(1, 1, 1, 2, 4), num_classes=3)
        load_grown(grown, first.model.state_dict(), noise=0.1)
        passed_on, start = starts[1]
        for name, value in first.model.state_dict().items():
            assert torch.equal(passed_on[name], value)
        for name, value in grown.state_dict().items():
            assert torch.equal(start[name], value)

    def test_images_of_another_size_than_a_later_phase_takes_are_found_at_once(self, phased):
        phased['phases'] = ({**self.PHASES[0], 'img_size': 16}, self.PHASES[0])
        del phased['img_size'], phased['epochs']
        with pytest.raises(ValueError, match='images are 8x8, the model takes 32x32'):
            train(TrainConfig(**phased))
        assert not Path(phased['output_dir'], 'summary.csv').exists()

    @pytest.mark.parametrize('stop', [1, 2, 4])
    def test_a_stopped_run_continues_in_its_phase(self, phased, stop, monkeypatch):
        whole = train(TrainConfig(**phased))
        options = {**phased, 'output_dir': phased['output_dir'] + 'stopped', 'resume': True}
        seed_epoch = trainer.seed_epoch

        def interrupted(seed, epoch, rank):
            if epoch == stop:
                raise KeyboardInterrupt
            seed_epoch(seed, epoch, rank)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, 'seed_epoch', interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(TrainConfig(**options))
        result = train(TrainConfig(**options))
        assert [row['epoch'] for row in result.history] == list(range(stop, 5))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, result.model.state_dict()[name]), name
        assert [row['train_loss'] for row in rows(options['output_dir'])] == [
            row['train_loss'] for row in rows(phased['output_dir'])]

    def test_checkpoints_know_their_phase(self, phased):
        checkpoint = RunCheckpoint.read(train(TrainConfig(**phased)).checkpoint)
        assert checkpoint.is_finished and checkpoint.create_model().nodes == (1, 1, 1, 2, 4)
        assert checkpoint.data_config['img_size'] == 16 and checkpoint.config['objective'] == TrainConfig().objective
        first = RunCheckpoint.read(checkpoint.path.with_name('checkpoint-1.pth.tar'))
        assert not first.is_finished and first.create_model().nodes == (1, 1, 1, 1, 1)
        assert first.data_config['img_size'] == 8 and first.config['objective'] == 'independent'
        assert first.recipe == checkpoint.recipe and first.config['epochs'] == 2
        # The recipe is that of the whole run, and trains it again.
        recipe = checkpoint.recipe
        assert [start for start, _ in TrainConfig.from_dict(recipe).split()] == [0, 2]
        for phase, keys in zip(recipe['phases'], self.PHASES):
            assert phase == keys
        assert (recipe['lr'], recipe['img_size'], recipe['epochs']) == (0.01, 8, 5)

    def test_another_recipe_does_not_continue_it(self, phased):
        train(TrainConfig(**phased))
        for phases in (self.PHASES[:1], ({**self.PHASES[0], 'lr': 1e-3}, self.PHASES[1])):
            with pytest.raises(ValueError, match='cannot be continued, it differs: phases'):
                train(TrainConfig(**{**phased, 'phases': phases, 'epochs': 200, 'resume': True}))

    @pytest.mark.parametrize('epochs', [1, 2])
    def test_what_is_to_come_may_be_planned_anew(self, phased, epochs, monkeypatch):
        """More phases, or a sooner end of one whose rate is constant: the run is the one that was so planned."""
        first, second = ({**phase, 'sched': sched} for phase, sched in zip(self.PHASES, ('constant', 'cosine')))
        phases = [{**first, 'epochs': 1}, second]
        phased = {**phased, 'epochs': 200}
        planned = train(TrainConfig(**{**phased, 'phases': phases}))
        options = {**phased, 'output_dir': phased['output_dir'] + 'anew', 'resume': True}
        seed_epoch = trainer.seed_epoch

        def interrupted(seed, epoch, rank):
            if epoch == 1:
                raise KeyboardInterrupt
            seed_epoch(seed, epoch, rank)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(trainer, 'seed_epoch', interrupted)
            train(TrainConfig(**{**options, 'phases': [{**first, 'epochs': epochs}]}))
        result = train(TrainConfig(**{**options, 'phases': phases}))
        assert [row['epoch'] for row in result.history] == [1, 2, 3]
        for name, value in planned.model.state_dict().items():
            assert torch.equal(value, result.model.state_dict()[name]), name
        for wrong in ([first, second], [phases[0], {**second, 'epochs': 4}]):  # a cosine is another from its start
            with pytest.raises(ValueError, match='phases'):
                train(TrainConfig(**{**options, 'phases': wrong}))

    def test_a_run_that_is_ended_sooner_is_finished(self, phased):
        first = {**self.PHASES[0], 'sched': 'constant'}
        whole = {**phased, 'phases': [first], 'epochs': 200, 'best_members': 1}
        last = train(TrainConfig(**whole)).checkpoint
        shutil.copy(last.with_name('checkpoint-0.pth.tar'), last)
        last.with_name('checkpoint-1.pth.tar').unlink()
        last.with_name('model_best.pth.tar').unlink()
        weights = RunCheckpoint.read(last).weights()
        assert not RunCheckpoint.read(last).is_finished
        train(TrainConfig(**{**whole, 'phases': [{**first, 'epochs': 1}], 'resume': True}))
        checkpoint = RunCheckpoint.read(last)
        assert checkpoint.is_finished and (checkpoint.epoch, checkpoint.recipe['epochs']) == (0, 1)
        assert RunCheckpoint.read(last.with_name('model_best.pth.tar')).recipe == checkpoint.recipe
        for name, value in checkpoint.weights().items():
            assert torch.equal(value, weights[name])

    @pytest.mark.parametrize('phases, words', [
        ([{'lr': 1.}], r'epochs.*phase 1.*lr'),
        ([{'epochs': 1}, {'epochs': 1, 'model': 'hne_resnet50_c16'}], r'model.*phase 2'),
        ([{'epochs': 1, 'phases': []}], r'phases'),
        ([{'epochs': 0}], r'epochs .*0'),
        ([{'epochs': 1, 'learning_rate': 1.}], r"'learning_rate'"),
    ])
    def test_what_phases_cannot_be(self, phases, words):
        with pytest.raises(ValueError, match=words):
            TrainConfig(phases=phases)

    def test_their_epochs_are_those_of_the_run(self):
        assert TrainConfig(phases=[{'epochs': 2}, {'epochs': 3}]).epochs == 5
        with pytest.raises(ValueError, match=r'epochs .*5.*7'):
            TrainConfig(phases=[{'epochs': 2}, {'epochs': 3}], epochs=7)
        with pytest.raises(TypeError, match='phases'):
            TrainConfig(phases=['epochs'])

    def test_a_later_batch_larger_than_the_data(self, phased):
        phases = [self.PHASES[0], {**self.PHASES[1], 'batch_size': 16, 'grad_accum_steps': 2}]
        with pytest.raises(ValueError, match=r'batch_size 16 \* grad_accum_steps 2 .*24'):
            train(TrainConfig(**{**phased, 'phases': phases}))
        assert not list(Path(phased['output_dir']).glob('*.pth.tar'))

    def test_a_tree_that_cannot_grow_out_of_the_one_before(self, phased):
        phases = [{'epochs': 1, 'model_kwargs': {'nodes': nodes}} for nodes in ([1, 1, 1, 3, 3], [1, 1, 1, 2, 4])]
        with pytest.raises(ValueError, match=r'\(1, 1, 1, 3, 3\).*\(1, 1, 1, 2, 4\)'):
            train(TrainConfig(**{**phased, 'phases': phases, 'epochs': 200}))
