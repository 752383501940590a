"""The paper's figures and Table 1, drawn from any number of evaluations; see `timm-hne plot`."""
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..files import write_file, write_text
from ..tree import prefixes, validate_nodes

__all__ = ['DATA', 'FIGURES', 'distinct', 'load_runs', 'make_table', 'save']

PAPER = Path(__file__).with_name('paper_table1.json')

OBJECTIVES = {
    'independent': r'$L_I$',
    'hierarchical': r'$L_H$',
    'independent+hierarchical': r'$L_I + L_H$',
    'codistillation': r'$L_I + L_D$',
    'hierarchical_codistillation': r'$L_I + L_{HD}$',
}
MODELS = {'hne_resnet50_c8': 'HNE small', 'hne_resnet50_c16': 'HNE', 'hne_mobilenetv2_075_e8': 'HNE MobileNetV2'}
DATA = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}
SETTING = ('model', 'data', 'nodes', 'objective', 'alpha')  # what makes a run one of the paper's Table 1
# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is hard to see on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9', '#E69F00', '#000000')
MARKERS = 'osD^vPX'

Run = dict[str, Any]


def load_runs(paths: list[str], with_paper: bool = True) -> list[Run]:
    """Read evaluations and average those of several seeds.

    `run['paper']` becomes what the paper published, or None; `run['apart']` says what of its recipe tells a run from
    those that it has the rest in common with, or is empty.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is no evaluation.
    """
    runs = []
    for path in paths:
        try:
            run = json.loads(Path(path).read_text(encoding='utf-8'))
            check_run(run)
        except (ValueError, TypeError) as error:
            raise ValueError(f'{path} is not the JSON file of an evaluation: {str(error).rstrip(".")}.') from error
        runs.append(run)
    runs = average_seeds(runs)
    return [
        {**run, 'apart': tell_apart(run, runs), 'paper': find_paper_run(run) if with_paper else None} for run in runs]


def check_run(run: Run) -> None:
    """Check that a run has all that is drawn.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: Something is missing.
    """
    needed = {'model', 'nodes', 'data', 'objective', 'alpha', 'epochs', 'seed', 'members', 'member_top1'}
    if missing := needed - set(run):
        raise ValueError(f'it lacks {", ".join(sorted(missing))}')
    size = validate_nodes(run['nodes'])[-1]
    rows = run['members'] if isinstance(run['members'], list) else []
    found = [row.get('num_members') if isinstance(row, dict) else row for row in rows]
    if found != [*range(1, size + 1)]:
        raise ValueError(f'its members must be those with num_members 1 to {size}, got {found}')
    if not isinstance(run['member_top1'], list) or len(run['member_top1']) != size:
        raise ValueError(f'its member_top1 must be a list of {size} numbers, got {run["member_top1"]!r}')
    values = [(f'{key} of {row["num_members"]} members', row.get(key))
              for row in rows for key in ('top1', 'logit_std', 'macs')]
    for name, value in [*values, *(('member_top1', top1) for top1 in run['member_top1'])]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError(f'its {name} must be a finite number, got {value!r}')


def average_seeds(runs: list[Run]) -> list[Run]:
    """Return the mean of every group of runs that differ in nothing but their seed; `seed` becomes all of theirs.

    With several seeds, `top1_std` of a number of members is the standard deviation of the accuracy over them.
    """
    own = ('seed', 'weights_sha256', 'members', 'member_top1')
    groups: list[list[Run]] = []

    def setting(run: Run) -> Run:
        return {key: value for key, value in run.items() if key not in own}

    for run in runs:
        for group in groups:
            seeds = [other['seed'] for other in group]
            if setting(group[0]) == setting(run) and None not in (*seeds, run['seed']) and run['seed'] not in seeds:
                group.append(run)
                break
        else:
            groups.append([run])
    averaged = []
    for group in groups:
        averaged.append({
            **group[0],
            'seed': ', '.join(str(run['seed']) for run in group if run['seed'] is not None) or None,
            'members': [
                {key: fmean(row[key] for row in rows) for key in ('top1', 'logit_std', 'macs')}
                | {'num_members': rows[0]['num_members']}
                | ({'top1_std': stdev(row['top1'] for row in rows)} if len(rows) > 1 else {})
                for rows in zip(*(run['members'] for run in group))
            ],
            'member_top1': [fmean(values) for values in zip(*(run['member_top1'] for run in group))],
        })
    return averaged


def tell_apart(run: Run, runs: list[Run]) -> str:
    """Name the plain values of a recipe in which runs differ that have all else in common."""
    def common(run: Run) -> list:
        return [run[key] for key in (*SETTING, 'epochs')]

    recipes = [other.get('recipe') or {} for other in runs if common(other) == common(run)]
    own = run.get('recipe') or {}
    names = [name for name, value in own.items() if isinstance(value, (bool, int, float, str))
             and any(recipe.get(name) != value for recipe in recipes)]
    return ', '.join(f'{name}={own[name]}' for name in names)


def paper_runs() -> list[Run]:
    """Return the paper's Table 1 in the form of evaluations that have nothing but the accuracy."""
    table = json.loads(PAPER.read_text(encoding='utf-8'))
    return [
        {
            **row,
            'nodes': table['nodes'],
            'epochs': table['epochs'],
            'seed': None,
            'members': [{'num_members': n, 'top1': top1} for n, top1 in zip(table['num_members'], row['top1'])],
        }
        for row in table['rows']
    ]


def find_paper_run(run: Run) -> Run | None:
    """Return what the paper published about a run, with the MACs of the run, or None."""
    for paper in paper_runs():
        if all(paper[key] == run[key] for key in SETTING):
            macs = {row['num_members']: row['macs'] for row in run['members']}
            return {**paper, 'members': [{**row, 'macs': macs[row['num_members']]} for row in paper['members']]}
    return None


def operating_points(run: Run) -> list[dict[str, float]]:
    """Return the metrics with 1, 2, 4, ..., N members (Eq. 5)."""
    return [row for row in run['members'] if row['num_members'] in prefixes(run['nodes'][-1])]


def sharing(run: Run) -> str:
    """Name a sharing scheme (Fig. 5)."""
    nodes = tuple(run['nodes'])
    if set(nodes) == {nodes[-1]}:
        return 'independent networks'
    if set(nodes) == {1, nodes[-1]}:
        return f'multi-branch {nodes}'
    if nodes == prefixes(nodes[-1]):
        return 'hierarchical'
    return str(nodes)


def objective(run: Run) -> str:
    """Name an objective by its equation."""
    name = OBJECTIVES.get(run['objective'], run['objective'] or 'unknown objective')
    return name if run['alpha'] is None else rf'{name}, $\alpha$ = {run["alpha"]}'


TRAITS = {
    'model': lambda run: MODELS.get(run['model'], run['model']),
    'objective': objective,
    'sharing': sharing,
    'epochs': lambda run: '' if run['epochs'] is None else f'{run["epochs"]} epochs',
    'seed': lambda run: '' if run['seed'] is None else f'seed {run["seed"]}',
    'recipe': lambda run: run.get('apart', ''),
}


def label_runs(runs: list[Run], main: str, apart: tuple[str, ...] = ()) -> list[str]:
    """Name runs by a trait, and by the others in which they differ, except those which the figure keeps apart."""
    names = []
    for trait, describe in TRAITS.items():
        values = [describe(run) for run in runs]
        if trait == main:
            names.insert(0, values)
        elif trait not in apart and len(set(values)) > 1:
            names.append(values)
    return [', '.join(filter(None, parts)) for parts in zip(*names)]


def distinct(runs: list[Run], key: str) -> list:
    return list(dict.fromkeys(run[key] for run in runs))


def new_figure(rows: int, columns: int, width: float, height: float):
    """Create a figure with panels of a size in inches; return it and its axes, rows x columns."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figures need matplotlib: pip install 'timm-hne[plots]'.") from error
    figure = Figure(figsize=(columns * width, rows * height + 0.8), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    return figure, axes


def draw_legend(figure, axes) -> None:
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    columns = max(1, int(figure.get_figwidth() // 3.4))
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=columns, frameon=False)


def draw_line(axis, run: Run, metric: str, label: str, colour: int, all_sizes: bool) -> None:
    """Draw a metric against MACs, and the paper's if there is one, with markers at the operating points."""
    # Every round through the colours pairs them with other markers.
    marker = MARKERS[(colour + colour // len(COLOURS)) % len(MARKERS)]
    style = dict(color=COLOURS[colour % len(COLOURS)], marker=marker, markersize=5)
    sizes = prefixes(run['nodes'][-1])
    rows = run['members'] if all_sizes else operating_points(run)
    marked = [index for index, row in enumerate(rows) if row['num_members'] in sizes]
    axis.plot(
        [row['macs'] / 1e6 for row in rows], [row[metric] for row in rows], label=label, markevery=marked, **style)
    paper = run['paper']
    if paper is not None and metric == 'top1':
        axis.plot(
            [row['macs'] / 1e6 for row in paper['members']], [row['top1'] for row in paper['members']],
            linestyle='--', markerfacecolor='white', alpha=0.7,
            label=f'{label}, paper ({paper["epochs"]} epochs)', **style)


def draw_diversity(runs: list[Run], main: str):
    """Draw Fig. 4 (`main` is 'objective') or Fig. 5 ('sharing')."""
    models, data = distinct(runs, 'model'), distinct(runs, 'data')
    figure, axes = new_figure(len(models), 2 * len(data), 4., 3.2)
    labels = label_runs(runs, main, apart=('model',))
    colours = list(dict.fromkeys(labels))
    for run, label in zip(runs, labels):
        row, column = models.index(run['model']), 2 * data.index(run['data'])
        for axis, metric, name in zip(axes[row, column:], ('top1', 'logit_std'), ('Accuracy (%)', 'Std of logits')):
            draw_line(axis, run, metric, label, colours.index(label), all_sizes=True)
            axis.set_title(f'{TRAITS["model"](run)}, {DATA.get(run["data"], run["data"])}', fontsize='medium')
            axis.set(xlabel='MACs (millions)', ylabel=name)
    hide_empty(axes)
    draw_legend(figure, axes)
    return figure


def draw_operating_curve(runs: list[Run]):
    """Draw Fig. 6."""
    data = distinct(runs, 'data')
    figure, axes = new_figure(1, len(data), 5.5, 4.)
    labels = label_runs(runs, 'model')
    colours = list(dict.fromkeys(labels))
    for axis, name in zip(axes.flat, data):
        highest = {}
        for run, label in zip(runs, labels):
            if run['data'] == name:
                draw_line(axis, run, 'top1', label, colours.index(label), all_sizes=False)
                for row in operating_points(run) + (run['paper']['members'] if run['paper'] else []):
                    point = row['num_members'], row['macs'] / 1e6
                    highest[point] = max(row['top1'], highest.get(point, 0.))
        for (num_members, macs), top1 in highest.items():
            axis.annotate(
                num_members, (macs, top1), xytext=(0, 6), textcoords='offset points', ha='center', fontsize='x-small')
        axis.set_title(DATA.get(name, name), fontsize='medium')
        axis.set_xscale('log', base=2)
        axis.xaxis.set_major_formatter('{x:g}')
        axis.set(xlabel='MACs (millions); the numbers are members', ylabel='Accuracy (%)')
    draw_legend(figure, axes)
    return figure


def draw_members(runs: list[Run]):
    """Draw Fig. 9."""
    groups = {}
    for run, label in zip(runs, label_runs(runs, 'objective', apart=('model',))):
        groups.setdefault((run['model'], run['data']), []).append((run, label))
    figure, axes = new_figure(len(groups), max(map(len, groups.values())), 3.6, 3.)
    for panels, group in zip(axes, groups.values()):
        drawn = [part for run, _ in group for part in (run, run['paper']) if part is not None]
        values = [row['top1'] for run in drawn for row in run['members']]
        values += [top1 for run, _ in group for top1 in run['member_top1']]
        margin = 0.08 * (max(values) - min(values)) + 0.1
        for axis, (run, label) in zip(panels, group):
            sizes = [row['num_members'] for row in run['members']]
            axis.bar(sizes, run['member_top1'], color='#BBBBBB', label='each member alone')
            axis.plot(
                sizes, [row['top1'] for row in run['members']], color=COLOURS[0], marker='o', markersize=4,
                label='first n members')
            if (paper := run['paper']) is not None:
                axis.plot(
                    [row['num_members'] for row in paper['members']], [row['top1'] for row in paper['members']],
                    color=COLOURS[1], marker='s', markersize=4, markerfacecolor='white', linestyle='--',
                    label=f'first n members, paper ({paper["epochs"]} epochs)')
            axis.set_ylim(min(values) - margin, max(values) + margin)
            axis.set_xticks(prefixes(run['nodes'][-1]))
            axis.set_title(
                f'{TRAITS["model"](run)}, {DATA.get(run["data"], run["data"])}\n{label}', fontsize='medium')
            axis.set(xlabel='Member, or number of members n', ylabel='Accuracy (%)')
    hide_empty(axes)
    draw_legend(figure, axes)
    return figure


def hide_empty(axes) -> None:
    for axis in axes.flat:
        axis.set_visible(axis.has_data())


def accuracy(row: dict[str, float]) -> str:
    """Write an accuracy in %, with the standard deviation over the seeds if there are several."""
    return f'{row["top1"]:.1f}' + (f' ± {row["top1_std"]:.1f}' if 'top1_std' in row else '')


def make_table(runs: list[Run], missing: bool = False) -> str:
    """Render Table 1: the runs, each below what the paper published about it; the paper's whole table without runs.

    Args:
        runs: What `load_runs` returned.
        missing: List what the paper has and the runs have not, too.
    """
    rows = []
    for run in runs:
        rows += [('paper', run['paper']), ('measured', run)]
    done = [[run[key] for key in SETTING] for run in runs]
    if missing or not runs:
        for paper in paper_runs():
            if [paper[key] for key in SETTING] not in done:
                rows += [('paper', paper)]
                rows += [('not run', {**paper, 'epochs': None, 'members': []})] if missing else []
    rows = [row for index, row in enumerate(rows) if row[1] is not None and row not in rows[:index]]
    groups = list(dict.fromkeys((run['model'], run['data']) for _, run in rows))
    rows.sort(key=lambda row: groups.index((row[1]['model'], row[1]['data'])))
    sizes = sorted({n for _, run in rows for n in prefixes(run['nodes'][-1])})
    heads = ['Model', 'Data', 'Objective', 'Sharing', 'Epochs', 'Seed', 'Source', *map(str, sizes)]
    lines = [f'| {" | ".join(heads)} |', f'|{" --- |" * 7}{" ---: |" * len(sizes)}']
    for source, run in rows:
        points = {row['num_members']: row for row in operating_points(run)}
        values = [
            TRAITS['model'](run),
            DATA.get(run['data'], run['data']),
            objective(run),
            sharing(run),
            *('' if run[key] is None else str(run[key]) for key in ('epochs', 'seed')),
            ', '.join(filter(None, (source, TRAITS['recipe'](run)))),
            *(accuracy(points[n]) if n in points else '' for n in sizes),
        ]
        lines.append(f'| {" | ".join(values)} |')
    return '\n'.join(['Accuracy (%) by the number of members evaluated.', '', *lines]) + '\n'


def save(path: Path, figure) -> None:
    """Write a figure, or text."""
    if isinstance(figure, str):
        write_text(path, figure)
    else:
        write_file(path, lambda temporary: figure.savefig(temporary, dpi=150))


FIGURES = {
    'fig4': lambda runs: draw_diversity(runs, 'objective'),
    'fig5': lambda runs: draw_diversity(runs, 'sharing'),
    'fig6': draw_operating_curve,
    'fig9': draw_members,
}
