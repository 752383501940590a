"""Evaluate an ensemble for every number of members: `timm-hne eval` as a script."""
import sys

from timm_hne.cli import main

if __name__ == '__main__':
    main(['eval', *sys.argv[1:]])
