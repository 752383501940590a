"""The engines by name, and which of them serve a model."""
import torch

from .base import Engine
from .eager import Eager
from .inductor import Inductor
from .onnx_programs import OnnxRuntime, OpenVINO

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (OnnxRuntime, OpenVINO, Inductor, Eager)}

__all__ = ['ENGINES', 'Engine', 'check_engine', 'engines_for']


def engines_for(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of the engines that are installed and serve models on this device and of this type."""
    return [name for name, engine in ENGINES.items() if not engine.missing() and not engine.obstacle(device, dtype)]


def check_engine(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that there is such an engine, that it is installed, and that it serves such models.

    Raises:
        ValueError: There is none of this name, or it does not serve such models.
        ImportError: It is not installed.
    """
    works = f'What works here: {", ".join(["auto", *engines_for(device, dtype)])}.'
    if name not in ENGINES:
        raise ValueError(f'engine must be one of {", ".join(["auto", *ENGINES])}, got {name!r}. {works}')
    engine = ENGINES[name]
    if reason := engine.obstacle(device, dtype):
        raise ValueError(f'engine {name!r} cannot run this model: {reason}. {works}')
    if missing := engine.missing():
        raise ImportError(
            f"engine {name!r} needs {', '.join(missing)}: pip install 'timm-hne[{engine.extra}]'. {works}")
