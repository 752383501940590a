"""Exported programs, run by the run-time they are for, against the model."""
import math

import onnx
import onnxruntime
import pytest
import timm
import torch
from test_inference import images, small_resnet
from timm.models import save_for_hf

from timm_hne import export as export_module
from timm_hne import optimize
from timm_hne.__main__ import main
from timm_hne.cost import member_params
from timm_hne.export import export
from timm_hne.optimize import optimize_for_inference

NODES = (1, 1, 2, 2, 4)


def run_onnx(path, x):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {'images': x.numpy()})[0])


def run_export(path, x):
    return torch.export.load(path).module()(x)


@pytest.mark.parametrize('format, run', [('onnx', run_onnx), ('torch.export', run_export)])
@pytest.mark.parametrize('n', [1, 3])
def test_program_equals_the_model_for_every_batch_size(tmp_path, format, run, n):
    model = small_resnet(NODES)
    path = export(model, tmp_path / 'program', n, format, (3, 8, 8))
    for batch_size in (1, 2, 5):
        x = images(batch_size)
        expected = model(x, num_members=n).detach()
        torch.testing.assert_close(run(path, x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert [file.name for file in tmp_path.iterdir()] == ['program']


def test_weights_of_unused_nodes_are_left_out(tmp_path):
    model = small_resnet(NODES)
    for n in (1, 3, 4):
        program = onnx.load(export(model, tmp_path / f'{n}.onnx', n, 'onnx', (3, 8, 8)))
        weights = sum(math.prod(tensor.dims) for tensor in program.graph.initializer)
        # Folding turns the two parameters per channel of a batch normalisation into one bias.
        channels = sum(m.num_features for m in model.extract(n).modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert 0 <= weights - (member_params(model)[n] - channels) < 50


def test_what_the_program_is_made_from_is_compared_too(tmp_path, monkeypatch):
    fold = optimize.FoldedConv.__init__

    def fold_wrongly(conv, layer):
        fold(conv, layer)
        conv.bias.data += 0.1

    monkeypatch.setattr(optimize.FoldedConv, '__init__', fold_wrongly)
    with pytest.raises(RuntimeError, match='2 members differs from the model by'):
        export(small_resnet(NODES), tmp_path / 'program.pt2', 2, 'torch.export', (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, '_export_logits', lambda path, x: run_export(path, x) * 1.001)
    with pytest.raises(RuntimeError, match='2 members differs from the model by'):
        export(small_resnet(NODES), tmp_path / 'program.pt2', 2, 'torch.export', (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(num_members=0), ValueError, 'num_members must be from 1 to 4'),
    (dict(num_members='1'), TypeError, 'num_members'),
    (dict(format='tflite'), ValueError, "format must be one of onnx, torch.export, got 'tflite'"),
    (dict(input_size=(1, 8, 8)), ValueError, 'input_size'),
])
def test_export_refuses(tmp_path, kwargs, error, words):
    arguments = {'num_members': 1, 'input_size': (3, 8, 8), **kwargs}
    with pytest.raises(error, match=words):
        export(small_resnet(NODES), tmp_path / 'program', **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match='training mode'):
        export(small_resnet(NODES).train(), tmp_path / 'program', 1)


def test_what_is_no_original_is_refused(tmp_path):
    fast = optimize_for_inference(small_resnet(NODES), compile=False)
    for model in (fast, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r'model must be an hne_\* model, not an optimised one'):
            export(model, tmp_path / 'program', 1)


def test_the_memory_of_the_process_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(optimize, 'keep_freed_memory', lambda: pytest.fail('keep_freed_memory was called'))
    export(small_resnet(NODES), tmp_path / 'program', 1, 'torch.export', (3, 8, 8))


def test_command(tmp_path, capsys):
    folder = tmp_path / 'programs'
    arguments = ['--nodes', *map(str, NODES), '--num-classes', '7', '--img-size', '8', '--format', 'torch.export']
    main(['export', 'hne_resnet50_c8', *arguments, '--num-members', '1', '2', '--output', str(folder)])
    assert sorted(file.name for file in folder.iterdir()) == ['hne_resnet50_c8_1.pt2', 'hne_resnet50_c8_2.pt2']
    assert run_export(folder / 'hne_resnet50_c8_2.pt2', images(2)).shape == (2, 7)
    assert '2 members' in capsys.readouterr().out


def test_command_reads_the_sizes_off_the_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model('hne_resnet50_c8', nodes=NODES, num_classes=7, in_chans=1).eval()
    weights, folder = tmp_path / 'weights.pth', tmp_path / 'programs'
    torch.save(model.state_dict(), weights)
    arguments = ['export', 'hne_resnet50_c8', '--checkpoint', str(weights), '--img-size', '8', '--num-members', '1',
                 '--format', 'torch.export', '--output', str(folder)]
    main(arguments)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(
        run_export(folder / 'hne_resnet50_c8_1.pt2', x), model(x, num_members=1).detach(), rtol=1e-4, atol=1e-4)
    for more, words in (
            (['--num-classes', '5'], 'num_classes must be that of the checkpoint, 7'),
            (['--nodes', '1', '1', '1', '1', '1'], 'nodes must be that of the checkpoint, (1, 1, 2, 2, 4)'),
            (['--pretrained'], 'only one of --checkpoint and --pretrained'),
    ):
        with pytest.raises(SystemExit):
            main(arguments + more)
        assert words in capsys.readouterr().err
    weights.write_bytes(b'')
    with pytest.raises(SystemExit):
        main(arguments)
    assert f'checkpoint {weights} cannot be read' in capsys.readouterr().err


def test_command_with_a_model_in_a_folder(tmp_path):
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 1))
    save_for_hf(model, tmp_path / 'model', model_args={'nodes': model.nodes})
    main(['export', f'local-dir:{tmp_path / "model"}', '--img-size', '8', '--format', 'torch.export',
          '--output', str(tmp_path / 'programs')])
    file, = (tmp_path / 'programs').iterdir()
    assert file.name.endswith('model_1.pt2')
