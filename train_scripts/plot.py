"""Draw the paper's figures and Table 1: `timm-hne plot` as a script."""
import sys

from timm_hne.cli import main

if __name__ == '__main__':
    main(['plot', *sys.argv[1:]])
