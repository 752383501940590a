"""Accuracy against average MACs: images that leave once they are sure, beside a fixed number of members for all.

    python benchmarks/early_exit.py --data-dir CIFAR10 --output docs/results/early_exit

    timm-hne demo --output output/demo                       # or without a data set, on handwritten digits
    python benchmarks/early_exit.py --checkpoint output/demo/model.safetensors

Images that training never saw are split in two: thresholds are picked on one half, and the other tells what they
achieve. Writes a table, and a plot of the trade-off at all thresholds on the second half.
"""
import argparse
from pathlib import Path

import torch
from common import add_subject, load_subject, markdown_table, write_text

from timm_hne import calibrate_threshold, early_exit
from timm_hne.evaluation.cost import member_macs
from timm_hne.files import write_file
from timm_hne.inference.early_exit import CRITERIA, exit_curve
from timm_hne.tree import prefixes

BATCH_SIZE = 250


def plot(fixed: dict[int, tuple[float, float]], curves: dict[str, list], points: dict[str, tuple], path: Path) -> None:
    """Draw (million MACs, accuracy in %): of fixed n, of all thresholds, and of the calibrated ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    axes.plot(*zip(*fixed.values()), 'ks--', label='the same n for all')
    for index, (criterion, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve), color=f'C{index}', label=criterion)
        if criterion in points:
            axes.plot(*points[criterion], 'o', color=f'C{index}')
    axes.set(xlabel='million MACs of an image, mean', ylabel='accuracy (%)', xscale='log')
    axes.set_xticks([x for x, _ in fixed.values()], [f'{x:.3g}\nn = {n}' for n, (x, _) in fixed.items()])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend()
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=150))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument('--max-accuracy-loss', type=float, default=0.005)
    parser.add_argument('--output', type=Path, default=Path('output/early_exit'))
    args = parser.parse_args()
    model, images, classes = load_subject(args)
    member_logits = torch.cat([model.forward_members(batch) for batch in images.split(BATCH_SIZE)])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, test = order.chunk(2)
    macs = member_macs(model, images.shape[-2:])

    rows, fixed, curves, points = [], {}, {}, {}
    for n in prefixes(model.ensemble_size):
        correct = member_logits[test, :n].mean(dim=1).argmax(dim=1) == classes[test]
        fixed[n] = macs[n] / 1e6, 100 * correct.double().mean().item()
        rows.append([f'n = {n} for all', '', f'{fixed[n][1]:.2f}', f'{fixed[n][0]:.2f}', n])
    for criterion in CRITERIA:
        curve = exit_curve(member_logits[test], classes[test], macs, criterion)
        curves[criterion] = [(point.macs / 1e6, 100 * point.accuracy) for point in curve]
        try:
            point = calibrate_threshold(
                member_logits[held_out], classes[held_out], macs, criterion, max_accuracy_loss=args.max_accuracy_loss)
        except ValueError as error:  # even its strictest threshold loses more
            print(f'{criterion}: {error}')
            continue
        results = [early_exit(model, images[part], point.threshold, criterion) for part in test.split(BATCH_SIZE)]
        predicted = torch.cat([result.logits.argmax(dim=1) for result in results])
        used = torch.cat([result.num_members for result in results]).tolist()
        accuracy = 100 * (predicted == classes[test]).double().mean().item()
        mean_macs = sum(macs[n] for n in used) / len(used) / 1e6
        points[criterion] = mean_macs, accuracy
        rows.append([
            criterion, f'{point.threshold:.4f}', f'{accuracy:.2f}', f'{mean_macs:.2f}', f'{sum(used) / len(used):.2f}'])
    table = (
        f'{"Digits" if args.checkpoint else args.model}: thresholds that lose at most {100 * args.max_accuracy_loss:g} '
        f'points on {len(held_out)} images; what they achieve on {len(test)} others.\n\n'
        + markdown_table(['criterion', 'threshold', 'accuracy %', 'million MACs', 'members'], rows))
    print(table)
    write_text(args.output / 'early_exit.md', table)
    plot(fixed, curves, points, args.output / 'early_exit.png')


if __name__ == '__main__':
    main()
