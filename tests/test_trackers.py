"""What follows a run, with stand-ins of the packages; and the best of its checkpoints."""
import sys
from types import SimpleNamespace

import pytest
from test_trainer import data_dir, options, rows  # noqa: F401

from timm_hne.training import TrainConfig, train
from timm_hne.training.checkpoint import CheckpointWriter, RunCheckpoint
from timm_hne.training.trackers import BestCheckpoint, open_tracker

VALUES = {'train/loss': 0.5, 'eval/top1_4': 75.}


@pytest.fixture
def calls(monkeypatch):
    """The calls that a run makes of wandb and mlflow."""
    calls = []

    def record(name, result=None):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or result

    run = SimpleNamespace(id='abc', log=record('log'), finish=record('finish'), info=SimpleNamespace(run_id='abc'))
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=record('init', run)))
    monkeypatch.setitem(sys.modules, 'mlflow', SimpleNamespace(
        start_run=record('start_run', run), log_params=record('log_params'), log_metrics=record('log'),
        end_run=record('end_run')))
    return calls


def test_wandb(calls, tmp_path):
    open_tracker('wandb', tmp_path, 0, {'lr': 0.1}).add(0, VALUES)
    open_tracker('wandb', tmp_path, 1, {'lr': 0.1}).add(1, VALUES)  # the run goes on, there too
    begun, first, resumed, second = calls
    assert begun[2] == dict(dir=str(tmp_path), name=tmp_path.name, config={'lr': 0.1}, id=None, resume=None)
    assert (resumed[2]['id'], resumed[2]['resume']) == ('abc', 'allow')
    assert [(call[1], call[2]) for call in (first, second)] == [((VALUES,), {'step': e}) for e in (0, 1)]


def test_mlflow(calls, tmp_path):
    open_tracker('mlflow', tmp_path, 0, {'model_kwargs': {'width': 1}}).add(0, VALUES)
    open_tracker('mlflow', tmp_path, 1, {}).add(1, VALUES)
    assert [call[0] for call in calls] == ['start_run', 'log_params', 'end_run', 'log', 'start_run', 'end_run', 'log']
    assert calls[1][1] == ({'model_kwargs': "{'width': 1}"},)
    assert calls[3][1:] == ((VALUES,), {'step': 0, 'run_id': 'abc'})
    assert calls[4][2] == dict(run_id='abc', run_name=None)


@pytest.mark.parametrize('log', ['wandb', 'mlflow', 'tensorboard'])
def test_what_is_missing_is_said_before_any_epoch(options, monkeypatch, log):  # noqa: F811
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if log == 'tensorboard' else log, None)
    with pytest.raises(ImportError, match=f"log .*'{log}'.*pip install {log}|log '{log}' .*pip install {log}"):
        train(TrainConfig(**options, log=log))


def test_a_run_that_is_followed(options, calls, tmp_path):  # noqa: F811
    train(TrainConfig(**{**options, 'epochs': 2}, log='wandb'))
    assert calls[0][2]['config']['epochs'] == 2 and 'data_dir' not in calls[0][2]['config']
    assert [call[2]['step'] for call in calls[1:-1]] == [0, 1]
    assert calls[-1] == ('finish', (), {'exit_code': 0})  # or a second run of this process would go on with it
    logged = calls[2][1][0]
    assert logged['eval/top1_4'] == float(rows(options['output_dir'])[1]['eval_top1_4'])
    assert logged['lr'] == float(rows(options['output_dir'])[1]['lr'])


def test_a_run_that_fails_is_recorded_as_such(options, calls, monkeypatch):  # noqa: F811
    def stop(self, epoch):
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, 'save', stop)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**options, log='wandb'))
    assert calls[-1] == ('finish', (), {'exit_code': 1})


def test_csv_alone(tmp_path):
    assert open_tracker('csv', tmp_path, 0, {}) is None
    with pytest.raises(ValueError, match=r'log .*csv, tensorboard, wandb, mlflow.*comet'):
        TrainConfig(log='comet')


@pytest.mark.parametrize(('accuracies', 'best'), [([50, 70, 60], 1), ([50, 60, 60], 2), ([70, '', 60], 0)])
def test_the_best_checkpoint_is_kept(tmp_path, accuracies, best):
    last, found = tmp_path / 'last.pth.tar', {}
    keeper = BestCheckpoint(2, found)
    for epoch, accuracy in enumerate(accuracies):
        found[epoch] = {'epoch': epoch, 'eval_top1_2': accuracy, 'eval_top1_4': -accuracy if accuracy else 0}
        last.write_text(f'epoch {epoch}')
        keeper.save(epoch, last)
    assert (tmp_path / 'model_best.pth.tar').read_text() == f'epoch {best}'
    assert {path.name for path in tmp_path.iterdir()} == {'last.pth.tar', 'model_best.pth.tar'}


def test_best_by_a_chosen_number_of_members(options, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r'best_members .*1, 2, 4.* 3'):
        train(TrainConfig(**options, best_members=3))
    train(TrainConfig(**options, best_members=2))
    log = [float(row['eval_top1_2']) for row in rows(options['output_dir'])]
    best = RunCheckpoint.read(f'{options["output_dir"]}/model_best.pth.tar')
    assert best.epoch == max(range(len(log)), key=lambda epoch: (log[epoch], epoch))
    # A run that is over goes on from its last epoch, not from its best.
    train(TrainConfig(**{**options, 'best_members': None, 'resume': True}))
