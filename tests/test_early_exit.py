"""Early exit, against one image at a time, and the choice of its threshold."""
import math

import numpy as np
import pytest
import torch
from test_inference import images
from tiny import KINDS, tiny_ensemble
from torch.utils.flop_counter import FlopCounterMode

import timm_hne
from timm_hne.evaluation.cost import member_macs
from timm_hne.inference import CRITERIA, calibrate_threshold, early_exit, exit_curve, exit_scores
from timm_hne.tree import prefixes


def undecided(x, nodes, kind='branched', spread=1.):
    """A model whose logits on the images `x` have no bias towards a class and this standard deviation."""
    model = tiny_ensemble(nodes, kind)
    classifiers = [model.classifier] if kind == 'branched' else [head.classifier for head in model.heads]
    with torch.no_grad():
        members = model.forward_members(x)
        scale = spread / (members - members.mean(dim=0)).std()
        for classifier, bias in zip(classifiers, members.mean(dim=0).flatten().chunk(len(classifiers))):
            classifier.bias.copy_((classifier.bias - bias) * scale)
            classifier.weight *= scale
    return model


def reference_exit(model, x, threshold, criterion, schedule):
    """One image at a time, from direct evaluation."""
    logits, used = [], []
    with torch.no_grad():
        members = model.forward_members(x)
    for image in members:
        for n in schedule:
            mean = image[:n].mean(dim=0)
            probs = mean.softmax(dim=0)
            ordered = probs.sort(descending=True).values
            sure = {
                'confidence': ordered[0] >= threshold,
                'margin': ordered[0] - ordered[1] >= threshold,
                'entropy': -(probs * probs.log()).sum() <= threshold,
                'agreement': n > 1 and (image[:n].argmax(dim=1) == mean.argmax()).float().mean() >= threshold,
            }[criterion]
            if sure or n == schedule[-1]:
                logits.append(mean)
                used.append(n)
                break
    return torch.stack(logits), torch.tensor(used)


@pytest.mark.parametrize('criterion, threshold', [
    ('confidence', 0.35), ('margin', 0.12), ('entropy', 1.5), ('agreement', 0.7),
])
@pytest.mark.parametrize('kind', [*KINDS, 'pairs'])
@pytest.mark.parametrize('schedule', [None, (3,), (2, 3, 7, 12)])
def test_early_exit_against_one_image_at_a_time(criterion, threshold, kind, schedule):
    x = images(24)
    model = undecided(x, (1, 3, 6, 12), kind)
    result = early_exit(model, x, threshold, criterion, schedule)
    logits, used = reference_exit(model, x, threshold, criterion, schedule or prefixes(12))
    if schedule != (3,):
        assert len(used.unique()) > 1, 'the case is too easy'
    assert result.num_members.tolist() == used.tolist()
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-4)


def test_early_exit_really_stops():
    x = images(8)
    model = undecided(x, (1, 2, 4, 8))
    macs = member_macs(model, 8)
    with FlopCounterMode(display=False) as counter:
        result = early_exit(model, x, 0.8)
    assert len(result.num_members.unique()) > 1
    assert counter.get_total_flops() == 2 * sum(macs[n] for n in result.num_members.tolist())


def test_early_exit_at_the_ends_of_the_range():
    x = images()
    model = undecided(x, (1, 2, 4))
    assert early_exit(model, x, 0.).num_members.tolist() == [1, 1, 1]
    assert early_exit(model, x, math.log(5), 'entropy').num_members.tolist() == [1, 1, 1]
    assert early_exit(model, x, 0., 'agreement').num_members.tolist() == [2, 2, 2]
    result = early_exit(model, x, 1.)
    assert result.num_members.tolist() == [4, 4, 4]
    torch.testing.assert_close(result.logits, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('criterion, threshold, error', [
    ('confidence', -0.1, ValueError),
    ('confidence', 1.1, ValueError),
    ('margin', 2, ValueError),
    ('entropy', -1, ValueError),
    ('entropy', 2.31, ValueError),
    ('agreement', math.nan, ValueError),
    ('confidence', '0.5', TypeError),
    ('confidence', True, TypeError),
])
def test_threshold_out_of_range(criterion, threshold, error):
    with pytest.raises(error, match=f'threshold .*{threshold}'):
        early_exit(tiny_ensemble(), images(), threshold, criterion)


def test_unknown_criterion_and_too_few_classes():
    with pytest.raises(ValueError, match=r"criterion .*'sure'"):
        early_exit(tiny_ensemble(), images(), 0.5, 'sure')
    with pytest.raises(ValueError, match=r'num_classes .*2.* 1'):
        early_exit(tiny_ensemble(num_classes=1), images(), 0.5)


def test_exit_scores_refuses():
    with pytest.raises(ValueError, match=r"criterion .*'sure'"):
        exit_scores(torch.zeros(1, 2, 3), 'sure')
    with pytest.raises(ValueError, match=r'member_logits .*\[2, 3\]'):
        exit_scores(torch.zeros(2, 3), 'margin')
    with pytest.raises(ValueError, match=r'member_logits .*\[1, 0, 3\]'):
        exit_scores(torch.zeros(1, 0, 3), 'margin')
    with pytest.raises(TypeError, match=r'member_logits .*ndarray'):
        exit_scores(np.zeros((1, 2, 3)), 'margin')


def test_exit_scores_by_hand():
    # Probabilities (1/2, 1/4, 1/4) from both members' mean; the second member votes for the last class.
    logits = torch.tensor([[[2., 0., 0.], [0., 0., 0.5]]])
    logits[0, 0] = 2 * torch.tensor([0.5, 0.25, 0.25]).log() - logits[0, 1]
    assert exit_scores(logits, 'confidence').item() == pytest.approx(0.5)
    assert exit_scores(logits, 'margin').item() == pytest.approx(0.25)
    assert exit_scores(logits, 'entropy').item() == pytest.approx(1.5 * math.log(2))
    assert exit_scores(logits, 'agreement').item() == 0.5
    assert exit_scores(logits[:, :1], 'agreement').item() == -1


# Calibration.

@pytest.fixture(scope='module')
def held_out():
    """Logits of four members that are right more often the more of them are asked, and sure where right."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (400,), generator=generator)
    noise = torch.randn(400, 4, 5, generator=generator) * torch.rand(400, 1, 1, generator=generator) * 4
    return torch.nn.functional.one_hot(target, 5)[:, None] * 3. + noise, target, {1: 10., 2: 14., 4: 24.}


class Playback(torch.nn.Module):
    """Looks like a model to `early_exit` and plays back logits; image i is the constant i."""
    nodes, in_chans, num_classes, ensemble_size = (4,), 3, 5, 4

    def __init__(self, member_logits):
        super().__init__()
        self.member_logits = member_logits

    def advance(self, frontier, start, stop):
        index = frontier[0][:, 0, 0, 0].long()
        return self.member_logits[index, start:stop], frontier


@pytest.mark.parametrize('criterion', CRITERIA)
def test_exit_curve_is_what_early_exit_does(held_out, criterion):
    member_logits, target, macs = held_out
    model = Playback(member_logits).eval()
    x = torch.arange(400.).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    points = exit_curve(member_logits, target, macs, criterion, max_points=15)
    assert len(points) >= (2 if criterion == 'agreement' else 15)
    assert [point.macs for point in points] == sorted(point.macs for point in points)
    for point in points:
        result = early_exit(model, x, point.threshold, criterion)
        assert (result.logits.argmax(dim=1) == target).double().mean().item() == pytest.approx(point.accuracy)
        assert sum(macs[n] for n in result.num_members.tolist()) / 400 == pytest.approx(point.macs)
        assert result.num_members.double().mean().item() == pytest.approx(point.num_members)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_calibrate_for_macs(held_out, criterion):
    point = calibrate_threshold(*held_out, criterion, target_macs=18.)
    others = [p for p in exit_curve(*held_out, criterion, max_points=2000) if p.macs <= 18.]
    assert point.macs <= 18. and point.accuracy == max(p.accuracy for p in others)
    assert point.macs == min(p.macs for p in others if p.accuracy == point.accuracy)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_calibrate_for_accuracy(held_out, criterion):
    member_logits, target, _ = held_out
    full = (member_logits.mean(dim=1).argmax(dim=1) == target).double().mean().item()
    point = calibrate_threshold(*held_out, criterion, max_accuracy_loss=0.02)
    others = [p for p in exit_curve(*held_out, criterion, max_points=2000) if p.accuracy >= full - 0.02]
    assert point.accuracy >= full - 0.02 and point.macs == min(p.macs for p in others)
    assert point.macs < 24.
    # The loss is against the last n of the schedule.
    full_of_2 = (member_logits[:, :2].mean(dim=1).argmax(dim=1) == target).double().mean().item()
    assert full_of_2 < full - 0.05
    point = calibrate_threshold(*held_out, criterion, schedule=(1, 2), max_accuracy_loss=0.)
    assert full_of_2 <= point.accuracy and point.macs <= 14.


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(), ValueError, 'target_macs.*max_accuracy_loss.*None'),
    (dict(target_macs=20., max_accuracy_loss=0.1), ValueError, 'target_macs.*max_accuracy_loss.*20.0'),
    (dict(target_macs=9.), ValueError, 'target_macs .*10.* 9'),
    (dict(target_macs=math.nan), ValueError, 'target_macs .*nan'),
    (dict(target_macs='9'), TypeError, "target_macs .*'9'"),
    (dict(max_accuracy_loss=-0.1), ValueError, 'max_accuracy_loss .*-0.1'),
    (dict(max_accuracy_loss=1.5), ValueError, 'max_accuracy_loss .*1.5'),
    (dict(max_accuracy_loss=True), TypeError, 'max_accuracy_loss .*True'),
    (dict(target_macs=20., schedule=(1, 3)), ValueError, r'macs .*\[3\]'),
    (dict(target_macs=20., macs=[10., 14., 24.]), TypeError, 'macs .*list'),
    (dict(target_macs=20., macs={1: math.nan, 2: 14., 4: 24.}), ValueError, r'macs\[1\] .*nan'),
    (dict(target_macs=20., criterion='sure'), ValueError, "criterion .*'sure'"),
])
def test_calibrate_refuses(held_out, kwargs, error, words):
    member_logits, target, macs = held_out
    with pytest.raises(error, match=words):
        calibrate_threshold(member_logits, target, **{'macs': macs, **kwargs})


def nan_in(member_logits):
    member_logits = member_logits.clone()
    member_logits[3, 1, 2] = math.nan
    return member_logits


@pytest.mark.parametrize('change, error, words', [
    (lambda logits, target: (logits[:, 0], target), ValueError, r'member_logits .*\[400, 5\]'),
    (lambda logits, target: (logits.numpy(), target), TypeError, 'member_logits .*ndarray'),
    (lambda logits, target: (logits.long(), target), TypeError, 'member_logits .*int64'),
    (lambda logits, target: (nan_in(logits), target), ValueError, 'member_logits .*NaN.* 1 of 400'),
    (lambda logits, target: (logits, target[1:]), ValueError, r'target .*\[399\]'),
    (lambda logits, target: (logits[:0], target[:0]), ValueError, r'target .*\[0\]'),
    (lambda logits, target: (logits, target + 1), ValueError, 'target .*4.* 5'),
    (lambda logits, target: (logits, target - 1), ValueError, 'target .*0.* -1'),
    (lambda logits, target: (logits, target.float()), TypeError, 'target .*float32'),
    (lambda logits, target: (logits, target.tolist()), TypeError, 'target .*list'),
])
def test_held_out_data_that_tell_nothing_are_refused(held_out, change, error, words):
    """Logits that are not numbers, and classes that the model does not have, used to give a threshold."""
    *data, macs = held_out
    for function, kwargs in ((exit_curve, {}), (calibrate_threshold, {'target_macs': 20.})):
        with pytest.raises(error, match=words):
            function(*change(*data), macs, **kwargs)


def test_exit_curve_takes_any_integers_and_at_least_one_point(held_out):
    member_logits, target, macs = held_out
    assert exit_curve(member_logits, target.to(torch.uint8), macs) == exit_curve(*held_out)
    with pytest.raises(ValueError, match=r'max_points .*0'):
        exit_curve(*held_out, max_points=0)


def test_public_names():
    assert timm_hne.early_exit is early_exit
    assert timm_hne.calibrate_threshold is calibrate_threshold
