"""Accuracy and diversity in 8 bits, for every number of members, beside float32.

    python benchmarks/int8.py --data-dir CIFAR10 --output docs/results/int8

The packaged weights, calibrated with training images (train/CLASS), on the test images (test/CLASS); or, with
`--checkpoint`, those of `timm-hne demo`, calibrated with its training digits.
"""
import argparse
from pathlib import Path

import torch
from common import add_subject, describe_machine, load_images, load_subject, markdown_table, write_json, write_text

from timm_hne import optimize_for_inference, quantize
from timm_hne.prefix import prefix_means
from timm_hne.tree import prefixes

BATCH_SIZE = 250


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument('--calibration-images', type=int, default=512)
    parser.add_argument('--output', type=Path, default=Path('output/int8'))
    args = parser.parse_args()
    model, images, classes = load_subject(args)
    calibration, _ = load_images(args, model, 'train', args.calibration_images)
    forms = {
        'float32': optimize_for_inference(model),
        **{f'{engine}, int8': quantize(model, calibration, engine) for engine in ('openvino', 'onnxruntime')},
    }
    rows, results = [], {}
    for name, form in forms.items():
        logits = torch.cat([form.forward_members(batch) for batch in images.split(BATCH_SIZE)])
        results[name] = {
            n: {
                'top1': 100 * (mean.argmax(dim=1) == classes).double().mean().item(),
                'logit_std': logits[:, :n].std(dim=1, correction=0).mean().item(),
            } for n, mean in zip(prefixes(model.ensemble_size), prefix_means(logits).unbind(1))
        }
        cells = [f'{row["top1"]:.2f} ({row["logit_std"]:.3f})' for row in results[name].values()]
        rows.append([form.mode if name == 'float32' else name, *cells])
    header = ['top-1 in % (Std)', *(f'n = {n}' for n in prefixes(model.ensemble_size))]
    table = (
        f'`python benchmarks/int8.py`, {describe_machine()}\n\n{len(images):,} images, calibrated with '
        f'{len(calibration)} training images.\n\n{markdown_table(header, rows)}')
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / 'int8.md', table)
    write_json(args.output / 'int8.json', results)
    print(table, end='')


if __name__ == '__main__':
    main()
