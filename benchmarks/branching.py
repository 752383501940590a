"""Is it worth it: a timm model trained, branched and co-distilled, beside the same time spent in other ways.

    python benchmarks/branching.py --data-dir CIFAR10 --output docs/results/branching --runs output/branching

On CIFAR-10 (an image folder with train/CLASS and test/CLASS) it trains

    base            the model alone, then branches it into a tree in each of the ways of `hierarchize`:
    copy            all nodes start as those of the base
    perturb         copies with noise, of several strengths
    fresh           new weights in all nodes but the first of each block
    longer          the base alone, for the time of base and tree together
    independent     N networks that share nothing, for that time together

The ways to branch are compared on training images that are held out; the test images are for the report. The time of a
step of each network is measured in one run at the beginning, and the epochs follow from it. What has been trained is in
the folder of the runs, and is not trained again.
"""
import argparse
import json
import re
import statistics
from pathlib import Path

import timm
import torch
from common import markdown_table, paired_medians, write_json
from safetensors.torch import save_file

from timm_hne import HierarchicalEnsemble, HNETask, hierarchize
from timm_hne.evaluation.evaluate import evaluate
from timm_hne.files import write_file, write_text
from timm_hne.process import processor
from timm_hne.training.checkpoint import RunCheckpoint
from timm_hne.training.loader import create_image_loader
from timm_hne.training.recipe import TrainConfig
from timm_hne.training.setup import open_data
from timm_hne.training.trainer import train
from timm_hne.tree import prefixes

WAYS = ('copy', 'fresh', 'perturb 0.05', 'perturb 0.3')
BLOCKS = 5  # of the ResNets, whose stem is a block of its own


def recipe(args: argparse.Namespace, name: str, nodes: tuple[int, ...], epochs: int, **keys) -> TrainConfig:
    """Return the recipe of a run; all but what is given here is the same for all."""
    return TrainConfig(**{
        'data_dir': str(args.data_dir), 'output_dir': str(args.runs / name), 'resume': True, 'in_memory': True,
        'val_fraction': 0.1, 'max_train_images': args.images, 'num_classes': 10, 'img_size': 32,
        'model': 'hne_from_timm', 'model_kwargs': {'base': args.base, 'nodes': list(nodes), 'init': 'fresh'},
        'batch_size': 64, 'opt': 'adamw', 'lr': 2e-3, 'weight_decay': 0.05, 'warmup_epochs': 1, 'seed': args.seed,
        'objective': 'independent' if len(set(nodes)) == 1 else 'hierarchical_codistillation', 'epochs': epochs, **keys,
    })


def base_of(ensemble: HierarchicalEnsemble) -> torch.nn.Module:
    """Return the timm model that the first member of an ensemble is."""
    base = timm.create_model(ensemble.base, num_classes=ensemble.num_classes)
    first = re.compile(r'^(blocks\.\d+\.0|heads\.0)\.')
    state = {first.sub('', name): weight for name, weight in ensemble.state_dict().items() if first.match(name)}
    base.load_state_dict(state)
    return base


def step_times(trees: dict[str, tuple[int, ...]], base: str) -> dict[str, float]:
    """Measure the seconds of a training step of 64 images of each tree, in turn."""
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    steps = {}
    for name, nodes in trees.items():
        model = timm.create_model('hne_from_timm', base=base, nodes=nodes, num_classes=10)
        task = HNETask(model.to(memory_format=torch.channels_last), verbose=False)
        optimizer = torch.optim.AdamW(task.get_trainable_module().parameters())

        def step(task=task, optimizer=optimizer) -> None:
            task(images, labels)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    return paired_medians(steps, repeats=9, warmup=2)


def load_images(config: TrainConfig, split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of the held-out training images ('held out'), or of another split."""
    if split != 'held out':
        config = TrainConfig(**{**vars(config), 'val_split': split, 'val_fraction': 0.})
    _, images, *_ = open_data(config)
    cfg = timm.get_pretrained_cfg(config.model_kwargs['base'])
    config = TrainConfig(**{**vars(config), 'batch_size': 500, 'mean': cfg.mean, 'std': cfg.std})
    return list(create_image_loader(images, config, False, True, torch.device('cpu')))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--runs', type=Path, default=Path('output/branching'), help='folder of the runs')
    parser.add_argument('--output', type=Path, default=Path('output/branching'), help='folder of the report')
    parser.add_argument('--base', default='resnet10t', help='a timm model of five blocks (default: %(default)s)')
    parser.add_argument('--nodes', type=int, nargs=BLOCKS, default=(1, 1, 2, 4, 8))
    parser.add_argument('--images', type=int, default=10000, help='training images (default: %(default)s)')
    parser.add_argument('--base-epochs', type=int, default=8)
    parser.add_argument('--epochs', type=int, default=3, help='of the tree (default: %(default)s)')
    parser.add_argument('--ways', nargs='+', default=WAYS, help="'copy', 'fresh', 'perturb NOISE' (default: all four)")
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    nodes, size = tuple(args.nodes), args.nodes[-1]
    args.runs.mkdir(parents=True, exist_ok=True)

    timed = args.runs / 'seconds.json'
    if not timed.exists():
        trees = {'base': (1,) * BLOCKS, 'tree': nodes, 'independent': (size,) * BLOCKS}
        write_json(timed, step_times(trees, args.base))
    seconds = json.loads(timed.read_text())
    budget = args.base_epochs * seconds['base'] + args.epochs * seconds['tree']
    print(f'seconds of a step: {seconds}; {budget / seconds["base"]:.1f} epochs of the base in all')

    base_run = recipe(args, 'base', (1,) * BLOCKS, args.base_epochs)
    train(base_run, keep_memory=True)
    base = base_of(RunCheckpoint.read(args.runs / 'base' / 'last.pth.tar').create_model())
    ways = {}
    for way in args.ways:
        init, *noise = way.split()
        ways[way] = {'init': init, **({'noise': float(noise[0])} if noise else {})}
    runs = {}
    for name, how in ways.items():
        start = args.runs / f'{name}.safetensors'
        if not start.exists():
            state = {key: weight.contiguous() for key, weight in hierarchize(base, nodes, **how).state_dict().items()}
            write_file(start, lambda path, state=state: save_file(state, path))
        runs[name] = recipe(
            args, name, nodes, args.epochs, lr=1e-3, warmup_epochs=0.5, initial_checkpoint=str(start))
    runs['longer'] = recipe(args, 'longer', (1,) * BLOCKS, round(budget / seconds['base']))
    runs['independent'] = recipe(args, 'independent', (size,) * BLOCKS, round(budget / seconds['independent']))
    for name, config in runs.items():
        print(f'{name}: {config.epochs} epochs', flush=True)
        train(config, keep_memory=True)

    images = {split: load_images(base_run, split) for split in ('held out', 'test')}
    results = {}
    for name, config in {'base': base_run, **runs}.items():
        model = RunCheckpoint.read(args.runs / name / 'last.pth.tar').create_model().eval()
        results[name] = {'epochs': config.epochs, **{
            split: evaluate(model, batches)['members'] for split, batches in images.items()}}
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    report = {'machine': processor(), 'settings': settings, 'seconds': seconds, 'runs': results}
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / 'branching.json', report)
    write_text(args.output / 'branching.md', to_markdown(report, list(ways)))
    shown = ('base', best_way(results, list(ways)), 'longer', 'independent')
    write_file(args.output / 'branching.png', lambda path: plot({name: results[name]['test'] for name in shown}, path))
    print((args.output / 'branching.md').read_text(), end='')


def best_way(results: dict[str, dict], ways: list[str]) -> str:
    """Return the way to branch that is the most accurate on held-out training images, in the mean over n."""
    return max(ways, key=lambda way: statistics.mean(row['top1'] for row in results[way]['held out']))


def to_markdown(report: dict, ways: list[str]) -> str:
    """Return the report as Markdown: the ways to branch on held-out images, and the rest on the test images."""
    runs, settings, seconds = report['runs'], report['settings'], report['seconds']
    points = prefixes(settings['nodes'][-1])

    def table(names: list[str], split: str) -> str:
        rows = []
        for name in names:
            found = {row['num_members']: row for row in runs[name][split]}
            cells = [f'{found[n]["top1"]:.1f}' if n in found else '-' for n in points]
            last = found[max(found)]
            rows.append([name, runs[name]['epochs'], *cells, f'{last["logit_std"]:.2f}', f'{last["macs"] / 1e6:.1f}'])
        return markdown_table(['', 'epochs', *(f'n = {n}' for n in points), 'Std', 'M MACs, all'], rows)

    best = best_way(runs, ways)
    options = ' '.join(f'--{key.replace("_", "-")} {settings[key]}' for key in ('images', 'base_epochs', 'epochs'))
    return (
        f'`python benchmarks/branching.py {options}`, {report["machine"]}: {settings["base"]}, nodes '
        f'{tuple(settings["nodes"])}, {settings["images"]:,} images of CIFAR-10 at 32x32, one seed. A step takes '
        f'the tree {seconds["tree"] / seconds["base"]:.1f} times and independent networks '
        f'{seconds["independent"] / seconds["base"]:.1f} times as long as the base.\n\n'
        f'Ways to branch, on 5,000 held-out training images (top-1 in %):\n\n{table(ways, "held out")}\n'
        f'The best of them beside the same time spent otherwise, on the 10,000 test images:\n\n'
        f'{table(["base", "longer", best, "independent"], "test")}'
    )


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Draw accuracy against MACs of each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.plot([row['macs'] / 1e6 for row in rows], [row['top1'] for row in rows], 'o-', label=name)
    axes.set(xlabel='million MACs of one image', ylabel='top-1 accuracy (%)', xscale='log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter('{x:.3g}')
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format='png', dpi=120, metadata={'Software': None})


if __name__ == '__main__':
    main()
