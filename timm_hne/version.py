"""The version of this package, and that of timm which it needs."""
import re
from pathlib import Path

__all__ = ['__version__', 'check_timm']

__version__ = '0.1.0'

NEEDED_TIMM = '1.0.31'


def check_timm() -> None:
    """Check that the timm at hand is not older than the one that this package needs.

    Raises:
        ImportError: It is. Mostly this is that of a clone, whose folder Python searches first for its scripts.
    """
    from timm import version

    found, needed = (tuple(map(int, re.findall(r'\d+', text)[:3])) for text in (version.__version__, NEEDED_TIMM))
    if found < needed:
        raise ImportError(
            f'timm_hne needs timm {NEEDED_TIMM} or later, but Python has found {version.__version__} in '
            f"{Path(version.__file__).parent}. If this is a clone of timm whose script you have started, start it "
            'by `timm-hne run SCRIPT ...`, which uses the installed timm; if not, `pip install -U timm`.', name='timm')
