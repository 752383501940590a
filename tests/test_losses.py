"""The losses against hand-computed numbers, plain Python loops and finite differences."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
    TwoWayLoss,
    create_classification_loss,
)

from timm_hne.prefix import prefix_means
from timm_hne.training.losses import OBJECTIVES, HNELoss

SIZES = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 12: [1, 2, 4, 8, 12], 16: [1, 2, 4, 8, 16]}


def softmax(row, temperature=1.0):
    exponentials = [math.exp((value - max(row)) / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def cross_entropy(row, labels, temperature=1.0):
    return -sum(label * math.log(p) for label, p in zip(labels, softmax(row, temperature)))


def mean_rows(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


def naive_terms(logits, labels, temperature):
    """All four terms, from nested lists: logits[image][member][class] and soft labels[image][class]."""
    num_members, batch_size = len(logits[0]), len(logits)
    sizes = SIZES[num_members]
    terms = dict.fromkeys(('independent', 'hierarchical', 'codistillation', 'hierarchical_codistillation'), 0.0)
    for members, label in zip(logits, labels):
        soft_labels = softmax(mean_rows(members), temperature)
        for member in members:
            terms['independent'] += cross_entropy(member, label) / batch_size
            terms['codistillation'] += temperature ** 2 * cross_entropy(member, soft_labels, temperature) / batch_size
        for size in sizes:
            prefix = mean_rows(members[:size])
            terms['hierarchical'] += cross_entropy(prefix, label) / batch_size
            if size < num_members:
                distilled = cross_entropy(prefix, soft_labels, temperature)
                terms['hierarchical_codistillation'] += temperature ** 2 * distilled / batch_size
    return terms


def naive_loss(objective, alpha, terms):
    return {
        'independent': terms['independent'],
        'hierarchical': terms['hierarchical'],
        'independent+hierarchical': terms['independent'] + terms['hierarchical'],
        'codistillation': (1 - alpha) * terms['independent'] + alpha * terms['codistillation'],
        'hierarchical_codistillation':
            (1 - alpha) * terms['independent'] + alpha * terms['hierarchical_codistillation'],
    }[objective]


def one_hot(target, num_classes):
    return F.one_hot(target, num_classes).double().tolist()


def example(num_members=4, batch_size=3, num_classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch_size, num_members, num_classes, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (batch_size,), generator=generator)
    return logits.to(dtype), target


def test_hand_computed():
    # One image, two members, two classes. Logits ln 3 and 0 are the probabilities 3/4 and 1/4.
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]], dtype=torch.float64)
    target = torch.tensor([0])
    independent = math.log(4 / 3) + math.log(2)
    mean = softmax([math.log(3) / 2, 0.0])  # the logits' mean is (ln sqrt 3, 0)
    assert mean[0] == pytest.approx(math.sqrt(3) / (math.sqrt(3) + 1))
    hierarchical = math.log(4 / 3) - math.log(mean[0])
    # At temperature 1 the soft labels are `mean`.
    codistillation = -mean[0] * math.log(3 / 4) - mean[1] * math.log(1 / 4) + math.log(2)
    hierarchical_codistillation = -mean[0] * math.log(3 / 4) - mean[1] * math.log(1 / 4)
    expected = {
        'independent': independent,
        'hierarchical': hierarchical,
        'independent+hierarchical': independent + hierarchical,
        'codistillation': 0.75 * independent + 0.25 * codistillation,
        'hierarchical_codistillation': 0.75 * independent + 0.25 * hierarchical_codistillation,
    }
    assert tuple(expected) == OBJECTIVES
    for objective, value in expected.items():
        result = HNELoss(objective, alpha=0.25, temperature=1.0)(logits, target)
        assert result['loss'].item() == pytest.approx(value, abs=1e-12)


def test_temperature_by_hand():
    # Students at (2, 0) and (-2, 0), so the teacher is uniform; T = 2 makes the students' logits +-1.
    logits = torch.tensor([[[2.0, 0.0], [-2.0, 0.0]]], dtype=torch.float64)
    student = 0.5 * math.log(1 + math.exp(-1)) + 0.5 * math.log(1 + math.exp(1))  # the same for both, by symmetry
    result = HNELoss('codistillation', temperature=2.0)(logits, torch.tensor([0]))
    assert result['codistillation'].item() == pytest.approx(4 * 2 * student, abs=1e-12)
    result = HNELoss('hierarchical_codistillation', temperature=2.0)(logits, torch.tensor([0]))
    assert result['hierarchical_codistillation'].item() == pytest.approx(4 * student, abs=1e-12)


@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('num_members', sorted(SIZES))
def test_against_loops(objective, num_members):
    logits, target = example(num_members)
    terms = naive_terms(logits.tolist(), one_hot(target, 5), temperature=3.0)
    result = HNELoss(objective, alpha=0.3, temperature=3.0)(logits, target)
    assert result['loss'].item() == pytest.approx(naive_loss(objective, 0.3, terms), abs=1e-10)
    names = set(result) - {'loss'}
    assert names == {
        'independent': {'independent'},
        'hierarchical': {'hierarchical'},
        'independent+hierarchical': {'independent', 'hierarchical'},
        'codistillation': {'independent', 'codistillation'},
        'hierarchical_codistillation': {'independent', 'hierarchical_codistillation'},
    }[objective]
    for name in names:
        assert result[name].shape == ()
        assert result[name].item() == pytest.approx(terms[name], abs=1e-10)


@pytest.mark.parametrize('num_members', sorted(SIZES))
def test_prefix_means(num_members):
    logits, _ = example(num_members)
    expected = np.stack([logits.numpy()[:, :size].mean(axis=1) for size in SIZES[num_members]], axis=1)
    torch.testing.assert_close(prefix_means(logits), torch.from_numpy(expected))


def naive_torch_loss(objective, logits, target, alpha, temperature, criterion):
    """One criterion call per member or prefix, and distillation as KL divergence plus the teacher's entropy."""
    members = logits.unbind(1)
    ensembles = [sum(members[:size]) / size for size in SIZES[len(members)]]
    teacher = F.softmax(ensembles[-1].detach() / temperature, dim=-1)
    entropy = -(teacher * teacher.log()).sum(-1).mean()

    def distilled(students):
        losses = [
            F.kl_div(F.log_softmax(student / temperature, dim=-1), teacher, reduction='batchmean') + entropy
            for student in students]
        return temperature ** 2 * sum(losses)

    independent = sum(criterion(member, target) for member in members)
    return naive_loss(objective, alpha, {
        'independent': independent,
        'hierarchical': sum(criterion(ensemble, target) for ensemble in ensembles),
        'codistillation': distilled(members),
        'hierarchical_codistillation': distilled(ensembles[:-1]),
    })


@pytest.mark.parametrize('num_members', [1, 3, 12, 16])
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_gradients_against_loops(objective, num_members):
    logits, target = example(num_members)
    logits.requires_grad_()
    loss = HNELoss(objective, alpha=0.7, temperature=2.0)(logits, target)['loss']
    naive = naive_torch_loss(objective, logits, target, 0.7, 2.0, F.cross_entropy)
    torch.testing.assert_close(loss, naive)
    gradient, = torch.autograd.grad(loss, logits)
    expected, = torch.autograd.grad(naive, logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize('objective', ['independent', 'hierarchical', 'independent+hierarchical'])
def test_finite_differences(objective):
    logits, target = example(3, batch_size=2, num_classes=4)
    loss = HNELoss(objective)
    assert torch.autograd.gradcheck(lambda x: loss(x, target)['loss'], logits.requires_grad_())


@pytest.mark.parametrize('objective, students', [
    ('codistillation', [[0], [1], [2], [3]]),
    ('hierarchical_codistillation', [[0], [0, 1]]),
])
def test_finite_differences_of_distillation(objective, students):
    """Central differences of the naive loss, with the teacher held where it is."""
    logits, target = example(4, batch_size=2, num_classes=3)
    loss = HNELoss(objective, alpha=1.0)
    gradient, = torch.autograd.grad(loss(logits.requires_grad_(), target)['loss'], logits)
    soft_labels = [softmax(mean_rows(members), 2.0) for members in logits.tolist()]

    def naive(values):
        return sum(
            4 * cross_entropy(mean_rows([members[m] for m in student]), labels, 2.0) / 2
            for members, labels in zip(values, soft_labels) for student in students)

    for index in np.ndindex(*logits.shape):
        shift = torch.zeros_like(logits)
        shift[index] = 1e-5
        difference = naive((logits + shift).tolist()) - naive((logits - shift).tolist())
        assert gradient[index].item() == pytest.approx(difference / 2e-5, abs=1e-8)


def test_teacher_is_detached():
    """The gradient of L_HD by hand: T * (softmax(student / T) - softmax(teacher / T)) / (B * size) per prefix."""
    logits, target = example(4, batch_size=2)
    logits.requires_grad_()
    HNELoss(temperature=2.0)(logits, target)['hierarchical_codistillation'].backward()
    values = logits.detach()
    expected = torch.zeros_like(values)
    teacher = F.softmax(values.mean(1) / 2, dim=-1)
    for size in (1, 2):
        student = F.softmax(values[:, :size].mean(1) / 2, dim=-1)
        expected[:, :size] += (2 * (student - teacher) / (2 * size)).unsqueeze(1)
    torch.testing.assert_close(logits.grad, expected)
    assert not logits.grad[:, 2:].any()


def test_single_member():
    logits, target = example(1)
    logits.requires_grad_()
    result = HNELoss(alpha=0.25)(logits, target)
    assert result['hierarchical_codistillation'].item() == 0
    assert result['loss'].item() == pytest.approx(0.75 * F.cross_entropy(logits[:, 0], target).item())
    gradient, = torch.autograd.grad(result['hierarchical_codistillation'], logits)
    assert not gradient.any()


CRITERIA = {
    'cross_entropy': (nn.CrossEntropyLoss(), 'index'),
    'class_weights': (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])), 'index'),
    'function': (F.cross_entropy, 'index'),
    'label_smoothing': (LabelSmoothingCrossEntropy(0.1), 'index'),
    'soft_target': (SoftTargetCrossEntropy(), 'soft'),
    'bce_index': (BinaryCrossEntropy(smoothing=0.1), 'index'),
    'bce_soft': (BinaryCrossEntropy(), 'soft'),
    'bce_threshold': (BinaryCrossEntropy(target_threshold=0.2), 'soft'),
    'bce_sum': (BinaryCrossEntropy(sum_classes=True), 'index'),
    'asymmetric': (create_classification_loss('asl', smoothing=0.1), 'index'),
    'poly': (create_classification_loss('poly', smoothing=0.1), 'index'),
    'poly_soft': (create_classification_loss('poly', soft_targets=True), 'soft'),
    'asymmetric_binary': (create_classification_loss('asl', multi_label=True), 'binary'),
    'zlpr': (create_classification_loss('zlpr', multi_label=True), 'binary'),
}


@pytest.mark.parametrize('objective', ['independent+hierarchical', 'hierarchical_codistillation'])
@pytest.mark.parametrize('name', CRITERIA)
def test_criteria(name, objective):
    criterion, kind = CRITERIA[name]
    logits, target = example(12, batch_size=6, dtype=torch.float32)
    if kind == 'soft':
        target = 0.7 * F.one_hot(target, 5).float() + 0.3 * F.one_hot(target.flip(0), 5).float()
    elif kind == 'binary':
        target = (torch.arange(30).reshape(6, 5) % 3 == 0).float()
    logits.requires_grad_()
    loss = HNELoss(objective, criterion=criterion)(logits, target)['loss']
    naive = naive_torch_loss(objective, logits, target, 0.5, 2.0, criterion)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(naive, logits))


def test_ignored_targets():
    logits, target = example(4)
    target[0] = -100
    result = HNELoss('independent')(logits, target)
    torch.testing.assert_close(result['loss'], HNELoss('independent')(logits[1:], target[1:])['loss'])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_half_precision(objective, dtype):
    logits, target = example(16, batch_size=8, dtype=dtype)
    logits.requires_grad_()
    soft_target = F.one_hot(target, 5).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = HNELoss(objective)(logits, target)
        soft_result = HNELoss(objective, criterion=SoftTargetCrossEntropy())(logits, soft_target)
    expected = HNELoss(objective)(logits.detach().float(), target)
    for name, value in result.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])
        torch.testing.assert_close(soft_result[name], expected[name])
    result['loss'].backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


def test_float64_is_kept():
    logits, target = example()
    assert all(value.dtype == torch.float64 for value in HNELoss()(logits, target).values())


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_large_logits(objective):
    logits, target = example(4, dtype=torch.float32)
    logits = (1e4 * logits).requires_grad_()
    loss = HNELoss(objective)(logits, target)['loss']
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_terms_survive_in_place_scaling(objective):
    """timm's train.py divides the loss in place when it accumulates gradients."""
    logits, target = example()
    result = HNELoss(objective)(logits.requires_grad_(), target)
    before = {name: value.item() for name, value in result.items()}
    result['loss'] /= 4
    assert result.pop('loss').item() == pytest.approx(before['loss'] / 4)
    assert {name: value.item() for name, value in result.items()} == {name: before[name] for name in result}


def test_compiles_without_graph_breaks():
    logits, target = example(dtype=torch.float32)
    loss = HNELoss()
    compiled = torch.compile(loss, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))


def test_criterion_follows_the_module():
    criterion = nn.CrossEntropyLoss(weight=torch.ones(5))
    loss = HNELoss(criterion=criterion).to(torch.float64)
    assert criterion.weight.dtype == torch.float64
    assert loss(*example())['loss'].dtype == torch.float64


@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integers_of_any_size(objective, dtype):
    logits, target = example()
    torch.testing.assert_close(HNELoss(objective)(logits, target.to(dtype)), HNELoss(objective)(logits, target))
    labels = F.one_hot(target, 5)
    torch.testing.assert_close(
        HNELoss(objective, criterion=BinaryCrossEntropy())(logits, labels.to(dtype)),
        HNELoss(objective, criterion=BinaryCrossEntropy())(logits, labels.double()))


@pytest.mark.parametrize('arguments, error, message', [
    ({'objective': 'hierarchic'}, ValueError, "objective .*independent, hierarchical, .*'hierarchic'"),
    ({'objective': None}, ValueError, 'objective .*None'),
    ({'alpha': 1.01}, ValueError, r'alpha .* 1\.01'),
    ({'alpha': -0.1}, ValueError, 'alpha'),
    ({'alpha': math.nan}, ValueError, 'alpha'),
    ({'alpha': '0.5'}, TypeError, "alpha .*'0.5' .*str"),
    ({'alpha': True}, TypeError, 'alpha'),
    ({'alpha': None}, TypeError, 'alpha'),
    ({'temperature': 0}, ValueError, r'temperature .* 0\.$'),
    ({'temperature': -1.0}, ValueError, 'temperature'),
    ({'temperature': math.inf}, ValueError, 'temperature'),
    ({'temperature': False}, TypeError, 'temperature'),
    ({'temperature': [2.0]}, TypeError, 'temperature'),
    ({'criterion': 'ce'}, TypeError, "criterion .*'ce'|criterion .*str"),
    ({'criterion': JsdCrossEntropy(3)}, ValueError, 'JsdCrossEntropy'),
    ({'criterion': TwoWayLoss()}, ValueError, 'TwoWayLoss'),
    ({'criterion': nn.CrossEntropyLoss(reduction='sum')}, ValueError, "criterion .*'sum'"),
    ({'criterion': BinaryCrossEntropy(reduction='none')}, ValueError, "criterion .*'none'"),
])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        HNELoss(**arguments)


@pytest.mark.parametrize('logits, target, error, message', [
    (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), ValueError, r'member_logits .*\(2, 5\)'),
    (torch.zeros(2, 4, 5, 1), torch.zeros(2, dtype=torch.long), ValueError, 'member_logits'),
    (torch.zeros(2, 0, 5), torch.zeros(2, dtype=torch.long), ValueError, r'member_logits .*\(2, 0, 5\)'),
    (torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.long), ValueError, r'member_logits .*\(0, 4, 5\)'),
    (torch.zeros(2, 4, 5, dtype=torch.long), torch.zeros(2, dtype=torch.long), TypeError, 'member_logits .*int64'),
    ([[[0.0]]], torch.zeros(1, dtype=torch.long), TypeError, 'member_logits .*list'),
    (torch.zeros(2, 4, 5), [0, 1], TypeError, 'target .*list'),
    (torch.zeros(2, 4, 5), torch.zeros(3, dtype=torch.long), ValueError, r'target .*\(3,\)'),
    (torch.zeros(2, 4, 5), torch.tensor(1), ValueError, r'target .*\(\)'),
    (torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), ValueError, r'target .*\(2, 4, 5\)'),
    (torch.zeros(2, 4, 5), torch.zeros(2, 6), ValueError, 'target .*6 .*member_logits .*5'),
    (torch.zeros(2, 4, 5), torch.tensor([0, 7]), ValueError, 'target .*7.*member_logits .*5'),
    (torch.zeros(3, 4, 5), torch.tensor([0, -100, -1]), ValueError, 'target .*-1.* 5 '),
    (torch.zeros(2, 4, 5), torch.zeros(2), TypeError, 'target .*float32'),
    (torch.zeros(2, 4, 5), torch.zeros(2, dtype=torch.bool), TypeError, 'target .*bool'),
])
def test_bad_inputs(logits, target, error, message):
    with pytest.raises(error, match=message):
        HNELoss()(logits, target)


def test_criterion_without_reduction():
    logits, target = example()
    with pytest.raises(ValueError, match=r'criterion .*mean'):
        HNELoss(criterion=lambda x, y: F.cross_entropy(x, y, reduction='none'))(logits, target)


@pytest.mark.parametrize('ignore_index', [-1, 255])
def test_ignore_index_of_the_criterion(ignore_index):
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    loss = HNELoss('independent', criterion=nn.CrossEntropyLoss(ignore_index=ignore_index))
    assert torch.allclose(
        loss(logits, torch.tensor([0, ignore_index, 4]))['loss'],
        HNELoss('independent')(logits[[0, 2]], torch.tensor([0, 4]))['loss'])
    with pytest.raises(ValueError, match=r'target .*-100'):
        loss(logits, torch.tensor([0, -100, 4]))
