"""HNETask under everything that timm's training script does with a task."""
import copy
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from processes import start_processes
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import ClassificationTask, LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, unwrap_model

import timm_hne  # noqa: F401
from timm_hne.training.losses import OBJECTIVES, HNELoss
from timm_hne.training.task import HNETask, MemberLogits

ARCHITECTURE = dict(width=4, nodes=(1, 1, 2, 2, 4), num_classes=5)


def create_ensemble(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('hne_resnet50_c8', **ARCHITECTURE, **kwargs)


@pytest.fixture
def model():
    return create_ensemble()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 4])


def train_step(task, batch, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05)
    optimizer.zero_grad()
    result = task(*batch)
    result['loss'].backward()
    optimizer.step()
    return result


def test_is_a_classification_task(model, batch):
    """The positional arguments of timm's task mean the same."""
    task = HNETask(model, nn.CrossEntropyLoss(label_smoothing=0.1), None, torch.device('cpu'), torch.float32, False)
    assert isinstance(task, ClassificationTask)
    assert not task.verbose
    assert task.criterion.criterion.label_smoothing == 0.1
    evaluator = task.create_evaluator()
    with torch.inference_mode():
        evaluator.update(task.get_eval_model().eval()(batch[0]), batch[1])
    assert 0 <= evaluator.compute()['top1'] <= 100


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_result(model, batch, objective):
    task = HNETask(model, objective=objective, alpha=0.3, temperature=3.0)
    result = task(*batch)
    member_logits = model.forward_members(batch[0])
    expected = HNELoss(objective, alpha=0.3, temperature=3.0)(member_logits, batch[1])
    torch.testing.assert_close(result.pop('output'), member_logits.mean(dim=1))
    torch.testing.assert_close(result, expected)
    result['loss'].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters()}


def test_training_lowers_the_loss(model, batch):
    task = HNETask(model)
    task.train()
    losses = [train_step(task, batch)['independent'].item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_all_members_are_trained_whatever_is_evaluated(batch):
    task = HNETask(create_ensemble(num_members=1), objective='independent')
    result = task(*batch)
    assert result['independent'].item() == pytest.approx(4 * 1.609, rel=0.3)  # 4 * ln 5, not 1 * ln 5
    assert result['output'].shape == (4, 5)
    assert task.get_eval_model().num_members == 1


def test_eval_model_and_checkpoint_keys_are_clean(model):
    task = HNETask(model)
    assert task.get_eval_model() is model
    assert task.get_eval_model(ema=True) is None
    assert task.get_eval_model(task.get_trainable_module()) is model
    task.setup_ema()
    task.compile(backend='eager')
    task.compile_ema(backend='eager')
    assert unwrap_model(task.get_eval_model()) is model
    assert isinstance(unwrap_model(task.get_eval_model(ema=True)), type(model))
    for ema in (False, True):
        state, = task.get_checkpoint_state(ema=ema).values()
        assert list(state) == list(model.state_dict())


@pytest.mark.parametrize('compiled', [False, True])
def test_ema(model, batch, compiled):
    task = HNETask(model)
    start = copy.deepcopy(model.state_dict())
    task.setup_ema(decay=0.75)
    if compiled:
        task.compile(backend='eager')
        task.compile_ema(backend='eager')
    train_step(task, batch)
    task.update_ema()
    averaged = unwrap_model(task.get_eval_model(ema=True)).state_dict()
    for name in ('classifier.weight', 'blocks.0.0.conv.weight'):
        assert not torch.equal(model.state_dict()[name], start[name])
        expected = 0.75 * start[name] + 0.25 * model.state_dict()[name]
        torch.testing.assert_close(averaged[name], expected)


def test_compile_keeps_the_numbers(model, batch):
    expected = HNETask(copy.deepcopy(model))(*batch)
    task = HNETask(model)
    eval_model = task.compile(backend='eager')
    torch.testing.assert_close(task(*batch), expected)
    assert eval_model is task.get_eval_model()
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(eval_model(batch[0]), model(batch[0]))


def test_amp(model, batch):
    task = HNETask(model)
    expected = task(*batch)['loss'].item()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(*batch)
    assert result['loss'].dtype == torch.float32
    assert result['loss'].item() == pytest.approx(expected, rel=0.05)
    result['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_low_precision_model(model, batch):
    task = HNETask(model.to(torch.bfloat16), dtype=torch.bfloat16)
    result = train_step(task, (batch[0].to(torch.bfloat16), batch[1]))
    assert result['loss'].dtype == torch.float32 and result['loss'].isfinite()


def test_gradient_accumulation(batch):
    """As timm's train.py does it: the loss is divided in place, gradients add up."""
    whole, parts = create_ensemble().eval(), create_ensemble().eval()
    HNETask(whole)(*batch)['loss'].backward()
    task = HNETask(parts)
    for images, target in zip(batch[0].split(2), batch[1].split(2)):
        with task.no_sync():
            loss = task(images, target)['loss']
            loss /= 2
            loss.backward()
    for expected, parameter in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_mixup_targets(model, batch):
    soft_target = 0.6 * F.one_hot(batch[1], 5) + 0.4 * F.one_hot(batch[1].flip(0), 5)
    task = HNETask(model, criterion_kwargs=dict(soft_targets=True))
    assert train_step(task, (batch[0], soft_target))['loss'].isfinite()


def test_optimizer_groups(model):
    model.no_weight_decay = lambda: {'classifier.weight'}
    module = HNETask(model).get_trainable_module()
    assert module.no_weight_decay() == {'model.classifier.weight'}
    decayed, total = (
        sum(parameter.numel() for group in groups for parameter in group['params'])
        for groups in (
            [group for group in create_optimizer_v2(module, weight_decay=0.1).param_groups if group['weight_decay']],
            create_optimizer_v2(module).param_groups,
        ))
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert decayed == sum(
        parameter.numel() for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name != 'classifier.weight')


def test_layer_decay(model):
    def scales(module):
        return {
            id(parameter): group['lr_scale']
            for group in param_groups_layer_decay(module, layer_decay=0.5) for parameter in group['params']}

    expected = scales(model)
    assert len(set(expected.values())) > 3
    assert scales(HNETask(model).get_trainable_module()) == expected


def test_gradient_clipping_parameters(model):
    task = HNETask(model)
    assert len(list(task.get_clip_parameters())) == len(list(model.parameters()))
    left_out = set(model.parameters()) - set(task.get_clip_parameters(exclude_head=True))
    assert left_out == set(model.classifier.parameters())
    model = timm.create_model('hne_from_timm', base='test_resnet', nodes=(1, 1, 1, 2, 4), num_classes=5)
    task = HNETask(model)
    task.compile(backend='eager')
    left_out = set(model.parameters()) - set(task.get_clip_parameters(exclude_head=True))
    assert left_out == {parameter for classifier in model.get_classifier() for parameter in classifier.parameters()}
    assert len(left_out) == 8


@pytest.mark.parametrize('compiled', [False, True])
def test_resume(tmp_path, batch, compiled):
    """A checkpoint restores weights, EMA and optimizer, and loads through timm.create_model."""
    task = HNETask(create_ensemble(seed=1))
    task.setup_ema(decay=0.5)
    if compiled:
        task.compile(backend='eager')
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    train_step(task, batch, optimizer)
    task.update_ema()
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(epoch=2, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')

    resumed = HNETask(create_ensemble(seed=2))
    resumed_optimizer = torch.optim.SGD(resumed.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    assert resume_task_checkpoint(resumed, path, resumed_optimizer) == 3
    resumed.setup_ema(decay=0.5)
    load_task_ema_checkpoint(resumed, path)
    continued = train_step(task, batch, optimizer)
    torch.testing.assert_close(train_step(resumed, batch, resumed_optimizer), continued)
    for ema in (False, True):
        expected, = task.get_checkpoint_state(ema=ema).values()
        state, = resumed.get_checkpoint_state(ema=ema).values()
        torch.testing.assert_close(state, expected)

    checkpoint = torch.load(path, weights_only=True)
    loaded = timm.create_model('hne_resnet50_c8', **ARCHITECTURE, checkpoint_path=path).state_dict()
    torch.testing.assert_close(loaded, checkpoint['state_dict_ema'])  # timm prefers the average


def run_rank(rank, init_file, result_file):
    dist.init_process_group('gloo', init_method=f'file://{init_file}', rank=rank, world_size=2)
    torch.manual_seed(0)
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4])
    model = create_ensemble(seed=rank).eval()  # DDP broadcasts the weights of rank 0; BatchNorm must not see batches
    task = HNETask(model, verbose=False)
    task.compile(backend='eager')
    task.prepare_distributed(device_ids=[torch.device('cpu')])  # as timm's train.py
    assert unwrap_model(task.get_eval_model()) is model
    with task.no_sync():
        task(images[2 * rank:2 * rank + 2], target[2 * rank:2 * rank + 2])['loss'].backward()
    task.get_trainable_module().zero_grad()
    task(images[2 * rank:2 * rank + 2], target[2 * rank:2 * rank + 2])['loss'].backward()
    if rank == 1:
        torch.save([parameter.grad for parameter in model.parameters()], result_file)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DDP on two halves of a batch gives the gradients of the whole batch."""
    start_processes(run_rank, tmp_path / 'init', tmp_path / 'gradients.pt')
    gradients = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    torch.manual_seed(0)
    images, target = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4])
    model = create_ensemble(seed=0).eval()
    HNETask(model)(images, target)['loss'].backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()], rtol=1e-4, atol=1e-6)


def test_no_false_warnings(model, batch):
    """A task warns in scripts that `timm-hne run` runs only; other processes are left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        HNETask(model).compile(backend='eager')
        ClassificationTask(timm.create_model('resnet10t', num_classes=5))
        LogitDistillationTask(timm.create_model('resnet10t', num_classes=5), model)
        nn.Sequential(model, nn.Softmax(dim=-1))
        model.train()
        F.cross_entropy(model(batch[0]), batch[1]).backward()


def test_importing_the_package_hooks_nothing():
    assert not torch.nn.modules.module._global_module_registration_hooks


@pytest.mark.parametrize('model, name', [
    (nn.Linear(2, 2), 'Linear'),
    (None, 'NoneType'),
    (MemberLogits(create_ensemble()), 'MemberLogits'),
])
def test_other_models_are_refused(model, name):
    with pytest.raises(TypeError, match=f'model .* got {name}'):
        HNETask(model)


def test_arguments_are_checked(model):
    with pytest.raises(ValueError, match=r"objective .*'distil'"):
        HNETask(model, objective='distil')
    with pytest.raises(ValueError, match='alpha'):
        HNETask(model, alpha=2)
    with pytest.raises(ValueError, match='JsdCrossEntropy'):
        HNETask(model, criterion_kwargs=dict(loss_type='jsd', jsd_splits=2))
    with pytest.raises(ValueError, match='criterion_kwargs'):
        HNETask(model, nn.CrossEntropyLoss(), dict(smoothing=0.1))
