"""The learning-rate schedule of Mehta et al. (2019)."""
import pytest
import torch

from timm_hne.training.scheduler import CyclicLRScheduler


def _rates(epochs, lr=0.1, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = CyclicLRScheduler(optimizer, **kwargs)
    rates = []
    for epoch in epochs:
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates


def test_cycle_decays_linearly_and_restarts():
    assert _rates(range(7)) == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02, 0.1, 0.08])


def test_first_epoch_of_the_authors_code():
    assert _rates(range(3), warmup_t=1) == pytest.approx([0.02, 0.08, 0.06])


def test_halved_at_the_papers_epochs():
    milestones = (60, 90, 110, 125, 135, 145)
    before = _rates([epoch - 5 for epoch in milestones])
    assert before == pytest.approx([0.1 / 2 ** index for index in range(6)])
    assert _rates(milestones) == pytest.approx([0.05 / 2 ** index for index in range(6)])
    assert _rates([59, 149]) == pytest.approx([0.02, 0.02 / 64])


def test_every_parameter_group_keeps_its_own_rate():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{'params': parameters[0], 'lr': 0.4}, {'params': parameters[1]}]
    optimizer = torch.optim.SGD([*groups, {'params': parameters[2], 'lr_scale': 0.5}], lr=0.1)
    CyclicLRScheduler(optimizer).step(62)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([0.12, 0.03, 0.015])


def test_updates_within_an_epoch_change_nothing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = CyclicLRScheduler(optimizer)
    scheduler.step(3)
    scheduler.step_update(1000)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.04)


@pytest.mark.parametrize('kwargs', [{'cycle_length': 0}, {'milestones': (90, 60)}, {'decay_rate': 0}])
def test_bad_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        _rates([0], **kwargs)
