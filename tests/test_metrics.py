import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error

from timm_hne.evaluation.metrics import (
    CALIBRATION_BINS,
    EnsembleMetrics,
    brier_score,
    calibration_gaps,
    logit_std,
    mutual_information,
    nested_logits,
    predictive_entropy,
    variation_ratio,
)

METRICS = ('top1', 'top5', 'logit_std', 'nll', 'brier', 'ece')


def random_problem(num_images, ensemble_size, num_classes, scale=2., seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (num_images,), generator=generator)
    logits = scale * torch.randn(num_images, ensemble_size, num_classes, generator=generator)
    logits[torch.arange(num_images), :, target] += scale  # better than chance
    return logits, target


def accumulate(logits, target, batch_size):
    metrics = EnsembleMetrics(logits.shape[1])
    for images, labels in zip(logits.split(batch_size), target.split(batch_size)):
        metrics.update(images, labels)
    return metrics.compute()


def reference(member_logits, target):
    """The metrics of one ensemble by scikit-learn and torchmetrics, from all images at once."""
    logits = member_logits.double().numpy()
    mean = logits.mean(axis=1)
    probabilities = softmax(mean, axis=1)
    labels, classes = target.numpy(), np.arange(mean.shape[1])
    top5 = 1.
    if len(classes) > 5:
        top5 = top_k_accuracy_score(labels, mean, k=5, labels=classes)
    return {
        'top1': 100 * accuracy_score(labels, mean.argmax(axis=1)),
        'top5': 100 * top5,
        'logit_std': np.mean(np.std(logits, axis=1)),
        'nll': log_loss(labels, probabilities, labels=classes),
        'brier': brier_score_loss(labels, probabilities, labels=classes, scale_by_half=False),
        'ece': multiclass_calibration_error(
            torch.from_numpy(probabilities), target, len(classes), n_bins=CALIBRATION_BINS, norm='l1').item(),
    }


@pytest.mark.parametrize('ensemble_size', [1, 3, 16])
@pytest.mark.parametrize('num_classes', [2, 4, 5, 10, 100])
def test_metrics_of_every_prefix_match_libraries(ensemble_size, num_classes):
    logits, target = random_problem(203, ensemble_size, num_classes)
    result = accumulate(logits, target, batch_size=64)  # the last batch is smaller
    assert [row['num_members'] for row in result['members']] == list(range(1, ensemble_size + 1))
    for row in result['members']:
        expected = reference(logits[:, :row['num_members']], target)
        assert {name: row[name] for name in METRICS} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    own = [100 * accuracy_score(target, logits[:, m].argmax(dim=1)) for m in range(ensemble_size)]
    assert result['member_top1'] == pytest.approx(own)


@pytest.mark.parametrize('batch_size', [1, 7, 100])
def test_batches_of_any_size_give_the_same(batch_size):
    logits, target = random_problem(100, 4, 10)
    expected = accumulate(logits, target, 100)
    result = accumulate(logits, target, batch_size)
    for row, whole in zip(result['members'], expected['members']):
        assert row == pytest.approx(whole, rel=1e-6)
    assert result['member_top1'] == expected['member_top1']


def test_sums_do_not_lose_precision():
    # 20,000 float32 terms of 1 + 1e-4 added in float32 would be off in the fifth digit.
    metrics = EnsembleMetrics(2)
    logits = torch.tensor([[[1.0001, -1.0001], [-1.0001, 1.0001]]])
    batch = logits.expand(20, 2, 2)
    for _ in range(1000):
        metrics.update(batch, torch.zeros(20, dtype=torch.long))
    assert metrics.num_images == 20_000
    rows = metrics.compute()['members']
    assert rows[1]['logit_std'] == pytest.approx(float(logits[0, 0, 0].double()), rel=1e-12)
    assert rows[1]['brier'] == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_raised_first(dtype):
    logits, target = random_problem(100, 16, 10)
    logits = logits.to(dtype)
    result = accumulate(logits, target, 32)
    for row in result['members']:
        expected = reference(logits[:, :row['num_members']], target)
        assert {name: row[name] for name in METRICS} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert result['member_top1'][0] == result['members'][0]['top1']
    for function in (nested_logits, logit_std, predictive_entropy, mutual_information):
        torch.testing.assert_close(function(logits), function(logits.float()))


def test_logit_std_by_hand():
    logits = torch.tensor([[[0., 1.], [2., 1.], [4., 7.]]])
    # First two members: deviations 1 and 0. All three: sqrt(8 / 3) and sqrt(8).
    expected = [[0., 0.5, (math.sqrt(8 / 3) + math.sqrt(8)) / 2]]
    torch.testing.assert_close(logit_std(logits), torch.tensor(expected))


def test_saturated_confidence_falls_in_the_last_bin():
    logits = torch.tensor([[[1e4, 0.]], [[0., 1e4]]])
    (row,) = accumulate(logits, torch.tensor([0, 0]), 2)['members']
    assert row['ece'] == pytest.approx(0.5)
    assert row['brier'] == pytest.approx(1.)
    assert row['top1'] == 50


def test_uncertainty_of_members_that_agree_and_are_sure():
    logits = torch.tensor([30., 0., 0.]).expand(2, 4, 3)
    for function in (predictive_entropy, mutual_information, variation_ratio):
        torch.testing.assert_close(function(logits), torch.zeros(2), atol=1e-6, rtol=0)


def test_uncertainty_of_members_that_agree_to_know_nothing():
    logits = torch.zeros(2, 4, 3)
    torch.testing.assert_close(predictive_entropy(logits), torch.full((2,), math.log(3)))
    torch.testing.assert_close(mutual_information(logits), torch.zeros(2))


def test_uncertainty_of_sure_members_that_disagree():
    logits = 50 * torch.eye(4).unsqueeze(0)  # four members, each sure of a class of its own
    torch.testing.assert_close(predictive_entropy(logits), torch.tensor([math.log(4)]))
    torch.testing.assert_close(mutual_information(logits), torch.tensor([math.log(4)]))
    torch.testing.assert_close(variation_ratio(logits), torch.tensor([0.75]))


def test_uncertainty_by_hand():
    # Two members sure of class 0, one that wavers between 0 and 1, one sure of class 1.
    probabilities = torch.tensor([[[1., 0.], [1., 0.], [.5, .5], [0., 1.]]])
    logits = probabilities.clamp(min=1e-30).log()
    mean = (2.5 / 4, 1.5 / 4)
    total = -sum(p * math.log(p) for p in mean)
    torch.testing.assert_close(predictive_entropy(logits), torch.tensor([total]))
    torch.testing.assert_close(mutual_information(logits), torch.tensor([total - math.log(2) / 4]))
    torch.testing.assert_close(variation_ratio(logits[:, [0, 1, 3]]), torch.tensor([1 / 3]))


def test_uncertainty_has_its_bounds():
    logits, _ = random_problem(200, 5, 7, scale=4.)
    total, disagreement = predictive_entropy(logits), mutual_information(logits)
    assert (total <= math.log(7)).all() and (disagreement >= 0).all() and (disagreement < total).all()
    torch.testing.assert_close(mutual_information(logits[:, :1]), torch.zeros(200), atol=1e-6, rtol=0)
    torch.testing.assert_close(variation_ratio(logits[:, :1]), torch.zeros(200))


@pytest.mark.parametrize('scale', [0.5, 2., 8.])
def test_calibrated_confidence(scale):
    """Against scikit-learn's loss at a fine grid of temperatures, and numpy's quantile."""
    logits, target = random_problem(400, 3, 6, scale)
    logits = 3 * logits  # too sure of themselves
    for n, row in enumerate(accumulate(logits, target, 64)['members'], start=1):
        mean = logits[:, :n].double().mean(1).numpy()
        fine = np.geomspace(0.25, 8, 200)
        losses = [log_loss(target, softmax(mean / temperature, axis=1), labels=range(6)) for temperature in fine]
        assert row['temperature'] == pytest.approx(fine[np.argmin(losses)], rel=0.06)
        confidence = softmax(mean / row['temperature'], axis=1).max(axis=1)
        assert row['usual_confidence'] == pytest.approx(np.quantile(confidence, 0.05), abs=0.03)


@pytest.mark.parametrize('shape, target, message', [
    ((2, 3), [0, 0], r'\(B, 3, C\).*\(2, 3\)'),
    ((2, 4, 5), [0, 0], r'\(B, 3, C\).*\(2, 4, 5\)'),
    ((2, 3, 5), [0], r'target .*\(2,\)'),
    ((2, 3, 5), [0, 5], ' 5.* 5 classes'),
    ((2, 3, 5), [-1, 0], ' -1.* 5 classes'),
])
def test_input_that_does_not_fit(shape, target, message):
    with pytest.raises(ValueError, match=message):
        EnsembleMetrics(3).update(torch.zeros(shape), torch.tensor(target))


def test_no_images():
    metrics = EnsembleMetrics(3)
    metrics.update(torch.zeros(0, 3, 5), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match='no images'):
        metrics.compute()


def test_logits_that_are_not_finite():
    metrics = EnsembleMetrics(2)
    metrics.update(torch.full((1, 2, 3), math.nan), torch.tensor([0]))
    with pytest.raises(ValueError, match='not finite'):
        metrics.compute()


@pytest.mark.parametrize('function', [
    logit_std, nested_logits, mutual_information, predictive_entropy, variation_ratio,
    lambda logits: brier_score(torch.zeros(3, 2, 4), logits[:, 0, 0].astype(int)),
    lambda logits: calibration_gaps(torch.zeros(3, 2, 4), logits[:, 0, 0].astype(int)),
    lambda logits: EnsembleMetrics(2).update(logits, torch.zeros(3, dtype=torch.long)),
    lambda logits: EnsembleMetrics(2).update(torch.zeros(3, 2, 4), logits[:, 0, 0]),
    lambda logits: EnsembleMetrics(2).update(torch.zeros(3, 2, 4), torch.zeros(3)),
])
def test_arrays_and_fractions_are_refused(function):
    with pytest.raises(TypeError, match=r'ndarray|float32'):
        function(np.zeros((3, 2, 4), dtype=np.float32))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_type(dtype):
    logits, target = torch.randn(3, 2, 4), torch.tensor([0, 3, 1])
    results = []
    for labels in (target, target.to(dtype)):
        metrics = EnsembleMetrics(2)
        metrics.update(logits, labels)
        results.append(metrics.compute())
    assert results[0] == results[1]
