#!/usr/bin/env python3
"""Arrange Tiny-ImageNet-200 as folders of classes, named in English, as `timm-hne train` and timm's readers want them.

    python train_scripts/tiny_imagenet.py tiny-imagenet-200 DEST

`tiny-imagenet-200` is what its archive holds: train/WNID/images, val/images, val/val_annotations.txt, wnids.txt and
words.txt. DEST gets train/CLASS and validation/CLASS; the files are hard links where the file system has them, copies
elsewhere.
"""
import argparse
import os
import shutil
from pathlib import Path


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def arrange(source: Path, destination: Path) -> None:
    """Fill `destination`, which comes into being as a whole or not at all.

    Raises:
        FileNotFoundError: `source` is not such a folder.
        FileExistsError: There is something at `destination`.
    """
    if destination.exists():
        raise FileExistsError(f'destination {destination} exists; choose another.')
    words = dict(line.split('\t') for line in (source / 'words.txt').read_text().splitlines())
    names = {wnid: words[wnid].split(',')[0].strip() for wnid in (source / 'wnids.txt').read_text().split()}
    annotations = [line.split('\t')[:2] for line in (source / 'val' / 'val_annotations.txt').read_text().splitlines()]
    partial = destination.with_name(destination.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    for wnid, name in names.items():
        for file in (source / 'train' / wnid / 'images').iterdir():
            place(file, partial / 'train' / name / file.name)
    for file, wnid in annotations:
        place(source / 'val' / 'images' / file, partial / 'validation' / names[wnid] / file)
    partial.rename(destination)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', type=Path, help='folder tiny-imagenet-200')
    parser.add_argument('destination', type=Path, help='folder to make')
    args = parser.parse_args()
    arrange(args.source, args.destination)


if __name__ == '__main__':
    main()
