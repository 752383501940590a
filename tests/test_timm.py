"""timm's own model tests, as they are in the source distribution of the installed version, on the `hne_*` models."""
import re
import subprocess
import sys
import tarfile

import pytest
import timm


@pytest.fixture
def timm_tests(request):
    """Folder with the tests of the installed timm, downloaded once."""
    version = timm.__version__
    cache = request.config.cache.mkdir(f'timm-{version}')
    archive = cache / f'timm-{version}.tar.gz'
    if not archive.exists():
        download = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm']
        result = subprocess.run([*download, '--dest', cache, f'timm=={version}'], capture_output=True, text=True)
        if result.returncode or not archive.exists():
            lines = result.stderr.strip().splitlines() or ['no output']
            pytest.skip(f'the source distribution of timm {version} cannot be downloaded: {lines[-1]}')
    folder = cache / f'timm-{version}'
    with tarfile.open(archive) as tar:
        # Without its package, so that the installed one is tested.
        wanted = (f'{folder.name}/tests/', f'{folder.name}/pyproject.toml')
        tar.extractall(cache, [member for member in tar if member.name.startswith(wanted)], filter='data')
    return folder


def test_timms_own_tests_pass(timm_tests):
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'timm_hne', '-p', 'no:cacheprovider', '-k', 'hne_', '-rfEs']
    result = subprocess.run([*command, 'tests/test_models.py'], cwd=timm_tests, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    summary = result.stdout.splitlines()[-1]
    counts = {outcome: int(count) for count, outcome in re.findall(r'(\d+) (\w+)', summary)}
    # forward, backward, default_cfgs, torchscript, forward_features, and three of FX: all of them for each model.
    assert counts['passed'] >= 8 * len(timm.list_models('hne_*')), summary
    assert not counts.keys() & {'failed', 'error', 'errors', 'skipped', 'xfailed'}, summary
