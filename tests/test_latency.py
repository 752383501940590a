"""Latency tables: what is measured, what fits in a budget, and the file."""
import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from test_inference import small_resnet
from timm.models import save_for_hf
from tiny import KINDS, tiny_ensemble

import timm_hne
from timm_hne import process
from timm_hne.__main__ import main
from timm_hne.evaluation.cost import member_macs
from timm_hne.inference import export_folder, latency
from timm_hne.inference.latency import LatencyTable
from timm_hne.inference.optimize import optimize_for_inference
from timm_hne.serving import ExportedEnsemble


@pytest.fixture
def table():
    return LatencyTable(
        model='hne_resnet50_c8',
        mode='folded',
        nodes=(1, 2, 4),
        input_size=(3, 8, 8),
        dtype='float32',
        environment=process.environment(torch.device('cpu')),
        macs={1: 100, 2: 150, 4: 300},
        latency_ms={1: {1: 1., 2: 1.5, 4: 3.}, 8: {1: 7., 2: 10., 4: 20.}},
    )


def test_measured_times_are_those_of_the_clock(monkeypatch):
    model = tiny_ensemble()
    clock = SimpleNamespace(now=0.)
    monkeypatch.setattr(latency, 'time', SimpleNamespace(perf_counter=lambda: clock.now))
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
    macs = member_macs(model, 8)
    assert table.macs == {n: macs[n] for n in (1, 2, 4)}
    assert (table.model, table.mode) == ('BranchedEnsemble', 'original')
    assert (table.nodes, table.input_size, table.dtype) == ((1, 2, 4), (3, 8, 8), 'float32')


@pytest.mark.parametrize('kind', KINDS)
def test_an_optimised_model_has_the_same_macs(kind):
    model = tiny_ensemble(kind=kind)
    fast = optimize_for_inference(model, engine='eager', dtype=torch.bfloat16)
    table = LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1,), repeats=1)
    macs = member_macs(model, 8)
    assert table.macs == {n: macs[n] for n in (1, 2, 4)}
    assert (table.model, table.dtype, table.mode) == (type(model).__name__, 'bfloat16', 'eager')
    assert all(ms > 0 for ms in table.latency_ms[1].values())


def test_an_exported_model_says_what_it_costs(tmp_path):
    pytest.importorskip('onnxruntime')
    model = tiny_ensemble()
    export_folder(model, tmp_path / 'net', (3, 8, 8))
    exported = ExportedEnsemble.load(tmp_path / 'net')
    table = LatencyTable.measure(exported, batch_sizes=(1,), repeats=1)
    assert table.mode == 'onnxruntime' and 'onnxruntime' in table.environment
    macs = member_macs(model, 8)
    assert table.macs == {n: macs[n] for n in (1, 2, 4)}
    assert (table.nodes, table.input_size) == ((1, 2, 4), (3, 8, 8))
    assert all(ms > 0 for ms in table.latency_ms[1].values())
    table.save(tmp_path / 'table.json')
    assert LatencyTable.load(tmp_path / 'table.json', model=exported) == table


def test_a_model_that_create_model_has_built_has_its_name():
    model = small_resnet((1, 1, 1, 1, 1))
    for form in (model, optimize_for_inference(model, engine='eager')):
        table = LatencyTable.measure(form, (3, 8, 8), batch_sizes=(1,), repeats=1)
        assert table.model == 'hne_resnet50_c8'


def test_a_failure_of_the_compiler_is_told(monkeypatch):
    def unavailable(function, options):
        raise RuntimeError('no compiler found')

    monkeypatch.setattr(torch, 'compile', unavailable)
    with pytest.warns(UserWarning, match='no compiler found'):
        fast = optimize_for_inference(tiny_ensemble(), engine='inductor')
        table = LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1,), num_members=(1,), repeats=1)
    assert table.mode == 'eager' and 'eager' in str(table)


@pytest.mark.parametrize('latency_ms, batch_size, members', [
    (1., 1, 1), (1.49, 1, 1), (1.5, 1, 2), (1e9, 1, 4), (7., 2, 1), (10., 8, 2), (20., 3, 4),
])
def test_members_for_latency(table, latency_ms, batch_size, members):
    assert table.members_for(latency_ms=latency_ms, batch_size=batch_size) == members


def test_members_for_macs(table):
    assert [table.members_for(macs=macs) for macs in (100, 299, 300)] == [1, 2, 4]


@pytest.mark.parametrize('kwargs, words', [
    (dict(), 'latency_ms.*macs.*None'),
    (dict(latency_ms=1., macs=100), 'latency_ms.*macs.*100'),
    (dict(latency_ms=0.9), 'latency_ms.* 1,.* 0.9'),
    (dict(latency_ms=6., batch_size=2), 'latency_ms.* 7,.* 6'),
    (dict(latency_ms=float('nan')), 'latency_ms.*nan'),
    (dict(macs=99), 'macs.* 100,.* 99'),
    (dict(latency_ms=100., batch_size=9), 'batch_size.* 8,.* 9'),
    (dict(latency_ms=100., batch_size=0), 'batch_size.* 8,.* 0'),
    (dict(latency_ms=100., input_size=(3, 9, 8)), r'input_size.*\(3, 8, 8\).*\(3, 9, 8\)'),
])
def test_members_for_refuses(table, kwargs, words):
    with pytest.raises(ValueError, match=words):
        table.members_for(**kwargs)


@pytest.mark.parametrize('kwargs, words', [
    (dict(latency_ms='1'), "latency_ms.*'1'"),
    (dict(macs=True), 'macs.*True'),
    (dict(latency_ms=1., batch_size=1.5), 'batch_size.*1.5'),
])
def test_members_for_refuses_other_types(table, kwargs, words):
    with pytest.raises(TypeError, match=words):
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


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_the_version_of_an_engine_counts(engine):
    pytest.importorskip(engine)
    for mode in (engine, f'{engine}, int8'):
        assert process.environment(torch.device('cpu'), mode)[engine] == importlib.metadata.version(engine)
    assert engine not in process.environment(torch.device('cpu'), 'eager')


def test_arm_processors_are_told_apart(monkeypatch, tmp_path):
    def cpu(part):
        (tmp_path / 'cpuinfo').write_text(f'processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {part}\n')
        monkeypatch.setattr(process, 'Path', lambda path: tmp_path / 'cpuinfo')
        return process.environment(torch.device('cpu'))['hardware']

    assert '0xd0c' in cpu('0xd0c') and '0xd40' in cpu('0xd40')


def test_a_table_of_another_model_is_noticed(tmp_path):
    model = tiny_ensemble()
    fast = optimize_for_inference(model, engine='eager')
    path = tmp_path / 'table.json'
    LatencyTable.measure(fast, (3, 8, 8), batch_sizes=(1,), repeats=1).save(path)
    assert LatencyTable.load(path, model=fast) == LatencyTable.load(path)

    def folded(**kwargs):
        return optimize_for_inference(tiny_ensemble(**kwargs), engine='eager')

    for other, words in (
            (model, "'mode': 'eager'.*'mode': 'original'"),
            (optimize_for_inference(model, engine='inductor'), "'mode': 'inductor'"),
            (folded(nodes=(1, 1, 4)), r"'nodes': \(1, 1, 4\)"),
            (folded(kind='replicated'), "'model': 'ReplicatedEnsemble'"),
            (optimize_for_inference(model, engine='eager', dtype=torch.bfloat16), "'dtype': 'bfloat16'"),
            (folded(in_chans=1), r"'input_size': \(1, 8, 8\)"),
            (folded(num_classes=7), r"'macs': {1: \d+, 2"),
            (folded(channels=4), r"'macs': {1: \d+, 2"),
    ):
        with pytest.raises(ValueError, match=words):
            LatencyTable.load(path, model=other)


def test_a_table_of_more_members_than_the_model_has(tmp_path):
    """It used to raise a KeyError."""
    model = tiny_ensemble()
    path = tmp_path / 'table.json'
    LatencyTable.measure(model, (3, 8, 8), batch_sizes=(1,), repeats=1).save(path)
    with pytest.raises(ValueError, match=r"'macs': {1: .*2: .*3: "):
        LatencyTable.load(path, model=model.extract(3))
    values = json.loads(path.read_text())
    values['macs']['5'] = values['latency_ms']['1']['5'] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r'num_members.* 4,.* 5'):
        LatencyTable.load(path, model=model)


@pytest.mark.parametrize('key, value, words', [
    ('latency_ms', {}, 'no rows'),
    ('latency_ms', {'1': {}}, 'numbers of members'),
    ('latency_ms', {'1': {'1': 1., '2': 2.}}, 'numbers of members'),
    ('latency_ms', {'1': {'1': 1., '2': 'fast', '4': 3.}}, r"latency_ms\[1\]\[2\].*'fast'"),
    ('latency_ms', {'1': {'1': 1., '2': None, '4': 3.}}, r'latency_ms\[1\]\[2\].*None'),
    ('latency_ms', {'1': {'1': 1., '2': float('nan'), '4': 3.}}, r'latency_ms\[1\]\[2\].*nan'),
    ('latency_ms', {'0': {'1': 1., '2': 2., '4': 3.}}, 'batch_size.* 0'),
    ('macs', {'1': 1, '2': -2, '4': 3}, r'macs\[2\].*-2'),
    ('macs', {}, 'no rows'),
    ('nodes', [1, 2, 3], 'nodes.*3'),
    ('nodes', [1, '2', 4], "nodes.*'2'"),
    ('input_size', [3, 8], 'unpack'),
    ('input_size', [3, 8, -8], 'input_size.*-8'),
    ('dtype', 3, 'dtype.*3'),
    ('environment', {}, 'device'),
    ('environment', [], 'list'),
    ('environment', {'device': 'toaster'}, 'toaster'),
    ('environment', {'device': 'cpu', 'hardware': 3}, 'environment.*3'),
])
def test_a_tampered_table_is_refused(table, tmp_path, key, value, words):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps({**vars(table), key: value}))
    with pytest.raises(ValueError, match=f'path .*{words}'):
        LatencyTable.load(path)


@pytest.mark.parametrize('device', ['cuda:99', 'meta'])
def test_a_table_of_a_device_that_is_not_here(table, tmp_path, device):
    path = tmp_path / 'table.json'
    path.write_text(json.dumps({**vars(table), 'environment': {**table.environment, 'device': device}}))
    if device == 'meta':  # described like the processor
        assert LatencyTable.load(path).environment['device'] == device
    else:
        with pytest.raises(ValueError, match=f'other_hardware.*{device}'):
            LatencyTable.load(path)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"nodes": 3}'])
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / 'table.json'
    path.write_text(text)
    with pytest.raises(ValueError, match=r'path .*table'):
        LatencyTable.load(path)


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(input_size=(1, 8, 8)), ValueError, r'input_size.*\(1, 8, 8\)'),
    (dict(input_size=(3, 8)), ValueError, r'input_size.*\(3, 8\)'),
    (dict(batch_sizes=()), ValueError, r'batch_sizes.*\(\)'),
    (dict(batch_sizes=(1, 0)), ValueError, 'batch_sizes.*0'),
    (dict(batch_sizes=(1.5,)), TypeError, 'batch_sizes.*1.5'),
    (dict(batch_sizes='12'), TypeError, "batch_sizes.*'12'"),
    (dict(num_members=(4, 2)), ValueError, r'schedule.*\(4, 2\)'),
    (dict(repeats=0), ValueError, 'repeats.*0'),
    (dict(repeats=1.5), TypeError, 'repeats.*1.5'),
])
def test_measure_refuses(kwargs, error, words):
    with pytest.raises(error, match=words):
        LatencyTable.measure(tiny_ensemble(), **{'input_size': (3, 8, 8), **kwargs})


def test_measure_refuses_models_that_cannot_predict():
    with pytest.raises(ValueError, match=r'model .*training'):
        LatencyTable.measure(tiny_ensemble().train(), (3, 8, 8))
    with pytest.raises(TypeError, match=r'model .*Linear'):
        LatencyTable.measure(torch.nn.Linear(1, 1), (3, 8, 8))


def test_command(tmp_path, capsys):
    path = tmp_path / 'out.json'
    main(['bench', 'hne_resnet50_c8', '--img-size', '8', '--nodes', *'11112', '--batch-size', '1', '2',
          '--repeats', '1', '--mode', 'folded', '--device', 'cpu', '--output', str(path)])
    table = LatencyTable.load(path)
    assert table.nodes == (1, 1, 1, 1, 2) and list(table.latency_ms) == [1, 2] and list(table.macs) == [1, 2]
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
