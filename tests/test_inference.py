"""Anytime prediction, extraction and early exit, against direct evaluation of every number of members."""
import gc
import math
import weakref

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_hne
from timm_hne import inference
from timm_hne.cost import member_macs, member_params
from timm_hne.inference import CRITERIA, advance, calibrate_threshold, early_exit, exit_curve, exit_scores
from timm_hne.tree import prefixes

TREES = [(1, 2, 4, 8, 16), (1, 1, 1, 6, 6), (6, 6, 6, 6, 6), (1, 3, 3, 6, 12), (2, 2, 4, 4, 12), (1, 1, 1, 1, 1)]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give the batch normalisations the look of trained ones; new ones are the identity in evaluation mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5)
    return model.eval()


def small_resnet(nodes=(1, 1, 2, 4, 4), **kwargs):
    torch.manual_seed(0)
    return randomize(timm.create_model('hne_resnet50_c8', width=4, nodes=nodes, **kwargs))


def small_mobilenet(nodes=(1, 2, 4, 8)):
    torch.manual_seed(0)
    return randomize(timm.create_model('hne_mobilenetv2_075_e8', nodes=nodes, num_classes=7))


def images(batch_size=3, size=8):
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def direct(model, x):
    return {n: model(x, num_members=n) for n in range(1, model.ensemble_size + 1)}


def schedules(size):
    odd = {(size,), tuple(range(1, size + 1)), prefixes(size), tuple(range(2, size + 1, 3)) or (1,), (1, size)}
    return sorted(schedule for schedule in odd if all(a < b for a, b in zip(schedule, schedule[1:])))


# Anytime.

@pytest.mark.parametrize('nodes', TREES)
def test_anytime_equals_direct_evaluation(nodes):
    model, x = small_resnet(nodes).double(), images().double()
    expected = direct(model, x)
    for schedule in schedules(model.ensemble_size):
        for n, logits in zip(schedule, model.anytime(x, schedule), strict=True):
            torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)
    for n, logits in zip(prefixes(model.ensemble_size), model.anytime(x), strict=True):
        torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('nodes', [(1, 2, 4, 8, 16), (4, 4, 4, 4, 4), (2, 2, 4, 4, 12)])
def test_the_images_may_change_between_steps(nodes):
    """A server may use the same memory for the next batch."""
    model, x = small_resnet(nodes), images()
    expected = direct(model, x)
    steps = model.anytime(x)
    for n, logits in zip(prefixes(model.ensemble_size), steps, strict=True):
        torch.testing.assert_close(logits, expected[n], rtol=1e-4, atol=1e-4)
        x.zero_()


@pytest.mark.parametrize('channels', [1, 2, 6])
@pytest.mark.parametrize('nodes', [(1, 1, 2, 2, 4), (2, 2, 2, 2, 4)])
def test_images_with_other_channels_are_refused(nodes, channels):
    model, x = small_resnet(nodes), torch.zeros(2, channels, 8, 8)
    for call in (
            lambda: model(x), lambda: model(x, num_members=1), lambda: model.forward_intermediates(x, num_members=1),
            lambda: model.anytime(x), lambda: early_exit(model, x, 0.5),
    ):
        with pytest.raises(ValueError, match=rf'images \(B, 3, H, W\) .*got shape \[2, {channels}, 8, 8\]'):
            call()


def test_anytime_of_mobilenet_with_hidden_layers():
    model, x = small_mobilenet(), images(2, 64)
    expected = direct(model, x)
    for schedule in ((1, 2, 4, 8), (3, 5, 8)):
        for n, logits in zip(schedule, model.anytime(x, schedule), strict=True):
            torch.testing.assert_close(logits, expected[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('nodes', TREES)
@pytest.mark.parametrize('all_steps', [False, True])
def test_anytime_computes_nothing_twice(nodes, all_steps):
    model, x = small_resnet(nodes), images(1)
    schedule = tuple(range(1, model.ensemble_size + 1)) if all_steps else None
    with FlopCounterMode(display=False) as once, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as steps:
        list(model.anytime(x, schedule))
    assert steps.get_total_flops() == once.get_total_flops()


def test_anytime_stops_computing_when_interrupted():
    model, x = small_resnet(), images(1)
    with FlopCounterMode(display=False) as counter:
        iterator = model.anytime(x)
        next(iterator)
        iterator.close()
    assert counter.get_total_flops() == 2 * member_macs(model, 8)[1]
    torch.testing.assert_close(list(model.anytime(x))[-1], direct(model, x)[4], rtol=1e-5, atol=1e-5)


def test_anytime_keeps_one_node_per_block_and_frees_it():
    model = small_resnet((1, 2, 4, 8, 16))
    _, frontier = advance(model, inference.first_frontier(model, images()), 0, 5)
    # Of the nodes (1, 1, 2, 3, 5) that these members use, the last of the first, third and fourth block have a child to
    # come.
    kept = [None if features is None else features.shape[1] for features in frontier]
    assert kept == [None, *(model.blocks[b].out_channels if b in (0, 2, 3) else None for b in range(4))]
    for features in frontier:
        assert features is None or features.untyped_storage().nbytes() == features.nbytes
    _, frontier = advance(model, frontier, 5, 16)
    assert frontier == (None,) * 5


def test_anytime_leaves_the_callers_grad_mode_alone():
    model = small_resnet()
    iterator = model.anytime(images())
    assert not next(iterator).requires_grad
    assert torch.is_grad_enabled()


def test_anytime_does_not_keep_the_model_alive():
    model = small_resnet()
    list(model.anytime(images(), deadline=1e9))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Clock:
    """A clock that only moves when told to, and a model on it whose steps take `seconds[stop]`."""

    def __init__(self, monkeypatch, model, seconds):
        self.now = 100.
        monkeypatch.setattr(inference, '_clock', lambda: self.now)
        original = inference.advance

        def timed(model, frontier, start, stop):
            self.now += seconds[stop]
            return original(model, frontier, start, stop)

        monkeypatch.setattr(inference, 'advance', timed)


@pytest.mark.parametrize('deadline, steps', [
    (-1., 1), (0., 1), (1., 1), (2.9, 1), (3., 2), (6.9, 2), (7., 3), (math.inf, 3),
])
def test_deadline_is_kept_by_measured_times(monkeypatch, deadline, steps):
    model, x = small_resnet(), images()
    clock = Clock(monkeypatch, model, {1: 1., 2: 2., 4: 4.})
    assert len(list(model.anytime(x, deadline=1e9))) == 3
    begin = clock.now
    assert len(list(model.anytime(x, deadline=deadline))) == steps
    assert clock.now - begin <= max(deadline, 1.)


def test_deadline_counts_the_time_of_the_caller(monkeypatch):
    model, x = small_resnet(), images()
    clock = Clock(monkeypatch, model, {1: 1., 2: 1., 4: 1.})
    list(model.anytime(x, deadline=1e9))
    iterator = model.anytime(x, deadline=3.)
    next(iterator)
    clock.now += 1.5
    assert list(iterator) == []


def test_deadline_goes_by_the_slowest_recent_step(monkeypatch):
    model, x = small_resnet(), images()
    seconds = {1: 1., 2: 1., 4: 1.}
    Clock(monkeypatch, model, seconds)
    seconds[2] = 5.
    list(model.anytime(x, deadline=1e9))
    seconds[2] = 1.
    assert len(list(model.anytime(x, deadline=3.))) == 1
    for _ in range(5):
        list(model.anytime(x, deadline=1e9))
    assert len(list(model.anytime(x, deadline=3.))) == 3


def test_one_slow_step_is_forgotten_when_it_keeps_being_declined(monkeypatch):
    model, x = small_resnet(), images()
    seconds = {1: 1., 2: 1., 4: 500.}
    Clock(monkeypatch, model, seconds)
    list(model.anytime(x, deadline=1e9))
    seconds[4] = 1.
    # Too late whatever the step would take: that says nothing about its times.
    for _ in range(9):
        assert len(list(model.anytime(x, deadline=0.))) == 1
    assert len(list(model.anytime(x, deadline=100.))) == 2
    assert len(list(model.anytime(x, deadline=100.))) == 3


def test_compilation_is_not_taken_for_the_time_of_a_step(monkeypatch):
    model, x = small_resnet(), images()
    seconds, first = {1: 1., 2: 1., 4: 1.}, set()

    def step(frontier, start, stop):
        clock.now += 0. if stop in first else 50.
        first.add(stop)
        return inference.advance(model, frontier, start, stop)

    clock = Clock(monkeypatch, model, seconds)
    model.advance = step
    assert len(list(model.anytime(x, deadline=1e9))) == 3
    assert len(list(model.anytime(x, deadline=30.))) == 3


def test_deadline_of_a_first_call_is_predicted_from_the_work(monkeypatch):
    model, x = small_resnet((1, 2, 4, 8, 16)), images()
    macs = member_macs(model, 8)
    seconds = {n: (macs[n] - macs.get(n // 2, 0)) / macs[1] for n in prefixes(16)}
    clock = Clock(monkeypatch, model, seconds)
    deadline = macs[16] / macs[1] * 0.9
    begin = clock.now
    assert len(list(model.anytime(x, deadline=deadline))) == 4
    assert clock.now - begin <= deadline


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(schedule=()), ValueError, 'schedule must hold at least one'),
    (dict(schedule=(2, 1)), ValueError, 'schedule must increase'),
    (dict(schedule=(1, 1)), ValueError, 'schedule must increase'),
    (dict(schedule=(0, 1)), ValueError, 'schedule .* from 1 to 4, got 0'),
    (dict(schedule=(1, 5)), ValueError, 'schedule .* from 1 to 4, got 5'),
    (dict(schedule=(1, 2.)), TypeError, 'schedule .* integer'),
    (dict(schedule=(True, 2)), TypeError, 'schedule .* integer'),
    (dict(schedule=3), TypeError, 'schedule must be a sequence'),
    (dict(schedule='12'), TypeError, 'schedule must be a sequence'),
    (dict(deadline='1'), TypeError, 'deadline'),
    (dict(deadline=True), TypeError, 'deadline'),
    (dict(deadline=math.nan), ValueError, 'deadline'),
])
def test_anytime_refuses_at_the_call(kwargs, error, words):
    with pytest.raises(error, match=words):
        small_resnet().anytime(images(), **kwargs)


def test_a_model_that_cannot_predict_is_refused():
    model = small_resnet()
    with pytest.raises(ValueError, match='x must be images'):
        model.anytime(torch.zeros(3, 8, 8))
    model.train()
    for call in (lambda: model.anytime(images()), lambda: early_exit(model, images(), 0.5)):
        with pytest.raises(ValueError, match='training mode'):
            call()
    model.eval().reset_classifier(0)
    for call in (lambda: model.anytime(images()), lambda: early_exit(model, images(), 0.5)):
        with pytest.raises(ValueError, match='classifier'):
            call()


def test_empty_batch():
    model = small_resnet()
    assert [logits.shape for logits in model.anytime(images(0))] == [(0, 10)] * 3
    result = early_exit(model, images(0), 0.5)
    assert result.logits.shape == (0, 10) and result.num_members.shape == (0,)


# Extract.

@pytest.mark.parametrize('nodes', TREES)
def test_extract_equals_the_prefix_and_holds_nothing_else(nodes):
    model, x = small_resnet(nodes), images()
    expected, params = direct(model, x), member_params(model)
    for n in range(1, model.ensemble_size + 1):
        part = model.extract(n)
        assert type(part) is type(model) and part.ensemble_size == part.num_members == n
        assert sum(p.numel() for p in part.parameters()) == params[n]
        for m, logits in direct(part, x).items():
            torch.testing.assert_close(logits, expected[m], rtol=1e-5, atol=1e-5)
        for m, logits in zip(prefixes(n), part.anytime(x), strict=True):
            torch.testing.assert_close(logits, expected[m], rtol=1e-5, atol=1e-5)
        assert part.forward_members(x).shape == (3, n, 10)
        with pytest.raises(ValueError, match=f'from 1 to {n}, got {n + 1}'):
            part(x, num_members=n + 1)


def test_extract_of_a_uniform_prefix_is_what_timm_creates():
    model, x = small_resnet((1, 2, 4, 8, 16)), images()
    for n, nodes in ((1, (1, 1, 1, 1, 1)), (2, (1, 1, 1, 1, 2)), (4, (1, 1, 1, 2, 4)), (8, (1, 1, 2, 4, 8))):
        part = model.extract(n)
        assert part.nodes == nodes
        created = timm.create_model('hne_resnet50_c8', width=4, nodes=nodes).eval()
        created.load_state_dict(part.state_dict())
        torch.testing.assert_close(created(x), model(x, num_members=n), rtol=1e-5, atol=1e-5)
        for name in ('nodes', 'ensemble_size', 'num_leaves', 'num_features', 'head_hidden_size', 'feature_info'):
            assert getattr(part, name) == getattr(created, name), name
        assert str(part) == str(created)


def test_extract_of_mobilenet_and_of_an_extract():
    model, x = small_mobilenet(), images(2, 64)
    expected = direct(model, x)
    part = model.extract(5)
    torch.testing.assert_close(part(x), expected[5], rtol=1e-5, atol=1e-5)
    again = part.extract(3)
    torch.testing.assert_close(again(x), expected[3], rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) == member_params(model)[3]


def test_extract_shares_no_memory_and_can_be_trained():
    model, x = small_resnet(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part = model.extract(3).train()
    part(x).sum().backward()
    torch.optim.SGD(part.parameters(), lr=1.).step()
    assert all(p.grad is not None for p in part.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize('num_members, error', [(0, ValueError), (5, ValueError), (2., TypeError), (True, TypeError)])
def test_extract_refuses(num_members, error):
    with pytest.raises(error, match='num_members'):
        small_resnet().extract(num_members)


# Early exit.

def undecided_resnet(x, nodes, spread=1.):
    """A model whose logits on the images `x` have no bias towards a class and this standard deviation."""
    model = small_resnet(nodes)
    with torch.no_grad():
        members = model.forward_members(x)
        model.classifier.bias -= members.mean(dim=0).flatten()
        scale = spread / model.forward_members(x).std()
        model.classifier.weight *= scale
        model.classifier.bias *= scale
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
    ('confidence', 0.35), ('margin', 0.2), ('entropy', 1.9), ('agreement', 0.7),
])
@pytest.mark.parametrize('schedule', [None, (3,), (2, 3, 7, 12)])
def test_early_exit_against_one_image_at_a_time(criterion, threshold, schedule):
    x = images(24)
    model = undecided_resnet(x, (1, 3, 3, 6, 12))
    result = early_exit(model, x, threshold, criterion, schedule)
    logits, used = reference_exit(model, x, threshold, criterion, schedule or prefixes(12))
    if schedule != (3,):
        assert len(used.unique()) > 1, 'the case is too easy'
    assert result.num_members.tolist() == used.tolist()
    torch.testing.assert_close(result.logits, logits, rtol=1e-4, atol=1e-4)


def test_early_exit_really_stops():
    x = images(8)
    model = undecided_resnet(x, (1, 2, 4, 8, 16))
    macs = member_macs(model, 8)
    with FlopCounterMode(display=False) as counter:
        result = early_exit(model, x, 0.35)
    assert len(result.num_members.unique()) > 1
    assert counter.get_total_flops() == 2 * sum(macs[n] for n in result.num_members.tolist())


def test_early_exit_at_the_ends_of_the_range():
    x = images()
    model = undecided_resnet(x, (1, 1, 2, 4, 4))
    assert early_exit(model, x, 0.).num_members.tolist() == [1, 1, 1]
    assert early_exit(model, x, math.log(10), 'entropy').num_members.tolist() == [1, 1, 1]
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
    with pytest.raises(error, match='threshold'):
        early_exit(small_resnet(), images(), threshold, criterion)


def test_unknown_criterion_and_too_few_classes():
    with pytest.raises(ValueError, match=r"criterion must be one of .*'sure'"):
        early_exit(small_resnet(), images(), 0.5, 'sure')
    with pytest.raises(ValueError, match='at least 2 classes'):
        early_exit(small_resnet(num_classes=1), images(), 0.5)


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


@pytest.mark.parametrize('criterion', CRITERIA)
def test_calibrate_for_accuracy(held_out, criterion):
    member_logits, target, _ = held_out
    full = (member_logits.mean(dim=1).argmax(dim=1) == target).double().mean().item()
    point = calibrate_threshold(*held_out, criterion, max_accuracy_loss=0.02)
    others = [p for p in exit_curve(*held_out, criterion, max_points=2000) if p.accuracy >= full - 0.02]
    assert point.accuracy >= full - 0.02 and point.macs == min(p.macs for p in others)
    assert point.macs < 24.


@pytest.mark.parametrize('kwargs, words', [
    (dict(), 'exactly one of target_macs and max_accuracy_loss'),
    (dict(target_macs=20., max_accuracy_loss=0.1), 'exactly one of'),
    (dict(target_macs=9.), 'target_macs must be at least 10'),
    (dict(max_accuracy_loss=-0.1), 'max_accuracy_loss must be from 0 to 1'),
    (dict(max_accuracy_loss=1.5), 'max_accuracy_loss must be from 0 to 1'),
    (dict(target_macs=20., schedule=(1, 3)), r'macs must have an entry .* none for \[3\]'),
])
def test_calibrate_refuses(held_out, kwargs, words):
    with pytest.raises(ValueError, match=words):
        calibrate_threshold(*held_out, **kwargs)


def test_calibrate_refuses_logits_without_members(held_out):
    member_logits, target, macs = held_out
    with pytest.raises(ValueError, match=r'member_logits must be \(B, N, num_classes\)'):
        calibrate_threshold(member_logits[:, 0], target, macs, target_macs=20.)


def test_public_names():
    assert timm_hne.early_exit is early_exit
    assert timm_hne.calibrate_threshold is calibrate_threshold
