"""Processes that train together."""
import multiprocessing

import torch.multiprocessing


def start_processes(function, *args):
    """Call `function(rank, *args)` in two processes and wait for them.

    They are forks of one process that has imported all and computed nothing, so that the imports are paid once.
    """
    multiprocessing.set_forkserver_preload(['timm_hne.training', function.__module__])
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method='forkserver')
