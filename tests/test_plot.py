import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest

from timm_hne.cli import main
from timm_hne.evaluation import figures


@pytest.fixture(scope='module')
def plot():
    return SimpleNamespace(**vars(figures), main=lambda arguments: main(['plot', *arguments]))


_COUNT = itertools.count()  # every run has weights of its own


def make_run(objective='independent', alpha=None, nodes=(1, 2, 4, 8, 16), data='cifar10', shift=0., **kwargs):
    size = nodes[-1]
    return {
        'model': 'hne_resnet50_c8', 'nodes': list(nodes), 'data': data, 'split': 'test', 'num_images': 10,
        'objective': objective, 'alpha': alpha, 'epochs': 3, 'seed': 0, 'weights_sha256': f'{next(_COUNT):064x}',
        'members': [
            {'num_members': n, 'top1': 80 + n / 4 + shift, 'logit_std': n / 8, 'macs': 10 ** 6 * (10 + n)}
            for n in range(1, size + 1)
        ],
        'member_top1': [80 + shift + m / 10 for m in range(size)],
        **kwargs,
    }


@pytest.fixture
def write(tmp_path):
    def write(*runs):
        paths = [tmp_path / f'run{i}.json' for i in range(len(runs))]
        for path, run in zip(paths, runs):
            path.write_text(json.dumps(run))
        return [str(path) for path in paths]
    return write


def lines_of(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_paper_table(plot):
    runs = plot.paper_runs()
    assert len(runs) == 16
    found = {(run['model'], run['data'], run['objective']): [row['top1'] for row in run['members']] for run in runs}
    assert len(found) == 16
    # The corners of Table 1.
    assert found['hne_resnet50_c8', 'cifar10', 'independent'] == [91.7, 92.4, 93.2, 93.7, 94.0]
    assert found['hne_resnet50_c8', 'cifar100', 'hierarchical_codistillation'] == [71.1, 71.7, 73.4, 74.5, 75.3]
    assert found['hne_resnet50_c16', 'cifar10', 'independent'] == [93.6, 94.2, 94.8, 95.0, 95.2]
    assert found['hne_resnet50_c16', 'cifar100', 'hierarchical_codistillation'] == [76.1, 77.2, 78.0, 79.0, 79.8]
    # What section 4.2 says of it.
    for model, data, _ in found:
        ours = found[model, data, 'hierarchical_codistillation']
        for objective in ('independent', 'hierarchical', 'independent+hierarchical'):
            assert all(a >= b for a, b in zip(ours, found[model, data, objective]))


def test_fig4_shows_every_prefix_and_the_paper(plot, write):
    runs = [make_run(), make_run('codistillation', 0.1), make_run('codistillation', 0.5, data='cifar100', shift=-9.)]
    figure = plot.FIGURES['fig4'](plot.load_runs(write(*runs)))
    accuracy10, std10, accuracy100, std100 = figure.axes
    assert lines_of(accuracy10).keys() == {
        '$L_I$', '$L_I$, paper (200 epochs)', r'$L_I + L_D$, $\alpha$ = 0.1'}
    assert lines_of(accuracy10)['$L_I$'] == [[10 + n, 80 + n / 4] for n in range(1, 17)]
    assert lines_of(accuracy10)['$L_I$, paper (200 epochs)'] == [
        [11, 91.7], [12, 92.4], [14, 93.2], [18, 93.7], [26, 94.0]]
    assert lines_of(std10)['$L_I$'] == [[10 + n, n / 8] for n in range(1, 17)]
    assert lines_of(accuracy100) == {r'$L_I + L_D$, $\alpha$ = 0.5': [[10 + n, 71 + n / 4] for n in range(1, 17)]}
    assert set(lines_of(std10)) == {'$L_I$', r'$L_I + L_D$, $\alpha$ = 0.1'}
    colours = {line.get_label(): line.get_color() for axis in figure.axes for line in axis.get_lines()}
    assert len({colours[label] for label in colours if 'paper' not in label}) == 3
    assert 'CIFAR-100' in std100.get_title()


def test_fig5_names_sharing_schemes(plot, write):
    schemes = [(1, 2, 4, 8, 16), (1, 1, 1, 16, 16), (16,) * 5, (1, 1, 2, 8, 16)]
    figure = plot.FIGURES['fig5'](plot.load_runs(write(*(make_run(nodes=nodes) for nodes in schemes)), False))
    assert list(lines_of(figure.axes[0])) == [
        'hierarchical', 'multi-branch (1, 1, 1, 16, 16)', 'independent networks', '(1, 1, 2, 8, 16)']


def test_fig6_shows_operating_points(plot, write):
    paths = write(make_run('hierarchical_codistillation', 0.5), make_run(shift=1., nodes=(1, 1, 1, 3, 6)))
    (axis,) = plot.FIGURES['fig6'](plot.load_runs(paths)).axes
    lines = lines_of(axis)
    assert [x for x, _ in lines[r'HNE small, $L_I + L_{HD}$, $\alpha$ = 0.5, hierarchical']] == [11, 12, 14, 18, 26]
    assert [x for x, _ in lines['HNE small, $L_I$, (1, 1, 1, 3, 6)']] == [11, 12, 14, 16]
    assert sum('paper' in label for label in lines) == 1
    assert sorted(int(text.get_text()) for text in axis.texts) == [1, 2, 4, 6, 8, 16]


def test_fig9_shows_members(plot, write):
    runs = [make_run(), make_run('hierarchical_codistillation', 0.75)]
    first, second = plot.FIGURES['fig9'](plot.load_runs(write(*runs))).axes
    assert [bar.get_height() for bar in first.patches] == runs[0]['member_top1']
    assert lines_of(first)['first n members'] == [[n, 80 + n / 4] for n in range(1, 17)]
    assert 'first n members, paper (200 epochs)' in lines_of(first)
    assert list(lines_of(second)) == ['first n members']  # the paper has no alpha of 0.75
    assert first.get_ylim() == second.get_ylim()


def test_runs_are_told_apart_by_what_differs(plot):
    same = [make_run(seed=0), make_run(seed=1)]
    assert plot.label_runs(same, 'objective') == ['$L_I$, seed 0', '$L_I$, seed 1']
    assert plot.label_runs([make_run(epochs=3), make_run(epochs=9)], 'sharing') == [
        'hierarchical, 3 epochs', 'hierarchical, 9 epochs']


def test_runs_are_told_apart_by_their_recipes_alone(plot, write):
    recipe = dict(opt='sgd', lr=0.1, phases=[], amp=True)
    same = [make_run(recipe=recipe), make_run(recipe={**recipe, 'opt': 'adamw', 'lr': 0.01, 'phases': [{}]}, seed=1)]
    runs = plot.load_runs(write(*same, make_run(recipe=recipe, epochs=9)))
    assert plot.label_runs(runs[:2], 'objective') == [
        '$L_I$, seed 0, opt=sgd, lr=0.1', '$L_I$, seed 1, opt=adamw, lr=0.01']
    assert [run['apart'] for run in runs] == ['opt=sgd, lr=0.1', 'opt=adamw, lr=0.01', '']
    table = plot.make_table(runs)
    assert '| measured, opt=adamw, lr=0.01 |' in table and '| 9 | 0 | measured |' in table


def test_table_puts_the_paper_beside_the_runs(plot, write, tmp_path):
    runs = [make_run(), make_run(data='digits', seed=None), make_run('hierarchical'), make_run(epochs=9)]
    output = tmp_path / 'table.md'
    plot.main(['table1', *write(*runs), '--output', str(output)])
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in output.read_text().splitlines() if '|' in line]
    assert rows[0][7:] == ['1', '2', '4', '8', '16']
    assert [row[1:3] + row[6:8] for row in rows[2:]] == [
        ['CIFAR-10', '$L_I$', 'paper', '91.7'],
        ['CIFAR-10', '$L_I$', 'measured', '80.2'],
        ['CIFAR-10', '$L_H$', 'paper', '91.6'],
        ['CIFAR-10', '$L_H$', 'measured', '80.2'],
        ['CIFAR-10', '$L_I$', 'measured', '80.2'],
        ['digits', '$L_I$', 'measured', '80.2'],
    ]
    assert all(len(row) == 12 for row in rows)


def test_runs_of_several_seeds_are_averaged(plot, write, capsys):
    paths = write(make_run(shift=1.), make_run('hierarchical'), make_run(seed=3, shift=4.))
    runs = plot.load_runs(paths)
    assert [(run['objective'], run['seed']) for run in runs] == [('independent', '0, 3'), ('hierarchical', '0')]
    assert [row['top1'] for row in runs[0]['members']] == [80 + n / 4 + 2.5 for n in range(1, 17)]
    assert runs[0]['member_top1'] == pytest.approx([82.5 + m / 10 for m in range(16)])
    assert runs[0]['members'][3]['macs'] == 14 * 10 ** 6
    plot.main(['table1', *paths])
    table = capsys.readouterr().out
    assert '| 3 | 0, 3 | measured | 82.8 ± 2.1 | 83.0 ± 2.1 | 83.5 ± 2.1 | 84.5 ± 2.1 | 86.5 ± 2.1 |' in table
    assert '| 3 | 0 | measured | 80.2 | 80.5 |' in table
    other = make_run(seed=2, recipe={'lr': 0.1})
    apart = make_run(seed=None), make_run(seed=None), make_run(seed=1), other, make_run(seed=1)
    assert [run['seed'] for run in plot.load_runs(write(*apart))] == [None, None, '1', '2', '1']


def test_table_can_say_what_was_not_run(plot, write, capsys):
    plot.main(['table1', *write(make_run()), '--missing'])
    table = capsys.readouterr().out
    assert table.count('| paper |') == 16
    assert table.count('| measured |') == 1
    assert table.count('|  |  | not run |  |  |  |  |  |') == 15
    lines = table.splitlines()
    for paper, ours in zip(lines[4::2], lines[5::2]):  # the setting is named before epochs, seed and source
        assert paper.split('|')[1:5] == ours.split('|')[1:5]


def test_table_of_the_paper_alone(plot, capsys):
    plot.main(['table1'])
    assert capsys.readouterr().out.count('| paper |') == 16


@pytest.mark.parametrize('what', ['fig4', 'fig5', 'fig6', 'fig9'])
@pytest.mark.parametrize('suffix', ['.png', '.svg'])
def test_figures_are_written(plot, write, tmp_path, what, suffix):
    paths = write(make_run(), make_run('codistillation', 0.5, data='cifar100'))
    output = tmp_path / 'out' / f'figure{suffix}'
    output.parent.mkdir()
    plot.main([what, *paths, '--output', str(output)])
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    start = b'\x89PNG' if suffix == '.png' else b'<?xml'
    assert output.read_bytes().startswith(start)


@pytest.mark.parametrize('arguments, message', [
    (['fig4', '{good}'], '--output is needed'),
    (['fig4', '--output', 'a.png'], 'at least one evaluation'),
    (['fig4', '{good}', '--output', 'a.md'], r'must end in \.png or \.svg or \.pdf'),
    (['table1', '{good}', '--output', 'a.png'], r'must end in \.md'),
    (['table1', '--no-paper'], '--no-paper'),
    (['table1', '{good}', '--no-paper', '--missing'], '--no-paper'),
    (['fig4', '{good}', '{tmp}/none.json', '--output', 'a.png'], r'none\.json'),
    (['fig4', '{tmp}/text.json', '--output', 'a.png'], r'text\.json is not the JSON file of an evaluation'),
    (['fig4', '{tmp}/other.json', '--output', 'a.png'], r'other\.json .* it lacks alpha, data'),
    (['fig4', '{tmp}/none.json', '--output', '{tmp}/none/a.png'], r"there is no folder '.*none'"),
    (['table1', '{tmp}/list.json'], r'list\.json is not the JSON file of an evaluation: it lacks alpha'),
])
def test_bad_input(plot, write, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text.json').write_text('text')
    (tmp_path / 'list.json').write_text('[]')
    (tmp_path / 'other.json').write_text('{"model": "x"}')
    (good,) = write(make_run())
    with pytest.raises(SystemExit) as caught:
        plot.main([argument.format(good=good, tmp=tmp_path) for argument in arguments])
    assert caught.value.code != 0
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(('change', 'message'), [
    ({'members': []}, r'members .*1 .*16.*\[\]'),
    ({'members': None}, 'members'),
    ({'members': make_run()['members'][:3]}, r'members .*1 .*16.*\[1, 2, 3\]'),
    ({'members': [{**row, 'macs': None} for row in make_run()['members']]}, 'macs .*1 .*None'),
    ({'members': [{**row, 'top1': float('nan')} for row in make_run()['members']]}, 'top1 .*1 .*nan'),
    ({'member_top1': []}, 'member_top1 .*16'),
    ({'member_top1': ['a'] * 16}, "member_top1 .*'a'"),
    ({'nodes': [1, 3, 2, 4, 16]}, 'nodes'),
    ({'nodes': None}, 'nodes'),
])
def test_broken_evaluations(plot, write, change, message):
    with pytest.raises(ValueError, match=rf'run1\.json .*{message}'):
        plot.load_runs(write(make_run(), {**make_run(), **change}))


def test_data_without_published_numbers(plot, write, capsys):
    plot.main(['table1', *write(make_run(data='images'))])
    errors = capsys.readouterr().err
    assert "numbers are of cifar10 and cifar100, not of 'images'" in errors and '--data-name' in errors
    plot.main(['table1', *write(make_run(data='images')), '--no-paper'])
    plot.main(['table1', *write(make_run())])
    assert not capsys.readouterr().err


def test_without_matplotlib(plot, write, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit):
        plot.main(['fig4', *write(make_run()), '--output', str(tmp_path / 'a.png')])
    assert "pip install 'timm-hne[plots]'" in capsys.readouterr().err
    plot.main(['table1', *write(make_run())])
