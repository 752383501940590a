"""The API reference is built from the docstrings without a warning, by the command that CONTRIBUTING names."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('pdoc')
ROOT = Path(__file__).parent.parent


def test_reference(tmp_path):
    command, = re.findall(r'^python (-W error::UserWarning -m pdoc .*)$', (ROOT / 'CONTRIBUTING.md').read_text(), re.M)
    command = [str(tmp_path) if word == 'output/api' else word for word in shlex.split(command)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr
    text = (tmp_path / 'timm_hne.html').read_text()
    assert 'optimize_for_inference' in text and 'HierarchicalEnsemble' in text
    for module in [word for word in command if word.startswith('timm_hne.')]:
        assert (tmp_path / f'{module.replace(".", "/")}.html').stat().st_size > 1000, module
