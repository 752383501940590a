"""The wheel and the source distribution hold what they must, and what they say of themselves is so."""
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from timm_hne import process

ROOT = Path(__file__).parent.parent
SKIPPED = ('.git', '.venv', 'output', 'build', 'dist', '.pytest_cache', '.ruff_cache')


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The names of the files of both distributions, and the wheel's metadata, built from a copy."""
    copy, out = tmp_path_factory.mktemp('copy') / 'timm_hne', tmp_path_factory.mktemp('dist')
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*SKIPPED, '__pycache__', '*.egg-info'))
    code = f'from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})'
    done = subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(out.glob('*.tar.gz'))) as file:
        sdist = {name.partition('/')[2] for name in file.getnames()}
    with zipfile.ZipFile(next(out.glob('*.whl'))) as file:
        wheel = set(file.namelist())
        metadata = file.read(next(name for name in wheel if name.endswith('/METADATA'))).decode()
    return sdist, wheel, email.message_from_string(metadata)


def files(folder, suffixes=('',)):
    return {
        str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob('*')
        if path.is_file() and path.suffix not in ('.pyc', '.so') and path.name.endswith(suffixes)}


def test_the_wheel_is_complete(built):
    _, wheel, _ = built
    assert files('timm_hne') | {'timm_hne_autoload.py'} == {name for name in wheel if '.dist-info/' not in name}


def test_the_source_distribution_is_complete(built):
    sdist, *_ = built
    for folder in ('timm_hne', 'tests', 'docs', 'benchmarks', 'hub_cards', 'train_scripts'):
        assert files(folder) <= sdist, folder
    assert {path.name for path in ROOT.glob('*.md')} | {'CITATION.cff', 'LICENSE', '.ci/run'} <= sdist


def test_metadata(built):
    *_, metadata = built
    assert metadata['License-Expression'] == 'Apache-2.0'
    urls = dict(line.split(', ', 1) for line in metadata.get_all('Project-URL'))
    assert all(url.startswith('https://') for url in urls.values()) and 'Paper' in urls
    assert 'Operating System :: POSIX :: Linux' in metadata.get_all('Classifier')
    assert metadata.get_payload().startswith('# timm_hne')


def test_the_badges_are_true():
    readme, project = (ROOT / 'README.md').read_text(), (ROOT / 'pyproject.toml').read_text()
    python, = re.findall(r'badge/python-([\d.]+)%20or%20later', readme)
    assert f'requires-python = ">={python}"' in project
    assert 'badge/license-Apache--2.0' in readme and 'license = "Apache-2.0"' in project


def test_the_citations_are_one():
    preferred = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['preferred-citation']
    for page in ('README.md', 'timm_hne/hub/model_card.md'):
        bibtex, = re.findall(r'```bibtex\n(.*?)```', (ROOT / page).read_text(), re.S)
        assert preferred['title'] in bibtex and str(preferred['year']) in bibtex
        assert all(author['family-names'] in bibtex for author in preferred['authors'])


@pytest.mark.parametrize('system', ['darwin', 'win32', 'linux without glibc'])
def test_memory_is_kept_with_glibc_only(monkeypatch, system):
    """Elsewhere nothing is asked of the C library: on Windows there is none of this kind, musl has no mallopt."""
    monkeypatch.setattr(process.sys, 'platform', system.split()[0])

    def load(name):
        assert system.startswith('linux')
        return object()

    monkeypatch.setattr(process.ctypes, 'CDLL', load)
    process.keep_freed_memory()
