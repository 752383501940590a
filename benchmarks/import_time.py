"""What the entry point of timm_hne adds to `import torch`.

`import torch` varies by far more than its last step takes, in which PyTorch runs its entry points. So each of several
fresh interpreters runs this step by itself, directly one after the other without timm_hne and with it: the difference
is what finding the entry point, importing `timm_hne_autoload` and calling `arm`, all for the first time, cost.
Times are CPU times, so that other programs on the machine do not count. Bytecode is cached, as after any second start.

    python benchmarks/import_time.py [--repeats 20]
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median

# PyTorch's own switch, set below, leaves the step out of `import torch`. The first run warms up the search.
CHILD = """
import importlib.metadata, json, sys, time
distributions, hidden = importlib.metadata.distributions, 'timm_hne'
importlib.metadata.distributions = lambda **query: (
    distribution for distribution in distributions(**query) if hidden not in str(distribution._path)
)
def seconds(function):
    start = time.thread_time()
    function()
    return time.thread_time() - start

whole = seconds(lambda: __import__('torch'))
step = sys.modules['torch']._import_device_backends
whole += seconds(step)
without = seconds(step)
assert 'timm_hne_autoload' not in sys.modules
hidden = 'nothing'
with_it = seconds(step)
assert 'timm_hne_autoload' in sys.modules and not {'timm', 'timm_hne'} & set(sys.modules)
sys.meta_path.pop(0)
print(json.dumps([whole, without, with_it, with_it - without, seconds(sys.modules['timm_hne_autoload'].arm)]))
"""
ROWS = 'import torch without timm_hne', 'step without timm_hne', 'step with timm_hne', 'added', 'arm() alone'


def sample() -> list[float]:
    """CPU seconds of each row, from a fresh interpreter outside the repository."""
    environment = os.environ | {'TORCH_DEVICE_BACKEND_AUTOLOAD': '0', 'PYTHONDONTWRITEBYTECODE': ''}
    command = [sys.executable, '-c', CHILD]
    return json.loads(subprocess.run(command, cwd=os.sep, env=environment, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=20, help='fresh interpreters, after one that is thrown away')
    repeats = parser.parse_args().repeats

    _, *samples = [sample() for _ in range(repeats + 1)]
    print(f'{"CPU ms, " + str(repeats) + " interpreters":32}{"median":>12}{"min":>12}{"max":>12}')
    for row, seconds in zip(ROWS, zip(*samples, strict=True), strict=True):
        print(f'{row:32}' + ''.join(f'{1e3 * f(seconds):12.3f}' for f in (median, min, max)))


if __name__ == '__main__':
    main()
