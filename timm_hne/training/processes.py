"""The processes of `torchrun`, which train together."""
from types import SimpleNamespace

import torch
from timm.utils import init_distributed_device, is_distributed_env

__all__ = ['join']

_joined = False


def join(world: SimpleNamespace) -> torch.device:
    """Join the other processes, if there are any, as timm's `init_distributed_device` does.

    Args:
        world: What that takes and fills in.

    Raises:
        RuntimeError: This process has joined them before. PyTorch would wait for ever.
    """
    global _joined
    if is_distributed_env():
        if _joined:
            raise RuntimeError(
                'a process of torchrun can train once, PyTorch does not bring processes together again: start torchrun '
                'for each run.')
        _joined = True
    return init_distributed_device(world)
