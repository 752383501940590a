"""The plug-in without an import: `timm_hne_autoload`.

The logic is tested in fresh interpreters with throw-away packages named torch, timm and timm_hne, which start in no
time; two last tests use the installed torch and timm, to which the entry point must be known.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_hne.version import NEEDED_TIMM, check_timm

# timm imports torch before its models, torch calls the entry point, and timm_hne needs complete timm.models.
TORCH = 'import timm_hne_autoload; timm_hne_autoload.arm()'
TIMM = 'import torch; from .models import register, registry'
TIMM_MODELS = 'registry = []; register = registry.append'
TIMM_HNE = 'import timm; from timm.models import register; register("hne")'

MODELS_ARE_KNOWN = """
import sys, timm, timm_hne_autoload
assert timm.registry == ['hne'], timm.registry
assert timm_hne_autoload._Finder not in sys.meta_path
"""


@pytest.fixture
def packages(tmp_path):
    """Writes the throw-away packages; returns a function that changes the code of one."""

    def write(name: str, code: str) -> None:
        folder = tmp_path.joinpath(*name.split('.'))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '__init__.py').write_text(code + '\n')

    for name, code in {'torch': TORCH, 'timm': TIMM, 'timm.models': TIMM_MODELS, 'timm_hne': TIMM_HNE}.items():
        write(name, code)
    return write


def run(code: str, folder: Path, *options: str, **environment: str) -> str:
    """Run code in a fresh interpreter in a folder, whose packages come first; returns what it wrote to stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith('_AUTOLOAD')}
    done = subprocess.run(
        [sys.executable, '-B', *options, '-c', code],
        cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize('imports', [
    'import torch, timm',
    'import timm, torch',
    'import timm.models',
    'import timm_hne',
    'import timm_hne, timm',
    'import torch, timm_hne_autoload; timm_hne_autoload.arm(); timm_hne_autoload.arm(); import timm',
    'import timm, timm_hne_autoload; timm_hne_autoload.arm()',
])
def test_models_are_known_in_every_import_order(packages, tmp_path, imports):
    assert run(imports + MODELS_ARE_KNOWN, tmp_path) == ''


def test_arm_imports_nothing_before_timm_models(packages, tmp_path):
    run("""
import sys, torch
assert not {'timm', 'timm_hne'} & set(sys.modules)
import timm_hne_autoload
assert sys.meta_path.count(timm_hne_autoload._Finder) == 1
""", tmp_path)


def test_arm_after_timm_models_imports_at_once(packages, tmp_path):
    packages('torch', '')
    run("""
import timm, timm_hne_autoload
assert timm.registry == []
timm_hne_autoload.arm()
""" + MODELS_ARE_KNOWN, tmp_path)


def test_arm_while_timm_models_runs_waits_for_its_end(packages, tmp_path):
    packages('timm.models', TORCH + '; ' + TIMM_MODELS)
    assert run('import timm' + MODELS_ARE_KNOWN, tmp_path) == ''


def test_environment_variable_turns_it_off(packages, tmp_path):
    run("""
import sys, timm, timm_hne_autoload
assert timm.registry == [] and 'timm_hne' not in sys.modules
assert timm_hne_autoload._Finder not in sys.meta_path
import timm_hne
""" + MODELS_ARE_KNOWN, tmp_path, TIMM_HNE_AUTOLOAD='0')


@pytest.mark.parametrize('imports', ['import torch, timm', 'import timm, torch', 'import timm.models'])
@pytest.mark.parametrize('code', ['raise OSError("no libgomp")', '1 +', 'from timm.models import no_such_name'])
def test_broken_timm_hne_breaks_nothing(packages, tmp_path, imports, code):
    packages('timm_hne', code)
    message = run(
        imports + '\nimport sys; assert "timm.models" in sys.modules and "timm_hne" not in sys.modules',
        tmp_path, '-W', 'error',
    )
    assert message.count('\n') == 1
    assert 'timm_hne cannot be imported' in message and 'TIMM_HNE_AUTOLOAD=0' in message
    assert ('libgomp' in message) == ('libgomp' in code)


def test_import_of_timm_models_that_fails_can_be_repeated(packages, tmp_path):
    packages('timm.models', 'import os; fails = os.environ.pop("FAIL"); ' + TIMM_MODELS)
    run("""
import os, sys
try:
    import timm
except KeyError as error:
    assert error.args == ('FAIL',)
else:
    raise AssertionError('timm.models should have failed')
assert 'timm_hne' not in sys.modules
os.environ['FAIL'] = 'not again'
""" + MODELS_ARE_KNOWN, tmp_path)


def test_timm_models_looks_as_if_nothing_had_happened(packages, tmp_path):
    packages('timm.models', 'at_run_time = __loader__, __spec__.loader; ' + TIMM_MODELS)
    packages('timm', 'import torch')
    run("""
import importlib.util, inspect, runpy, sys
import torch
found = importlib.util.find_spec('timm.models')  # imports timm, but not timm.models
assert 'timm.models' not in sys.modules
assert found.loader.get_source('timm.models') == open(found.origin).read()
assert found.loader.is_package('timm.models')

import timm.models
assert 'timm_hne' in sys.modules
spec = timm.models.__spec__
assert spec is not found and spec == importlib.util.find_spec('timm.models')
assert {type(loader) for loader in (spec.loader, timm.models.__loader__, *timm.models.at_run_time)} == {
    importlib.machinery.SourceFileLoader
}
assert inspect.getsource(timm.models) == open(spec.origin).read()
assert runpy.run_module('timm.models.__init__')['registry'] == []
before = timm.models
assert importlib.reload(timm.models) is before and before.registry == []
""", tmp_path)


def test_spec_found_earlier_can_be_executed(packages, tmp_path):
    packages('timm', 'import torch')
    run("""
import importlib.util, sys
spec = importlib.util.find_spec('timm.models')
module = sys.modules['timm.models'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.registry == ['hne']
assert type(spec.loader) is importlib.machinery.SourceFileLoader
""", tmp_path)


def test_two_hooks_of_this_kind_work_together(packages, tmp_path):
    """Another plug-in may copy this one: neither may call the other without end or undo what the other did."""
    packages('torch', """
import importlib.util, sys, timm_hne_autoload
timm_hne_autoload.arm()
spec = importlib.util.find_spec('timm_hne_autoload')
other = importlib.util.module_from_spec(spec)
spec.loader.exec_module(other)
other._import_timm_hne = lambda: sys.modules['timm.models'].register('other')
other.arm()
""")
    run("""
import sys, timm
assert timm.registry == ['hne', 'other']
assert not [finder for finder in sys.meta_path if finder.__module__ == 'timm_hne_autoload']
assert type(timm.models.__loader__) is __import__('importlib').machinery.SourceFileLoader
""", tmp_path)


def test_threads_that_import_timm_and_timm_hne_wait_for_each_other(packages, tmp_path):
    packages('both', 'import threading; are_running = threading.Barrier(2, timeout=20)')
    packages('timm.models', 'import time, both; both.are_running.wait(); time.sleep(0.2); ' + TIMM_MODELS)
    packages('timm_hne', 'import both; both.are_running.wait(); ' + TIMM_HNE)
    assert run("""
import threading
import both, torch
threads = [threading.Thread(target=exec, args=(code,)) for code in ('import timm', 'import timm_hne')]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""" + MODELS_ARE_KNOWN, tmp_path) == ''


def test_finder_withdraws_without_changing_the_list_another_thread_may_be_searching(packages, tmp_path):
    assert run("""
import sys, torch
searched = sys.meta_path
before = searched.copy()
import timm
assert searched == before and sys.meta_path == before[1:]
""" + MODELS_ARE_KNOWN, tmp_path) == ''


def test_installed_entry_point_and_spawned_process(tmp_path):
    errors = run("""
import multiprocessing, sys
import torch
assert not {'timm', 'timm_hne'} & set(sys.modules)
import timm
names = timm.list_models('hne_*')
assert 'hne_resnet50_c8' in names and 'hne_mobilenetv2_075_e8' in names, names
assert not any(finder.__module__ == 'timm_hne_autoload' for finder in sys.meta_path)
with multiprocessing.get_context('spawn').Pool(1) as pool:
    assert pool.apply(timm.list_models, ('hne_*',)) == names
""", tmp_path)
    assert errors == ''


def test_installed_timm_with_broken_timm_hne(tmp_path):
    (tmp_path / 'timm_hne.py').write_text('raise OSError("no libgomp")')
    errors = run('import timm, torch; assert timm.list_models() and not timm.list_models("hne_*")', tmp_path)
    assert errors.count('\n') == 1 and 'no libgomp' in errors and 'TIMM_HNE_AUTOLOAD=0' in errors


@pytest.mark.parametrize('version', ['1.0.30', '1.0.29.dev0', '0.9.16'])
def test_an_older_timm_is_named_with_the_way_out(monkeypatch, version):
    monkeypatch.setattr('timm.version.__version__', version)
    with pytest.raises(ImportError, match=rf'timm {NEEDED_TIMM} .* {version} .*timm-hne run'):
        check_timm()


@pytest.mark.parametrize('version', ['1.0.31', '1.0.31.dev0', '1.1.0', '2.0'])
def test_a_newer_timm_will_do(monkeypatch, version):
    monkeypatch.setattr('timm.version.__version__', version)
    check_timm()


def test_a_script_in_a_clone_of_an_older_timm_is_warned(tmp_path):
    error = run("""
import sys
version = sys.modules['timm.version'] = type(sys)('timm.version')
version.__version__, version.__file__ = '1.0.30', '/clone/timm/version.py'
import timm
assert not timm.list_models('hne_*')
""", tmp_path)
    assert 'The hne_* models are not available' in error and 'timm-hne run SCRIPT' in error


def test_the_timm_that_is_needed_is_the_one_that_pip_installs():
    assert f'"timm>={NEEDED_TIMM}"' in (Path(__file__).parent.parent / 'pyproject.toml').read_text()
