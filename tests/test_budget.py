"""Latency tables: what is measured, what fits in a budget, and the file."""
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from test_inference import small_resnet
from timm.models import save_for_hf

import timm_hne
from timm_hne import budget
from timm_hne.__main__ import main
from timm_hne.budget import LatencyTable
from timm_hne.cost import member_macs
from timm_hne.optimize import optimize_for_inference


@pytest.fixture
def table():
    return LatencyTable(
        model='hne_resnet50_c8',
        mode='folded',
        nodes=(1, 2, 4),
        input_size=(3, 8, 8),
        dtype='float32',
        environment=budget.environment(torch.device('cpu')),
        macs={1: 100, 2: 150, 4: 300},
        latency_ms={1: {1: 1., 2: 1.5, 4: 3.}, 8: {1: 7., 2: 10., 4: 20.}},
    )


def test_measured_times_are_those_of_the_clock(monkeypatch):
    model = small_resnet()
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(budget, 'time', SimpleNamespace(perf_counter=lambda: clock.now))
    original, calls = type(model).forward, []

    def forward(self, x, num_members=None):
        if num_members is None:  # the trace that counts MACs
            return original(self, x)
        calls.append((len(x), num_members))
        clock.now += 0.001 * len(x) * num_members * (100 if len(calls) == 20 else 1)
        return original(self, x, num_members)

    monkeypatch.setattr(type(model), 'forward', forward)
    table = LatencyTable.measure(model, (3, 8, 8), batch_sizes=(1, 3), num_members=(1, 2, 4), repeats=5)
    # One call in the middle is an outlier: the median forgets it.
    assert table.latency_ms == {b: {n: pytest.approx(b * n) for n in (1, 2, 4)} for b in (1, 3)}
    assert calls == [(b, n) for b in (3, 1) for _ in range(7) for n in (1, 2, 4)]
    macs = member_macs(small_resnet(), 8)
    assert table.macs == {n: macs[n] for n in (1, 2, 4)}
    assert (table.model, table.mode) == ('hne_resnet50_c8', 'original')
    assert (table.nodes, table.input_size, table.dtype) == ((1, 1, 2, 4, 4), (3, 8, 8), 'float32')


def test_an_optimised_model_has_the_same_macs():
    fast = optimize_for_inference(small_resnet(), compile=False, dtype=torch.bfloat16)
    table = LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1,), repeats=1)
    macs = member_macs(small_resnet(), 8)
    assert table.macs == {n: macs[n] for n in (1, 2, 4)}
    assert (table.dtype, table.mode) == ('bfloat16', 'folded')
    assert all(ms > 0 for ms in table.latency_ms[1].values())


def test_a_model_that_create_model_has_not_built():
    model = timm_hne.HNEResNet(width=4, nodes=(1, 1, 1, 1, 2)).eval()
    for form in (model, optimize_for_inference(model, compile=False)):
        assert LatencyTable.measure(form, (3, 8, 8), batch_sizes=(1,), repeats=1).model == 'HNEResNet'


@pytest.mark.parametrize('latency_ms, batch_size, members', [
    (1., 1, 1), (1.49, 1, 1), (1.5, 1, 2), (1e9, 1, 4), (7., 2, 1), (10., 8, 2), (20., 3, 4),
])
def test_members_for_latency(table, latency_ms, batch_size, members):
    assert table.members_for(latency_ms=latency_ms, batch_size=batch_size) == members


def test_members_for_macs(table):
    assert [table.members_for(macs=macs) for macs in (100, 299, 300)] == [1, 2, 4]


@pytest.mark.parametrize('kwargs, words', [
    (dict(), 'exactly one of latency_ms and macs'),
    (dict(latency_ms=1., macs=100), 'exactly one of latency_ms and macs'),
    (dict(latency_ms=0.9), 'latency_ms must be at least 1, got 0.9'),
    (dict(latency_ms=6., batch_size=2), 'latency_ms must be at least 7'),
    (dict(macs=99), 'macs must be at least 100'),
    (dict(latency_ms=100., batch_size=9), 'batch_size must be from 1 to 8, got 9'),
    (dict(latency_ms=100., batch_size=0), 'batch_size must be from 1 to 8, got 0'),
    (dict(latency_ms=100., input_size=(3, 9, 8)), r'input_size must be that of the table, \(3, 8, 8\)'),
])
def test_members_for_refuses(table, kwargs, words):
    with pytest.raises(ValueError, match=words):
        table.members_for(**kwargs)


def test_save_and_load(table, tmp_path):
    table.save(tmp_path / 'table.json')
    assert LatencyTable.load(tmp_path / 'table.json') == table
    assert [path.name for path in tmp_path.iterdir()] == ['table.json']


@pytest.mark.parametrize('key', ['hardware', 'torch', 'timm_hne'])
def test_other_hardware_is_refused_unless_told(table, tmp_path, key):
    path = tmp_path / 'table.json'
    table.save(path)
    values = json.loads(path.read_text())
    values['environment'][key] = 'another'
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"other_hardware=True; .*'{key}': 'another'"):
        LatencyTable.load(path)
    assert LatencyTable.load(path, other_hardware=True).latency_ms == table.latency_ms
    del values['environment'][key]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"other_hardware=True; .*'{key}': None"):
        LatencyTable.load(path)


def test_arm_processors_are_told_apart(monkeypatch, tmp_path):
    def cpu(part):
        (tmp_path / 'cpuinfo').write_text(f'processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {part}\n')
        monkeypatch.setattr(budget, 'Path', lambda path: tmp_path / 'cpuinfo')
        return budget.environment(torch.device('cpu'))['hardware']

    assert '0xd0c' in cpu('0xd0c') and '0xd40' in cpu('0xd40')


def test_a_table_of_another_model_is_noticed(tmp_path):
    model = small_resnet()
    fast = optimize_for_inference(model, compile=False)
    path = tmp_path / 'table.json'
    LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1,), repeats=1).save(path)
    assert LatencyTable.load(path, model=fast) == LatencyTable.load(path)
    for other, words in (
            (model, r"measured with {'mode': 'folded'}, the model has {'mode': 'original'}"),
            (optimize_for_inference(model), "the model has {'mode': 'compiled'}"),
            (optimize_for_inference(small_resnet((1, 1, 1, 2, 4)), compile=False), r"{'nodes': \(1, 1, 1, 2, 4\)}"),
            (optimize_for_inference(model, compile=False, dtype=torch.bfloat16), "{'dtype': 'bfloat16'}"),
            (optimize_for_inference(small_resnet(in_chans=1), compile=False), r"{'input_size': \(1, 8, 8\)}"),
            (optimize_for_inference(small_resnet(num_classes=7), compile=False), r"the model has {'macs': {1: \d+, 2"),
    ):
        with pytest.raises(ValueError, match=words):
            LatencyTable.load(path, model=other)


@pytest.mark.parametrize('key, value, words', [
    ('latency_ms', {}, 'it has no rows'),
    ('latency_ms', {'1': {}}, 'not of the same numbers of members'),
    ('latency_ms', {'1': {'1': 1., '2': 2.}}, 'not of the same numbers of members'),
    ('latency_ms', {'1': {'1': 1., '2': 'fast', '4': 3.}}, "'fast' is not a positive number"),
    ('latency_ms', {'1': {'1': 1., '2': None, '4': 3.}}, 'None is not a positive number'),
    ('latency_ms', {'1': {'1': 1., '2': float('nan'), '4': 3.}}, 'nan is not a positive number'),
    ('macs', {'1': 1, '2': -2, '4': 3}, '-2 is not a positive number'),
    ('macs', {}, 'it has no rows'),
])
def test_a_table_with_bad_cells_is_refused(table, tmp_path, key, value, words):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps({**vars(table), key: value}))
    with pytest.raises(ValueError, match=f'path must be a latency table, .*{words}'):
        LatencyTable.load(path)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"nodes": 3}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / 'table.json'
    path.write_text(text)
    with pytest.raises(ValueError, match='path must be a latency table'):
        LatencyTable.load(path)


@pytest.mark.parametrize('kwargs, words', [
    (dict(input_size=(1, 8, 8)), 'input_size must be'),
    (dict(input_size=(3, 8)), 'input_size must be'),
    (dict(batch_sizes=()), 'batch_sizes'),
    (dict(batch_sizes=(0,)), 'batch_sizes'),
    (dict(num_members=(4, 2)), 'schedule must increase'),
    (dict(repeats=0), 'repeats'),
])
def test_measure_refuses(kwargs, words):
    with pytest.raises(ValueError, match=words):
        LatencyTable.measure(small_resnet(), **{'input_size': (3, 8, 8), **kwargs})
    with pytest.raises(ValueError, match='training mode'):
        LatencyTable.measure(small_resnet().train(), (3, 8, 8))


def test_command(tmp_path, capsys):
    path = tmp_path / 'out.json'
    main(['bench', 'hne_resnet50_c8', '--img-size', '8', '--nodes', '1', '1', '1', '2', '4', '--batch-size', '1', '2',
          '--repeats', '1', '--mode', 'folded', '--device', 'cpu', '--output', str(path)])
    table = LatencyTable.load(path)
    assert table.nodes == (1, 1, 1, 2, 4) and list(table.latency_ms) == [1, 2] and list(table.macs) == [1, 2, 4]
    assert str(table) in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(['bench', 'resnet18'])
    assert error.value.code == 1 and 'model must be a hierarchical ensemble' in capsys.readouterr().err


def test_command_finds_out_about_a_bad_output_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LatencyTable, 'measure', lambda *args, **kwargs: pytest.fail('measured'))
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit):
        main(['bench', 'hne_resnet50_c8', '--mode', 'original', '--output', str(tmp_path / 'file' / 'table.json')])
    assert 'file' in capsys.readouterr().err


def test_command_with_a_model_in_a_folder(tmp_path, monkeypatch):
    model = timm.create_model('hne_resnet50_c8', nodes=(1, 1, 1, 1, 1))
    save_for_hf(model, tmp_path / 'model', model_args={'nodes': model.nodes})
    monkeypatch.chdir(tmp_path)
    for more in ([], ['--output', 'a/b.json']):
        main(['bench', 'local-dir:model', '--img-size', '8', '--batch-size', '1', '--repeats', '1', '--device', 'cpu',
              '--mode', 'original', *more])
    assert LatencyTable.load('model-latency.json').nodes == LatencyTable.load('a/b.json').nodes == (1, 1, 1, 1, 1)


def test_public_name():
    assert timm_hne.LatencyTable is LatencyTable
