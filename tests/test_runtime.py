"""The exported folder, run without PyTorch, against the model."""
import collections
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from test_early_exit import reference_exit, undecided
from test_inference import images
from tiny import tiny_ensemble

import timm_hne
from timm_hne import runtime
from timm_hne.__main__ import main
from timm_hne.evaluation.cost import member_macs
from timm_hne.inference import CRITERIA, LatencyTable, exit_scores, export_folder
from timm_hne.inference.early_exit import ExitPoint
from timm_hne.serving import ExportedEnsemble

NODES = (1, 2, 4)


@pytest.fixture(scope='module')
def model():
    return undecided(images(24), NODES)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported') / 'folder'
    export_folder(model, folder, (3, 8, 8), data_config={'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.6, 0.7)})
    return folder


@pytest.fixture
def network(folder):
    return runtime.load(folder, threads=1)


def assert_like(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('batch_size, height, width', [(1, 8, 8), (5, 8, 8), (2, 13, 16)])
def test_every_number_of_members(network, model, batch_size, height, width):
    x = torch.randn(batch_size, 3, height, width)
    for n in range(1, 5):
        assert_like(network.predict(x.numpy(), num_members=n), model(x, num_members=n))
    assert_like(network.predict(x.double().numpy()), model(x))
    for n, logits in zip((1, 2, 4), network.anytime(x.numpy()), strict=True):
        assert_like(logits, model(x, num_members=n))


def test_what_the_folder_holds(folder, network, model):
    manifest = json.loads((folder / 'manifest.json').read_text())
    assert manifest['nodes'] == [1, 2, 4] and manifest['num_classes'] == network.num_classes == 5
    assert manifest['image'] == {
        'channels': 3, 'height': 8, 'width': 8, 'any_size': True, 'mean': [0.1, 0.2, 0.3], 'std': [0.5, 0.6, 0.7]}
    assert manifest['macs'] == {str(n): count for n, count in member_macs(model, 8).items()}
    assert network.schedule == (1, 2, 4)
    names = ['manifest.json', 'step_0_1.onnx', 'step_1_2.onnx', 'step_2_4.onnx', 'weights.bin']
    assert sorted(path.name for path in folder.iterdir()) == names == sorted([*manifest['files'], 'manifest.json'])


def test_weights_are_stored_once(tmp_path):
    model = tiny_ensemble((1, 2, 4), channels=32)
    export_folder(model, tmp_path / 'folder', (3, 8, 8), schedule=(2, 4))
    expected = 4 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    stored = (tmp_path / 'folder' / 'weights.bin').stat().st_size
    assert 0.8 * expected < stored < 1.1 * expected, 'all but the small tensors, each once'
    assert runtime.load(tmp_path / 'folder').schedule == (2, 4)


@pytest.mark.parametrize('criterion, threshold', [
    ('confidence', 0.35), ('margin', 0.12), ('entropy', 1.5), ('agreement', 0.7),
])
def test_early_exit(network, model, criterion, threshold):
    x = images(24)
    expected, used = reference_exit(model, x, threshold, criterion, (1, 2, 4))
    assert len(used.unique()) > 1, 'the case is too easy'
    assert_like(network.predict(x.numpy(), threshold=threshold, criterion=criterion), expected)


def test_thresholds_of_agreement_are_shares_in_single_precision():
    """As `calibrate_threshold` returns them."""
    members = torch.randn(200, 3, 5)
    scores = exit_scores(members, 'agreement')
    for threshold in scores.unique():
        found = runtime.exit_scores(members.numpy(), 'agreement') >= threshold.item()
        assert found.tolist() == (scores >= threshold).tolist()


def test_programs_are_found_in_another_working_folder(folder, model, monkeypatch):
    monkeypatch.chdir(folder.parent)
    network = runtime.load(folder.name)
    monkeypatch.chdir('/')
    x = images(2)
    assert_like(network.predict(x.numpy()), model(x))


def test_scores_are_those_of_the_library():
    members = torch.randn(20, 3, 5)
    for criterion in CRITERIA:
        for n in (1, 3):
            found = runtime.exit_scores(members[:, :n].numpy(), criterion)
            np.testing.assert_allclose(found, exit_scores(members[:, :n], criterion).numpy(), rtol=1e-5, atol=1e-6)


def test_deadline(network, folder, model, monkeypatch):
    x, now = images(), [0.]
    monkeypatch.setattr(runtime, '_clock', lambda: now[0])
    run = runtime.Session.run

    def slowly(self, inputs):
        now[0] += 1.
        return run(self, inputs)

    monkeypatch.setattr(runtime.Session, 'run', slowly)
    assert_like(network.predict(x.numpy(), deadline=-1.), model(x, num_members=1))
    assert len(list(network.anytime(x.numpy()))) == 3  # every step has taken a second by now
    for deadline, n in ((0.5, 1), (3., 4), (2.5, 2)):
        assert_like(network.predict(x.numpy(), deadline=deadline), model(x, num_members=n))
    network = runtime.load(folder, threads=1)  # without the times
    macs = member_macs(model, 8)
    share = (macs[2] - macs[1]) / macs[1]  # what a step that was never taken is expected to take, in first steps
    assert len(list(network.anytime(x.numpy(), deadline=1 + share - 0.01))) == 1


def test_preparation(network):
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 9, 3), dtype=np.uint8)
    x = network.prepare(pixels)
    assert x.dtype == np.float32 and x.shape == (2, 3, 8, 9)
    np.testing.assert_allclose(x[1, 2, 5, 4], (pixels[1, 5, 4, 2] / 255 - 0.3) / 0.7, rtol=1e-5)


def test_neither_torch_nor_timm_is_imported(folder, tmp_path):
    """Nor anything else than numpy, onnxruntime, what they import, and Python."""
    code = f'''
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition('.')[0] not in {{'torch', 'timm', 'torchvision', 'huggingface_hub', 'safetensors'}}, name
sys.meta_path.insert(0, Refuse())
import numpy as np
import timm_hne.runtime
network = timm_hne.runtime.load({str(folder)!r})
logits = network.predict(np.zeros((2, 3, 8, 8), np.float32), num_members=2, threshold=0.5, deadline=1.)
assert logits.shape == (2, 5)
assert not {{'torch', 'timm'}} & set(sys.modules)
'''
    root = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, '-c', code], check=True, cwd=root, timeout=100)


# Bad input.

@pytest.mark.parametrize('kwargs, error, words', [
    (dict(images=torch.zeros(1, 3, 8, 8)), TypeError, 'images .*Tensor|images .*torch'),
    (dict(images=np.zeros((1, 3, 8, 8), np.uint8)), TypeError, 'images .*prepare.*uint8'),
    (dict(images=np.zeros((3, 8, 8), np.float32)), ValueError, r'images .*\(B, 3, H, W\)'),
    (dict(images=np.zeros((0, 3, 8, 8), np.float32)), ValueError, r'images .*\b0\b'),
    (dict(num_members=0), ValueError, 'num_members .*1 .*4.* 0'),
    (dict(num_members=2.), TypeError, 'num_members'),
    (dict(threshold=1.5), ValueError, 'threshold .* 1.5'),
    (dict(threshold=0.5, criterion='sure'), ValueError, "criterion .*'sure'"),
    (dict(threshold=math.log(5) + 0.1, criterion='entropy'), ValueError, 'threshold'),
    (dict(deadline='soon'), TypeError, 'deadline'),
])
def test_refused_calls(network, kwargs, error, words):
    with pytest.raises(error, match=words):
        network.predict(**{'images': np.zeros((1, 3, 8, 8), np.float32), **kwargs})


def copied(folder, tmp_path, **changes):
    copy = tmp_path / 'copy'
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / 'manifest.json').read_text())
    (copy / 'manifest.json').write_text(json.dumps({**manifest, **changes}))
    return copy


def test_a_tampered_file_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path)
    for name in ('weights.bin', 'step_1_2.onnx'):
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(RuntimeError, match=rf'{name} .*SHA-256 .*manifest\.json'):
            runtime.load(copy)
        (copy / name).write_bytes(data)
    (copy / 'weights.bin').unlink()
    with pytest.raises(OSError, match=r'weights\.bin'):
        runtime.load(copy)


@pytest.mark.parametrize('changes, words', [
    (dict(format=2, timm_hne='9.0'), r'2.*timm-hne 9\.0.* 1'),
    (dict(steps=[]), r'manifest\.json'),
    (dict(files={'../secret': ''}), r'manifest\.json'),
    (dict(files=None), r'manifest\.json'),
    (dict(format='2'), r"manifest\.json .*format .*'2'"),
    (dict(image={'channels': 3}), r'manifest\.json .*any_size, height, mean, std, width'),
    (dict(steps=[{'file': 'step_0_1.onnx'}]), r'manifest\.json .*frontier, inputs, new, start, stop'),
])
def test_a_manifest_that_cannot_be_read(folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        runtime.load(copied(folder, tmp_path, **changes))


def test_another_image_size_than_exported(folder, tmp_path):
    image = json.loads((folder / 'manifest.json').read_text())['image']
    network = runtime.load(copied(folder, tmp_path, image={**image, 'any_size': False}))
    with pytest.raises(ValueError, match=r'8x8 .*8x9.*--img-size'):
        network.predict(np.zeros((1, 3, 8, 9), np.float32))


def test_the_ensemble_of_a_folder_says_so_too(folder, tmp_path):
    image = json.loads((folder / 'manifest.json').read_text())['image']
    exported = ExportedEnsemble.load(copied(folder, tmp_path, image={**image, 'any_size': False}))
    for size in (8, 9):
        x = torch.zeros(1, 3, 8, size)
        with nullcontext() if size == 8 else pytest.raises(ValueError, match=r'8x8 .*8x9.*--img-size'):
            timm_hne.early_exit(exported, x, 0.5)


def test_a_time_that_another_thread_takes_out(network, model):
    class Taken(collections.deque):  # at once, as a thread with a deadline does
        def append(self, duration):
            super().append(duration)
            self.clear()

    network._times = collections.defaultdict(Taken)
    x = images()
    assert_like(network.predict(x.numpy()), model(x))


def test_a_time_that_another_thread_takes_out_before_a_deadline(network, model, monkeypatch):
    class Taken(collections.deque):
        def popleft(self):
            self.clear()
            return super().popleft()

    network._times = collections.defaultdict(lambda: Taken([9.]))
    monkeypatch.setattr(runtime, '_clock', lambda: 0.)
    assert len(list(network.anytime(images().numpy(), deadline=1.))) == 1
    assert [len(times) for times in network._times.values()] == [2, 0]


def test_sizes_that_threads_meet_at_once_take_one_place(folder):
    session = runtime.Session(folder / 'step_0_1.onnx', threads=1)
    create = session._create
    ready = threading.Barrier(4)

    def slowly(sizes):
        time.sleep(0.2)  # the others wait for the lock
        return create(sizes)

    def run(size):
        ready.wait(60)
        session.run({'images': np.zeros((1, 3, size, size), np.float32)})

    for size in range(8, 8 + session.SIZES_KEPT):
        session.run({'images': np.zeros((1, 3, size, size), np.float32)})
    session._create = slowly
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [40] * 4))
    assert len(session._sessions) == session.SIZES_KEPT


def test_one_class_can_be_sure_of_nothing(tmp_path):
    export_folder(tiny_ensemble((1, 1), num_classes=1), tmp_path / 'folder', (3, 8, 8))
    network, x = runtime.load(tmp_path / 'folder'), np.zeros((1, 3, 8, 8), np.float32)
    assert network.predict(x).shape == (1, 1)
    with pytest.raises(ValueError, match='num_classes must be at least 2 for a threshold, got 1'):
        network.predict(x, threshold=0.5, criterion='margin')


def test_logits_of_zero_are_exported(tmp_path):
    model = tiny_ensemble((1, 1))
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    export_folder(model, tmp_path / 'folder', (3, 8, 8))
    assert not runtime.load(tmp_path / 'folder').predict(np.ones((1, 3, 8, 8), np.float32)).any()


def test_export_folder_refuses(model, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        export_folder(model, tmp_path, (3, 8, 8))
    with pytest.raises(ValueError, match=r'schedule .*4 .*\(1, 2\)'):
        export_folder(model, tmp_path / 'folder', (3, 8, 8), (1, 2))
    with pytest.raises(ValueError, match='threshold'):
        export_folder(model, tmp_path / 'folder', (3, 8, 8), exit_point=ExitPoint(2., None, None, None))
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']
    (tmp_path / 'manifest.json').write_text('{"name": "an app", "icons": []}')
    with pytest.raises(FileExistsError, match='something else'):
        export_folder(model, tmp_path, (3, 8, 8))
    assert 'an app' in (tmp_path / 'manifest.json').read_text()


def test_grey_images_need_their_own_mean(tmp_path):
    model = timm.create_model('hne_resnet50_c8', in_chans=1, nodes=(1,) * 5).eval()
    for mean in (None, (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match=r'mean must have 1 value\(s\)'):
            export_folder(model, tmp_path / 'folder', (1, 8, 8), data_config={'mean': mean})
    manifest = export_folder(model, tmp_path / 'folder', (1, 8, 8), data_config={'mean': [0.5], 'std': [0.2]})
    assert (*manifest['image']['mean'], *manifest['image']['std']) == (0.5, 0.2)


def test_what_timms_scripts_leave_out_is_the_models_own(tmp_path):
    model = timm.create_model('hne_resnet50_c8', nodes=(1,) * 5).eval()
    manifest = export_folder(
        model, tmp_path / 'folder', (3, 8, 8), data_config={'interpolation': '', 'mean': [0.5], 'std': None})
    cfg = model.pretrained_cfg
    assert manifest['image']['interpolation'] == cfg['interpolation']
    assert tuple(manifest['image']['mean']) == (0.5,) * 3 and tuple(manifest['image']['std']) == tuple(cfg['std'])


def test_an_interrupted_export_can_be_repeated(model, folder, tmp_path, monkeypatch):
    copy, move = copied(folder, tmp_path), shutil.move

    def interrupted(path, to):
        if path.name == 'weights.bin':
            raise KeyboardInterrupt
        move(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, 'move', interrupted)
        export_folder(model, copy, (3, 8, 8))
    assert not (copy / runtime.MANIFEST).exists()
    export_folder(model, copy, (3, 8, 8))
    assert runtime.load(copy).ensemble_size == 4
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
    (copy / runtime.MANIFEST).unlink()
    with pytest.raises(FileExistsError, match='something else'):  # they may be somebody's own
        export_folder(model, copy, (3, 8, 8))


def test_the_names_of_other_classes_are_not_exported(tmp_path):
    model = timm.create_model('hne_resnet50_c8', pretrained=True, num_classes=7, nodes=(1,) * 5).eval()
    manifest = export_folder(model, tmp_path / 'folder', (3, 8, 8))
    assert (manifest['tag'], manifest['label_names']) == (None, None)


def test_a_file_that_is_replaced_meanwhile_is_not_read(folder, tmp_path):
    copy = copied(folder, tmp_path)
    network, x = runtime.load(copy), np.zeros((1, 3, 8, 8), np.float32)
    expected = network.predict(x)
    (copy / 'weights.bin').rename(copy / 'old.bin')
    (copy / 'weights.bin').write_bytes(bytes((copy / 'old.bin').stat().st_size))
    np.testing.assert_array_equal(network.predict(x), expected)
    with pytest.raises(RuntimeError, match=r'weights\.bin has the SHA-256 digest'):
        network.predict(np.zeros((1, 3, 16, 16), np.float32))


def test_a_folder_that_differs_is_not_written(model, tmp_path, monkeypatch):
    run = runtime.Session.run
    monkeypatch.setattr(runtime.Session, 'run', lambda self, inputs: [1.001 * y for y in run(self, inputs)])
    with pytest.raises(RuntimeError, match='1 members'):
        export_folder(model, tmp_path / 'folder', (3, 8, 8))
    assert not list(tmp_path.iterdir())


# The command.

def test_command(tmp_path, capsys, shallow):
    """The image size is the checkpoint's: programs used to be for 32 pixels, whatever it was trained on."""
    torch.manual_seed(0)
    model = timm.create_model('hne_resnet50_c8', width=4, nodes=(1, 1, 1, 1, 1), num_classes=3).eval()
    args = {'model': 'hne_resnet50_c8', 'img_size': 16, 'in_memory': True, 'mean': (0.5,) * 3, 'std': (0.25,) * 3,
            'model_kwargs': {'width': 4}, 'label_names': ['ant', 'bee', 'cow']}
    torch.save({'state_dict': model.state_dict(), 'args': args, 'arch': 'hne_resnet50_c8', 'epoch': 0},
               tmp_path / 'last.pth.tar')
    table = LatencyTable('hne_resnet50_c8', 'onnxruntime', (1,) * 5, (3, 16, 16), 'float32', {'device': 'cpu'},
                         {1: member_macs(model, 16)[1]}, {1: {1: 2.5}})
    table.save(tmp_path / 'table.json')
    replace(table, macs={1: 5}).save(tmp_path / 'other.json')
    folder = tmp_path / 'folder'
    for _ in range(2):  # it may be written anew
        main(['export', 'hne_resnet50_c8', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--output', str(folder),
              '--threshold', '0.9', '--latency-table', str(tmp_path / 'table.json')])
    assert 'images of 16x16 pixels or any other size' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(['export', 'hne_resnet50_c8', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--output', str(folder),
              '--latency-table', str(tmp_path / 'other.json')])
    assert 'latency must be of this model' in capsys.readouterr().err
    network = runtime.load(folder)
    image = network.manifest['image']
    assert (image['height'], image['width'], image['mean'], image['std']) == (16, 16, [0.5] * 3, [0.25] * 3)
    assert network.manifest['exit']['threshold'] == 0.9
    assert network.manifest['label_names'] == ['ant', 'bee', 'cow'] and network.manifest['tag'] is None
    assert network.manifest['latency']['latency_ms'] == {'1': {'1': 2.5}}
    x = images(2, 16)
    assert_like(network.predict(x.numpy()), model(x))


def test_a_latency_table_of_more_members_is_still_that_of_the_model(tmp_path):
    model = timm.create_model('hne_resnet50_c8', width=4, nodes=(1, 1, 1, 1, 2), num_classes=3).eval()
    table = LatencyTable('HNEResNet', 'onnxruntime', model.nodes, (3, 8, 8), 'float32', {'device': 'cpu'},
                         member_macs(model, 8), {1: {1: 2.5, 2: 3.5}})
    manifest = export_folder(model.extract(1), tmp_path / 'folder', (3, 8, 8), latency=table)
    assert manifest['latency']['macs'] == table.macs


def test_command_with_the_first_members_only(tmp_path, capsys, shallow):
    torch.manual_seed(0)
    kwargs = dict(nodes=(1, 1, 1, 2, 4), num_classes=3)
    model = timm.create_model('hne_resnet50_c8', **kwargs).eval()
    torch.save({'state_dict': model.state_dict(), 'arch': 'hne_resnet50_c8', 'epoch': 0}, tmp_path / 'last.pth.tar')
    for schedule in ((1, 3), (2,)):
        folder = tmp_path / str(schedule[-1])
        main(['export', 'hne_resnet50_c8', '--checkpoint', str(tmp_path / 'last.pth.tar'), '--output', str(folder),
              '--num-members', *map(str, schedule)])
        network, x = runtime.load(folder), images(2, 32)
        assert network.schedule == schedule
        for n, logits in zip(schedule, network.anytime(x.numpy())):
            assert_like(logits, model(x, n))
