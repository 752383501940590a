"""What a run refuses before its first epoch, what it needs to go on, and what it keeps."""
import json
import os
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import timm
import torch
from processes import free_port, start_processes
from test_trainer import data_dir, make_images, options, rows  # noqa: F401
from timm.optim import Lookahead

from timm_hne.__main__ import main
from timm_hne.hub import write_folder
from timm_hne.models.weights import load_grown
from timm_hne.pretrained import state_digest
from timm_hne.training import TrainConfig, train, trainer
from timm_hne.training.checkpoint import RunCheckpoint
from timm_hne.training.recipe import recipe_of
from timm_hne.training.setup import create_trained_model
from timm_hne.training.trackers import BestCheckpoint


def test_the_part_of_the_image_that_is_evaluated_can_be_chosen(options):  # noqa: F811
    for chosen, found in ((0.5, 0.5), (None, 1.)):  # the model's own
        folder = f'{options["output_dir"]}{chosen}'
        result = train(TrainConfig(
            **{**options, 'in_memory': False, 'epochs': 1, 'crop_pct': chosen, 'output_dir': folder}))
        assert RunCheckpoint.read(result.checkpoint).data_config['crop_pct'] == found


def test_a_run_goes_on_without_what_it_started_from(options, tmp_path):  # noqa: F811
    start = train(TrainConfig(**{**options, 'epochs': 1, 'output_dir': str(tmp_path / 'start')})).checkpoint
    changed = {**options, 'epochs': 1, 'initial_checkpoint': str(start)}
    first = train(TrainConfig(**changed))
    start.unlink()
    again = train(TrainConfig(**changed, resume=True))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_run_keeps_its_number_of_processes(options):  # noqa: F811
    checkpoint = RunCheckpoint.read(train(TrainConfig(**{**options, 'epochs': 1})).checkpoint)
    known = {name: value for name, value in checkpoint.args.items() if name not in ('label_names', 'world_size')}
    config = TrainConfig.from_dict(known)
    checkpoint.check_same_run(config, world_size=1)
    with pytest.raises(ValueError, match=r'by 2 process.*it has 1, .*batch_size 4.*--nproc-per-node 1'):
        checkpoint.check_same_run(config, world_size=2)
    del checkpoint.args['world_size']  # of a version that did not record it
    checkpoint.check_same_run(config, world_size=2)


@pytest.mark.parametrize('rank, order', [(0, ['open', 'barrier']), (1, ['barrier', 'open'])])
def test_one_process_downloads_for_all(options, monkeypatch, rank, order):  # noqa: F811
    seen = []

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, 'open_data', lambda config: seen.append('open') or (range(24), None, None, 3))
    monkeypatch.setattr(trainer, 'dist', SimpleNamespace(
        barrier=lambda: seen.append('barrier'),
        all_gather_object=lambda values, value: values.__setitem__(slice(None), [value] * 2)))
    monkeypatch.setattr(trainer, '_Phase', stop)
    with pytest.raises(KeyboardInterrupt):
        trainer._train_phases(TrainConfig(**options, download=True), torch.device('cpu'), rank, 2, ExitStack())
    assert seen == order


def test_processes_that_have_other_checkpoints_do_not_train_apart(options, monkeypatch):  # noqa: F811
    def gather(values, value):
        values[:] = [value, 3]

    train(TrainConfig(**{**options, 'epochs': 1}))
    monkeypatch.setattr(trainer, 'dist', SimpleNamespace(all_gather_object=gather))
    config = TrainConfig(**{**options, 'resume': True})
    with pytest.raises(RuntimeError, match=r'last epoch in output_dir .*\[0, 3\]'):
        trainer._train_phases(config, torch.device('cpu'), 0, 2, ExitStack())


def test_processes_that_cannot_read_other_images_do_not_train_apart(options, monkeypatch):  # noqa: F811
    def gather(values, value):
        values[:] = [value, [7]] if value == [] else [value] * 2

    monkeypatch.setattr(trainer, 'dist', SimpleNamespace(all_gather_object=gather))
    monkeypatch.setattr(trainer.HNETask, 'prepare_distributed', lambda task, **kwargs: task)
    with pytest.raises(RuntimeError, match=r'unreadable images.*\[\[\], \[7\]\]'):
        trainer._train_phases(TrainConfig(**options), torch.device('cpu'), 0, 2, ExitStack())


def train_rank(rank, port, values, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.save(train(TrainConfig(**values)).model.state_dict(), folder / f'{rank}.pt')
    with pytest.raises(RuntimeError, match='torchrun can train once'):
        train(TrainConfig(**values))


@pytest.mark.parametrize('ema_decay', [0., 0.5])
def test_processes_end_with_the_same_statistics(options, tmp_path, ema_decay):  # noqa: F811
    start_processes(train_rank, free_port(), {**options, 'epochs': 1, 'ema_decay': ema_decay}, tmp_path)
    one, two = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    statistics = [tensor for name, tensor in one.items() if name.endswith('running_mean')]
    assert statistics and all(tensor.any() for tensor in statistics)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'exploded'),)

    torch.save(dict(arch='hne_resnet50_c8', epoch=0, state_dict={'weight': Bomb()}), tmp_path / 'last.pth.tar')
    with pytest.raises(ValueError, match='cannot be read'):
        RunCheckpoint.read(tmp_path / 'last.pth.tar').weights()
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('opt', ['lookahead_sgd', 'adahessian'])
def test_optimizers_that_want_more_than_gradients(options, opt, monkeypatch):  # noqa: F811
    synced, sync = [], Lookahead.sync_lookahead
    monkeypatch.setattr(Lookahead, 'sync_lookahead', lambda self: synced.append(sync(self)))
    result = train(TrainConfig(**{**options, 'opt': opt, 'epochs': 2}))
    assert len(rows(result.checkpoint.parent)) == 2 and len(synced) == (2 if opt == 'lookahead_sgd' else 0)


@pytest.mark.parametrize('model, kwargs', [
    ('hne_resnet50_c8', {}), ('hne_from_timm', {'base': 'test_resnet'}),
])
def test_the_noise_of_a_tree_that_grows_out_of_pretrained_weights(tmp_path, model, kwargs):
    one = timm.create_model(model, num_classes=3, nodes=(1,) * 5, **kwargs).eval()
    results = dict(members=[dict.fromkeys(('top1', 'top5', 'macs', 'logit_std', 'nll', 'brier', 'ece'), 1.)])
    results['members'][0]['num_members'] = 1
    results |= dict(
        model=model, nodes=[1] * 5, data='a', split='b', num_images=1, weights_sha256=state_digest(one.state_dict()))
    write_folder(one, tmp_path / 'net', 'net', results, dict(epochs=1))
    found = {}
    for noise in (0., 1.):
        config = TrainConfig(
            model=f'local-dir:{tmp_path / "net"}', pretrained=True, model_kwargs={'nodes': (1, 1, 1, 1, 2)},
            grow_noise=noise)
        grown = create_trained_model(config, 3)[0].eval()
        members = grown.forward_members(torch.ones(1, 3, 32, 32))[0]
        found[noise] = (members[0] - members[1]).abs().max().item()
    assert found[0.] < 1e-4 < found[1.]


@pytest.mark.parametrize('seed', [0, 1])
def test_a_tree_that_grows_twice_gets_other_noise_each_time(seed):
    def grow(model, last):
        grown = timm.create_model('hne_resnet50_c8', width=2, nodes=(1, 1, 1, 1, last), num_classes=3)
        load_grown(grown, model.state_dict(), 1., seed)
        return grown

    one = timm.create_model('hne_resnet50_c8', width=2, nodes=(1,) * 5, num_classes=3)
    four = grow(grow(one, 2), 4)
    name = 'blocks.4.0.conv1.conv.weight'
    first, *others = four.state_dict()[name].chunk(4)
    noise = [(other - first).flatten() for other in others]
    for i in range(3):
        for other in noise[:i]:
            assert torch.cosine_similarity(noise[i], other, dim=0) < 0.9
    if seed:
        load_grown(four, one.state_dict(), 1., 0)
        again = four.state_dict()[name].clone()
        load_grown(four, one.state_dict(), 1., 1)
        assert not torch.equal(four.state_dict()[name], again)


def test_the_seed_of_a_run_is_that_of_the_noise(tmp_path):
    one = timm.create_model('hne_resnet50_c8', width=2, nodes=(1,) * 5, num_classes=3)
    torch.save(dict(arch='hne_resnet50_c8', state_dict=one.state_dict()), tmp_path / 'one.pth.tar')
    states = []
    for seed in (0, 1):
        config = TrainConfig(
            initial_checkpoint=str(tmp_path / 'one.pth.tar'), model_kwargs=dict(width=2, nodes=(1, 1, 1, 1, 2)),
            seed=seed)
        states.append(create_trained_model(config, 3)[0].state_dict()['blocks.4.0.conv1.conv.weight'])
    assert torch.equal(*(state.chunk(2)[0] for state in states)) and not torch.equal(*states)


@pytest.mark.parametrize('pretrained', [False, True])
def test_grey_images_are_normalised_by_the_mean_of_the_channels(pretrained):
    _, colour = create_trained_model(TrainConfig(), 10)
    _, grey = create_trained_model(TrainConfig(in_chans=1, pretrained=pretrained), 10)
    assert grey.mean == pytest.approx((sum(colour.mean) / 3,)) and grey.std == pytest.approx((sum(colour.std) / 3,))
    _, grey = create_trained_model(TrainConfig(in_chans=1, pretrained=pretrained, mean=(0.1,)), 10)
    assert grey.mean == (0.1,)
    with pytest.raises(ValueError, match=r'mean must have 1 value\(s\)'):
        create_trained_model(TrainConfig(in_chans=1, mean=(0.1, 0.2, 0.3)), 10)


@pytest.mark.parametrize('opt_kwargs', [{}, {'layer_decay': 0.5}])
@pytest.mark.parametrize('sched', ['constant', 'cosine'])
def test_the_rate_in_the_log_is_the_one_of_the_last_update(options, opt_kwargs, sched):  # noqa: F811
    train(TrainConfig(**{**options, 'epochs': 1, 'sched': sched, 'opt_kwargs': opt_kwargs}))
    lr = float(rows(options['output_dir'])[0]['lr'])
    assert lr == pytest.approx(0.01) if sched == 'constant' else 0 < lr < 0.001


@pytest.mark.parametrize('key, value', [('color_jitter', 0.4), ('crop_pct', 0.8)])
def test_what_does_nothing_in_memory_is_refused(options, key, value):  # noqa: F811
    with pytest.raises(ValueError, match=f'{key} .*in_memory'):
        TrainConfig(**{**options, key: value})
    TrainConfig(**{**options, 'in_memory': False, key: value})


def test_a_log_without_checkpoints_is_not_overwritten(options, tmp_path):  # noqa: F811
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'summary.csv').write_text('epoch,lr\n0,0.1\n')
    with pytest.raises(FileExistsError, match='holds a run already'):
        train(TrainConfig(**options))
    assert (tmp_path / 'run' / 'summary.csv').read_text() == 'epoch,lr\n0,0.1\n'


@pytest.mark.parametrize('changed, message', [
    ({'phases': [{'epochs': 1}, {'epochs': 1, 'opt': 'sgdd'}]}, 'Optimizer sgdd'),
    ({'best_members': 3}, r'best_members .*1, 2, 4.* 3'),
    ({'phases': [{'epochs': 1, 'model_kwargs': {'nodes': [1, 1, 1, 2, 2]}},
                 {'epochs': 1, 'model_kwargs': {'nodes': [1, 1, 1, 1, 4]}}]}, r'nodes=\(1, 1, 1, 2, 2\)'),
    # The number of tokens of a transformer is that of the patches.
    ({'model': 'hne_from_timm', 'model_kwargs': {'base': 'vit_tiny_patch16_224', 'nodes': [1, 1, 1, 2]},
      'phases': [{'epochs': 1, 'img_size': 32}, {'epochs': 1, 'img_size': 64}]}, r'pos_embed .*1, 5, .*1, 17, '),
])
def test_phases_that_cannot_follow_are_refused_first(options, tmp_path, changed, message):  # noqa: F811
    phases = [{'epochs': 1, 'model_kwargs': {'nodes': [1, 1, 1, 1, 1]}}, {'epochs': 1}]
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{**options, 'epochs': 200, 'phases': phases, **changed}))
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']


def test_a_best_checkpoint_that_was_not_copied_any_more_is_copied_on_resume(
        options, tmp_path, monkeypatch):  # noqa: F811
    def stop(self, epoch, last):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BestCheckpoint, 'save', stop)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**{**options, 'epochs': 1, 'best_members': 2}))
    assert len(rows(tmp_path / 'run')) == 1 and not (tmp_path / 'run' / BestCheckpoint.NAME).exists()
    train(TrainConfig(**{**options, 'epochs': 1, 'best_members': 2, 'resume': True}))
    assert RunCheckpoint.read(tmp_path / 'run' / BestCheckpoint.NAME).epoch == 0


def test_the_best_of_the_epochs_since_it_was_asked_for(tmp_path, caplog):
    last, found = tmp_path / 'last.pth.tar', {0: {'eval_top1_2': 90}}  # of which nobody has kept the weights
    keeper = BestCheckpoint(2, found)
    for epoch, accuracy in enumerate([50, 60, 55], start=1):
        found[epoch] = {'eval_top1_2': accuracy}
        last.write_text(f'epoch {epoch}')
        keeper.save(epoch, last)
    assert (tmp_path / BestCheckpoint.NAME).read_text() == 'epoch 2'
    last.write_text('epoch 4')
    found[4] = {'eval_top1_2': 59}
    BestCheckpoint(2, found, kept=2).save(4, last)
    assert (tmp_path / BestCheckpoint.NAME).read_text() == 'epoch 2'
    del found[2]
    BestCheckpoint(2, found, kept=2).save(4, last)
    assert (tmp_path / BestCheckpoint.NAME).read_text() == 'epoch 2'
    assert 'is of epoch 3, whose accuracy is not known: it stays' in caplog.text
    found[2] = {'eval_top1_1': 80}  # of a smaller tree
    BestCheckpoint(2, found, kept=2).save(4, last)
    assert (tmp_path / BestCheckpoint.NAME).read_text() == 'epoch 4'


def test_paths_are_in_no_recipe():
    args = {'initial_checkpoint': 'runs/a/last.pth.tar', 'data': './images', 'output': 'out', 'data_dir': 'images',
            'label_names': ['a'], 'world_size': 2, 'other': '/home/somebody', 'lr': 0.1,
            'model': 'local-dir:/home/somebody/mine',
            'model_kwargs': {'cache_dir': '/home/somebody', 'taps': ['a', '/home/somebody']},
            'phases': [{'epochs': 1, 'model_kwargs': {'cache_dir': '/home/somebody'}}]}
    assert recipe_of(args) == {
        'lr': 0.1, 'model': 'local-dir:mine', 'model_kwargs': {'taps': ['a']},
        'phases': [{'epochs': 1, 'model_kwargs': {}}],
    }


@pytest.fixture
def evaluated(options, tmp_path):  # noqa: F811
    """Evaluates a trained run on a split of its data."""
    def evaluate(split):
        main(['eval', '--checkpoint', str(tmp_path / 'run' / 'last.pth.tar'), '--split', split, '--workers', '0',
              '--output', str(tmp_path / 'evaluation.json')])
        return json.loads((tmp_path / 'evaluation.json').read_text())
    return evaluate


def test_an_evaluation_says_how_many_processes_trained(options, evaluated):  # noqa: F811
    train(TrainConfig(**{**options, 'epochs': 1}))
    assert evaluated('test')['recipe']['world_size'] == 1


def test_splits_that_lack_classes_are_evaluated(options, tmp_path, evaluated):  # noqa: F811
    root = make_images(tmp_path / 'images')
    for label in range(3):
        shutil.copytree(root / 'test' / f'class{label}', root / f'only{label}' / f'class{label}')
    train(TrainConfig(**{**options, 'data_dir': str(root)}))
    parts = [evaluated(f'only{label}') for label in range(3)]
    whole = evaluated('test')
    assert [part['num_images'] for part in parts] == [4, 4, 4]
    for i, row in enumerate(whole['members']):
        assert sum(part['members'][i]['top1'] for part in parts) / 3 == pytest.approx(row['top1'])


def test_what_training_passes_over_is_passed_over(options, tmp_path, evaluated, caplog):  # noqa: F811
    root = make_images(tmp_path / 'images')
    (root / 'test' / 'class1' / '0.png').write_bytes(b'no image')
    train(TrainConfig(**{**options, 'data_dir': str(root), 'epochs': 1, 'unreadable': 'skip'}))
    assert evaluated('test')['num_images'] == 11
    assert '1 unreadable images skipped, as in training' in caplog.text
