"""Exported programs, run by the run-time they are for, against the model."""
import functools
import math

import onnx
import onnxruntime
import pytest
import timm
import torch
from test_inference import images, small_resnet
from timm.models import save_for_hf
from tiny import tiny_ensemble

from timm_hne.__main__ import main
from timm_hne.evaluation.cost import member_params
from timm_hne.inference import folding, optimize_for_inference
from timm_hne.inference.export import export

NODES = (1, 1, 2, 2, 4)


def run_onnx(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {'images': x.numpy()})[0])


def run_export(path, x):
    return torch.export.load(path).module()(x)


@pytest.mark.parametrize('create, n, format, run', [
    (tiny_ensemble, 1, 'onnx', run_onnx),
    (tiny_ensemble, 3, 'torch.export', run_export),
    (functools.partial(tiny_ensemble, kind='pairs'), 3, 'onnx', run_onnx),
    (functools.partial(tiny_ensemble, kind='replicated'), 3, 'torch.export', run_export),
    (functools.partial(small_resnet, (1, 1, 1, 1, 2)), 2, 'onnx', run_onnx),
])
def test_program_equals_the_model_for_every_batch_size(tmp_path, create, n, format, run):
    model = create()
    path = export(model, tmp_path / 'program', n, format, (3, 8, 8))
    for batch_size in (1, 2, 5):
        x = images(batch_size)
        expected = model(x, num_members=n).detach()
        torch.testing.assert_close(run(path, x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert [file.name for file in tmp_path.iterdir()] == ['program']


@pytest.mark.parametrize('n', [1, 3])
def test_weights_of_unused_nodes_are_left_out(tmp_path, n):
    model = tiny_ensemble()
    program = onnx.load(export(model, tmp_path / 'program', n, 'onnx', (3, 8, 8)))
    weights = sum(math.prod(tensor.dims) for tensor in program.graph.initializer)
    # Folding turns the two parameters per channel of a batch normalisation into one bias.
    channels = sum(m.num_features for m in model.extract(n).modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert 0 <= weights - (member_params(model)[n] - channels) < 50


def test_what_the_program_is_made_from_is_compared_too(tmp_path, monkeypatch):
    fold = folding.FoldedConv.__init__

    def fold_wrongly(conv, layer):
        fold(conv, layer)
        conv.bias.data += 0.1

    monkeypatch.setattr(folding.FoldedConv, '__init__', fold_wrongly)
    with pytest.raises(RuntimeError, match='2 members'):
        export(tiny_ensemble(), tmp_path / 'program.pt2', 2, 'torch.export', (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, path):
            self.run = load(path).module()

        def module(self):
            return lambda x: self.run(x) * 1.001

    monkeypatch.setattr(torch.export, 'load', Wrong)
    with pytest.raises(RuntimeError, match='2 members'):
        export(tiny_ensemble(), tmp_path / 'program.pt2', 2, 'torch.export', (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(num_members=0), ValueError, 'num_members .*1 .*4.* 0'),
    (dict(num_members='1'), TypeError, 'num_members'),
    (dict(format='tflite'), ValueError, "format .*onnx, torch.export.*'tflite'"),
    (dict(input_size=(1, 8, 8)), ValueError, 'input_size'),
])
def test_export_refuses(tmp_path, kwargs, error, words):
    arguments = {'num_members': 1, 'input_size': (3, 8, 8), **kwargs}
    with pytest.raises(error, match=words):
        export(tiny_ensemble(), tmp_path / 'program', **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match='training mode'):
        export(tiny_ensemble().train(), tmp_path / 'program', 1)


def test_what_is_no_original_is_refused(tmp_path):
    fast = optimize_for_inference(tiny_ensemble(), engine='eager')
    for model, name in ((fast, 'OptimizedEnsemble'), (torch.nn.Linear(1, 1), 'Linear'), ('hne_resnet50_c8', 'str')):
        with pytest.raises(TypeError, match=f'model .*{name}'):
            export(model, tmp_path / 'program', 1)


@pytest.fixture
def exported(monkeypatch):
    """Write empty files instead of programs; return what would have been exported."""
    calls = []

    def write(model, path, n, format, input_size):
        path.touch()
        calls.append((model, path.name, n, format, input_size))

    monkeypatch.setattr('timm_hne.cli.export.export', write)
    return calls


def test_command(exported, tmp_path, capsys):
    folder = tmp_path / 'programs'
    arguments = ['--nodes', *'11224', '--num-classes', '7', '--img-size', '8', '--format', 'torch.export']
    arguments += ['--no-pretrained', '--num-members', '1', '3', '--output', str(folder)]
    main(['export', 'hne_resnet50_c8', *arguments])
    assert sorted(file.name for file in folder.iterdir()) == ['hne_resnet50_c8_1.pt2', 'hne_resnet50_c8_3.pt2']
    for (model, *rest), n in zip(exported, (1, 3), strict=True):
        assert (model.nodes, model.num_classes, model.training) == (NODES, 7, False)
        assert not (model.pretrained_cfg.get('label_names') or model.pretrained_cfg['tag'])  # they are random weights
        assert rest == [f'hne_resnet50_c8_{n}.pt2', n, 'torch.export', (3, 8, 8)]
    assert '3 members' in capsys.readouterr().out


def test_command_reads_the_sizes_off_the_checkpoint(tmp_path, capsys, shallow):
    torch.manual_seed(0)
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 2), num_classes=7, in_chans=1).eval()
    weights, folder = tmp_path / 'weights.pth', tmp_path / 'programs'
    torch.save(model.state_dict(), weights)
    arguments = ['export', 'hne_resnet50_c8', '--checkpoint', str(weights), '--img-size', '8', '--num-members', '1',
                 '--format', 'torch.export', '--output', str(folder)]
    main([*arguments, '--model-kwargs', 'drop_path_rate=0.1'])
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        run_export(folder / 'hne_resnet50_c8_1.pt2', x), model(x, num_members=1).detach(), rtol=1e-4, atol=1e-4)
    for more, words in (
            (['--num-classes', '5'], 'num_classes must be that of the checkpoint, 7'),
            (['--nodes', *'11111'], 'nodes must be that of the checkpoint, (1, 1, 1, 1, 2)'),
            (['--pretrained'], 'only one of --checkpoint and --pretrained'),
            (['--threshold', '0.9'], "got format 'torch.export'"),
    ):
        with pytest.raises(SystemExit):
            main(arguments + more)
        assert words in capsys.readouterr().err
    weights.write_bytes(b'')
    with pytest.raises(SystemExit):
        main(arguments)
    assert f'checkpoint {weights} cannot be read' in capsys.readouterr().err


def test_command_with_a_model_in_a_folder(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 2))
    save_for_hf(model, tmp_path / 'model', model_args={'nodes': model.nodes}, safe_serialization=True)
    main(['export', 'local-dir:model', '--format', 'onnx', '--output', 'programs'])
    assert [name for _, name, *_ in exported] == ['model_1.onnx', 'model_2.onnx']
