"""The house: imports point one way, files are short, and the command line alone parses arguments."""
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import timm_hne

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob('timm_hne/**/*.py'))
imports = runpy.run_path(str(ROOT / 'docs' / 'imports.py'))

# The launcher extends the parser of timm's scripts; checkpoints hold a Namespace, as timm's do.
PARSES_ARGUMENTS = {'timm_hne.training.launcher', 'timm_hne.training.checkpoint'}


def test_packages_import_those_below_them_only():
    order = imports['ORDER']
    graph = imports['package_graph'](imports['read_imports']())
    assert {name for name, _ in graph} | {name for _, name in graph} <= set(order)
    upwards = [edge for edge in graph if order.index(edge[0]) <= order.index(edge[1])]
    assert not upwards


def test_no_modules_import_each_other():
    assert imports['find_circles'](imports['read_imports']()) == []


def test_a_circle_is_found():
    edges = {'a': {'b'}, 'b': {'c'}, 'c': {'b'}, 'd': {'a'}}
    assert imports['find_circles'](edges) == [['b', 'c']]


def test_the_drawing_in_the_documentation_is_that_of_the_code():
    page = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    assert imports['draw']() in page, 'run python docs/imports.py'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 400


def test_the_command_line_alone_parses_arguments():
    users = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in FILES
        if 'import argparse' in path.read_text(encoding='utf-8') and path.parent.name != 'cli'
    }
    assert users <= PARSES_ARGUMENTS


def test_only_models_are_imported_with_timm():
    """The rest waits until it is used: `train.py --device-modules timm_hne.training` counts on it."""
    code = '''
import sys, timm_hne
loaded = {name for name in sys.modules if name.startswith('timm_hne.')}
later = {'training', 'evaluation', 'inference', 'hub', 'serving', 'cli'}
assert not [name for name in loaded if name.split('.')[1] in later]
assert all(hasattr(timm_hne, name) for name in timm_hne.__all__)
assert {*timm_hne.__all__, 'training'} <= {*dir(timm_hne)}
assert timm_hne.cost.member_macs is timm_hne.evaluation.member_macs
assert timm_hne.metrics.EnsembleMetrics is timm_hne.evaluation.EnsembleMetrics
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='nothing_like_it'):
        timm_hne.nothing_like_it  # noqa: B018
