"""What n members cost, against the design's exact figures and against trees that hold nothing else."""
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_hne.__main__ import main
from timm_hne.evaluation.cost import cost_table, member_macs, member_params
from timm_hne.tree import node_span


@pytest.mark.parametrize('name, num_classes, expected', [
    ('hne_resnet50_c16', 10, {1: 50797056, 2: 65664000, 3: 92212736, 4: 107079680, 8: 201740288, 16: 401989632}),
    ('hne_resnet50_c16', 100, {1: 50820096, 2: 65710080, 3: 92281856, 4: 107171840, 8: 201924608, 16: 402358272}),
    ('hne_resnet50_c8', 10, {1: 13077760, 2: 16841216, 3: 23561984, 4: 27325440, 8: 51324928, 16: 102166528}),
    ('hne_mobilenetv2_075_e8.hcd_in1k', 1000, {1: 179129232, 2: 211960928, 3: 300083440, 4: 332915136, 8: 602257280}),
])
def test_macs_are_exact(name, num_classes, expected):
    macs = member_macs(timm.create_model(name, num_classes=num_classes, device='meta'))
    assert {n: macs[n] for n in expected} == expected


@pytest.mark.parametrize('nodes', [(1, 2, 4, 8, 16), (1, 1, 1, 16, 16), (4, 4, 4, 4, 4), (1, 3, 3, 6, 12)])
def test_a_prefix_costs_what_a_tree_of_its_nodes_costs(nodes):
    model = timm.create_model('hne_resnet50_c8', nodes=nodes, device='meta')
    table = cost_table(model, img_size=8)
    compared = 0
    for row in table:
        prefix_nodes = [node_span(count, 0, row.num_members, nodes[-1])[1] for count in nodes]
        if any(child % parent for parent, child in zip(prefix_nodes, prefix_nodes[1:])):
            continue  # not a tree of its own, e.g. 2 nodes with 3 children
        prefix = timm.create_model('hne_resnet50_c8', nodes=tuple(prefix_nodes), device='meta').to_empty(device='cpu')
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            prefix.eval()(torch.zeros(1, 3, 8, 8))
        assert row.macs == counter.get_total_flops() // 2
        assert row.params == sum(p.numel() for p in prefix.parameters())
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize('num_members', [3, 5])
def test_an_extracted_prefix_costs_what_the_prefix_costs(num_members):
    model = timm.create_model('hne_resnet50_c8')
    assert cost_table(model.extract(num_members), 8) == cost_table(model, 8)[:num_members]


def test_predicted_ratio_is_equation_8():
    row = cost_table(timm.create_model('hne_resnet50_c8', device='meta'), img_size=4)[-1]
    b = 4
    assert row.predicted_ratio == pytest.approx(2 / (b + 1) - 1 / ((b + 1) * 2 ** b))


def test_image_size_may_be_odd_and_not_square():
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 2), device='meta')
    assert member_macs(model, (7, 12))[1] < member_macs(model, (8, 12))[1] < member_macs(model, (8, 13))[1]


def test_counting_changes_nothing():
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 2), num_members=2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    member_macs(model, 8)
    assert model.training and model.num_members == 2
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('count', [cost_table, member_macs, member_params])
@pytest.mark.parametrize('model', [None, torch.nn.Linear(2, 2), timm.create_model('resnet10t', device='meta')])
def test_other_models_are_refused(count, model):
    with pytest.raises(TypeError, match=f'model .* got {type(model).__name__}'):
        count(model)


def test_command_prints_the_table(capsys):
    main(['cost', 'hne_resnet50_c8', '--img-size', '32', '32', '--num-classes', '10'])
    lines = capsys.readouterr().out.splitlines()
    macs = [line.split()[1] for line in lines[2:]]
    assert macs == ['13,077,760', '16,841,216', '27,325,440', '51,324,928', '102,166,528']


@pytest.mark.parametrize('argv, message', [
    (['cost', 'resnet18'], 'hne_resnet50_c8'),
    (['cost', 'hne_resnet50_c8', '--img-size', '0'], 'img_size'),
    (['cost', 'hne_resnet50_c8', '--nodes', '2', '3', '3', '3', '3'], 'nodes'),
])
def test_command_names_what_is_wrong(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 1
    assert message in capsys.readouterr().err
