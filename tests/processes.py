"""Processes that train together."""
import multiprocessing
import socket

import torch.multiprocessing


def start_processes(function, *args):
    """Call `function(rank, *args)` in two processes and wait for them.

    They are forks of one process that has imported all and computed nothing, so that the imports are paid once.
    """
    multiprocessing.set_forkserver_preload(['timm_hne.training', function.__module__])
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method='forkserver')


def free_port() -> str:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])
