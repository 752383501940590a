"""Makes the models of timm_hne known to timm in every process, without an import of timm_hne.

PyTorch calls each entry point of the group `torch.backends` at the end of `import torch`
(https://docs.pytorch.org/tutorials/unstable/python_extension_autoload.html), and timm imports PyTorch before its own
models. timm_hne declares `arm` there. It imports nothing: it leaves a finder on `sys.meta_path`, which waits for
`timm.models`, imports timm_hne right after that module has run, and withdraws.

`TIMM_HNE_AUTOLOAD=0` in the environment turns this off; `import timm_hne` then leaves the finder there, or registers
the models at once if timm is imported already.
"""

import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

_TIMM_MODELS = 'timm.models'


def arm() -> None:
    """Import timm_hne as soon as `timm.models` is there: at once, or right after it has been imported.

    Calling it again changes nothing. An import of `timm.models` that fails leaves it armed for the next one.
    """
    if os.environ.get('TIMM_HNE_AUTOLOAD') != '0' and not watch():
        _import_timm_hne()


def watch() -> bool:
    """Wait for `timm.models` to be imported; return False if it is there already."""
    module = sys.modules.get(_TIMM_MODELS)
    if module is not None and not getattr(getattr(module, '__spec__', None), '_initializing', False):
        return False
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    return True


class _Finder:
    """Meta path finder: finds `timm.models` as the finders after it do, and puts `_Loader` around its loader."""

    @classmethod
    def find_spec(
            cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != _TIMM_MODELS or cls not in sys.meta_path:
            return None
        # Only the finders behind this one: two hooks of this kind would otherwise call each other without end.
        others = sys.meta_path[sys.meta_path.index(cls) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, 'find_spec'))
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Loader that is replaced by the one it stands for before the module runs, so nothing of it can be seen later."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _import_timm_hne()
        # A new list: a thread in the middle of another import would skip a finder if this one shrank.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not _Finder]


def _import_timm_hne() -> None:
    """Import timm_hne; report a failure instead of passing it on to whoever imported timm or PyTorch."""
    try:
        # Not importlib.import_module, which raises if another thread imports timm_hne and waits for timm.
        import timm_hne

        getattr(timm_hne, 'models', None)  # imported when it is asked for
    except Exception as error:
        # Logged: a warning would become an exception under `python -W error`.
        logging.getLogger('timm_hne').warning(
            'The hne_* models are not available in timm, since timm_hne cannot be imported (%s: %s). '
            'Uninstall timm-hne or set TIMM_HNE_AUTOLOAD=0 to stop trying.', type(error).__name__, error,
        )
