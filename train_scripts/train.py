#!/usr/bin/env python3
"""Train an ensemble by a recipe: `timm-hne train` as a script."""
import sys

from timm_hne.cli import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
