import logging
import os
import shutil
import tempfile

import pytest
import torch
from hub_server import hub  # noqa: F401

from timm_hne import HNEMobileNetV2, HNEResNet

WHOLE = {HNEResNet: HNEResNet.stages, HNEMobileNetV2: HNEMobileNetV2.stages}


def make_shallow(patch):
    patch.setattr(HNEResNet, 'stages', ((4, 2, 1), (8, 1, 2), (16, 1, 2), (16, 1, 1)))
    patch.setattr(HNEMobileNetV2, 'stages', (((24, 2), (24, 1)), ((24, 2),), ((48, 2), (72, 1)), ((120, 2),)))


def pytest_configure(config):
    """Give every worker of `pytest -n` its share of the processor, and the processes that it starts as well."""
    if not hasattr(config, 'workerinput'):  # the process that starts the others, which inherit this
        config.programs = os.environ['TIMM_HNE_CACHE'] = tempfile.mkdtemp(prefix='timm_hne_programs_')
    workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1))
    if workers > 1:
        threads = max(1, os.cpu_count() // workers)
        torch.set_num_threads(threads)
        os.environ['OMP_NUM_THREADS'] = str(threads)


def pytest_unconfigure(config):
    if hasattr(config, 'programs'):
        shutil.rmtree(config.programs, ignore_errors=True)


@pytest.fixture
def shallow(monkeypatch):
    """Leaves one layer of every kind in each block, where the number of layers is not what is tested."""
    make_shallow(monkeypatch)


@pytest.fixture(scope='module')
def shallow_module():
    """The same for all tests of a module, but those that ask for `whole`."""
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        yield


@pytest.fixture
def whole(monkeypatch):
    """Gives a test of such a module the networks as they are: another process has them, or a file."""
    for family, stages in WHOLE.items():
        monkeypatch.setattr(family, 'stages', stages)


@pytest.fixture(autouse=True)
def own_logging():
    """Undo what commands set up for their process: levels, and handlers that write to one test's standard error."""
    root = logging.getLogger()

    def loggers():
        return [root, *(logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger))]

    handlers, levels = root.handlers[:], {logger.name: logger.level for logger in loggers()}
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
    for logger in loggers():
        logger.setLevel(levels.get(logger.name, logging.NOTSET))
