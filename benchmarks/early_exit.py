"""Accuracy against average MACs: images that leave once they are sure, beside a fixed number of members for all.

    timm-hne demo --output output/demo
    python benchmarks/early_exit.py --checkpoint output/demo/model.safetensors --output docs/results/early_exit

Held-out digits are split in two: thresholds are picked on one half, and the other tells what they achieve.
"""
import argparse
from pathlib import Path

import timm
import torch
from common import markdown_table, write_text
from load import held_out_digits

from timm_hne import calibrate_threshold, early_exit
from timm_hne.cost import member_macs
from timm_hne.demo import IMG_SIZE, MODEL
from timm_hne.inference import CRITERIA
from timm_hne.tree import prefixes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help="the demo's weights")
    parser.add_argument('--max-accuracy-loss', type=float, default=0.005)
    parser.add_argument('--output', type=Path, default=Path('output/early_exit'))
    args = parser.parse_args()
    model = timm.create_model(MODEL, in_chans=1, checkpoint_path=args.checkpoint).eval()
    images, classes = held_out_digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, test = order.chunk(2)
    macs = member_macs(model, IMG_SIZE)

    rows = []
    for n in prefixes(model.ensemble_size):
        correct = model(images[test], num_members=n).argmax(dim=1) == classes[test]
        rows.append([f'n = {n} for all', '', f'{100 * correct.double().mean():.2f}', f'{macs[n] / 1e6:.2f}', n])
    member_logits = model.forward_members(images[held_out])
    for criterion in CRITERIA:
        try:
            point = calibrate_threshold(
                member_logits, classes[held_out], macs, criterion, max_accuracy_loss=args.max_accuracy_loss)
        except ValueError as error:  # even its strictest threshold loses more
            print(f'{criterion}: {error}')
            continue
        result = early_exit(model, images[test], point.threshold, criterion)
        correct = result.logits.argmax(dim=1) == classes[test]
        used = result.num_members.tolist()
        rows.append([
            criterion, f'{point.threshold:.4f}', f'{100 * correct.double().mean():.2f}',
            f'{sum(macs[n] for n in used) / len(used) / 1e6:.2f}', f'{sum(used) / len(used):.2f}',
        ])
    table = markdown_table(['criterion', 'threshold', 'accuracy %', 'million MACs', 'members'], rows)
    print(table)
    write_text(args.output / 'early_exit.md', table)


if __name__ == '__main__':
    main()
