"""The demo, with as little training as possible; what two minutes of it reach stands in README."""
import json

import pytest
import timm
import torch

from timm_hne.__main__ import main
from timm_hne.cli import demo


@pytest.fixture
def short_demo(monkeypatch):
    """A demo that trains for one short epoch, and takes each time once."""
    create_config = demo.demo_config

    def demo_config(output_dir):
        config = create_config(output_dir)
        config.epochs, config.warmup_epochs, config.max_train_images = 1, 0, 96
        return config

    class Once(demo.Timer):
        def blocked_autorange(self, **kwargs):
            return self.timeit(1)

    monkeypatch.setattr(demo, 'demo_config', demo_config)
    monkeypatch.setattr(demo, 'Timer', Once)


def test_demo_leaves_all_it_names(short_demo, tmp_path, capsys):
    main(['demo', '--output', str(tmp_path)])
    output = capsys.readouterr().out
    assert ' s. Accuracy on' in output
    for name in ('model.safetensors', 'accuracy.png', 'results.json', 'summary.csv'):
        assert str(tmp_path / name) in output
        assert (tmp_path / name).stat().st_size > 0
    assert not list(tmp_path.glob('*.tmp'))
    rows = json.loads((tmp_path / 'results.json').read_text())
    assert [row['num_members'] for row in rows] == [1, 2, 4, 8, 16]
    assert all(0 <= row['top1'] <= 100 and row['macs'] > 0 and row['latency_ms'] > 0 for row in rows)
    assert f'{rows[0]["top1"]:.2f}%' in output

    model = timm.create_model(
        'hne_resnet50_c8', num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / 'model.safetensors')).eval()
    digit = torch.rand(1, 1, 16, 16)
    assert model(digit, num_members=3).shape == (1, 10)


def test_interrupted_demo_leaves_no_half_written_file(short_demo, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        args[1].write_bytes(b'half of it')
        raise KeyboardInterrupt

    for stage in ('save_file', 'plot_accuracy'):
        with monkeypatch.context() as patch:
            patch.setattr(demo, stage, interrupted)
            with pytest.raises(SystemExit) as exit_info:
                main(['demo', '--output', str(tmp_path)])
        assert exit_info.value.code == 130
        assert 'interrupted' in capsys.readouterr().err
        assert not [path for path in tmp_path.iterdir() if path.read_bytes() == b'half of it']

    main(['demo', '--output', str(tmp_path)])  # goes on where it was
    assert ' s for what was left of an interrupted run, after 1 of 1 epochs. Accuracy' in capsys.readouterr().out
    assert (tmp_path / 'accuracy.png').read_bytes().startswith(b'\x89PNG')
