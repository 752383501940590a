"""Loading: the time from files in the cache of the Hub to a model that is ready, against timm's own loading of them.

    python benchmarks/load_weights.py --output docs/results/load_weights

Both read the same float16 weights without a network; timm_hne compares every file with its SHA-256 besides. The two
take turns, and the median of the ratios of each turn counts.
"""
import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import timm
import torch
from common import describe_machine, machine, markdown_table, paired_times, write_json, write_text
from huggingface_hub import constants
from timm.models import build_model_with_cfg, save_for_hf

from timm_hne.pretrained import DIGESTS_NAME, digest

REPO, COMMIT = 'user/net', '0' * 40
MODELS = ('hne_resnet50_c8', 'hne_resnet50_c16', 'hne_mobilenetv2_075_e4', 'hne_mobilenetv2_075_e8')


def fill_cache(name: str, cache: Path) -> float:
    """Write a model with random weights as a download would leave it, and return the megabytes of the weights."""
    root = cache / f'models--{REPO.replace("/", "--")}'
    folder = root / 'snapshots' / COMMIT
    (root / 'refs').mkdir(parents=True)
    (root / 'refs/main').write_text(COMMIT)
    model = timm.create_model(name).to(torch.float16)
    save_for_hf(model, folder, model_args=dict(nodes=list(model.nodes)), safe_serialization=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    (folder / DIGESTS_NAME).write_text(''.join(f'{digest(path.read_bytes())}  {path.name}\n' for path in files))
    return (folder / 'model.safetensors').stat().st_size / 1e6


def load(cache: Path) -> torch.nn.Module:
    return timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=cache)


def load_as_timm(cache: Path) -> torch.nn.Module:
    with ExitStack() as stack:
        for module in 'hne_resnet', 'hne_mobilenetv2':
            stack.enter_context(mock.patch(f'timm_hne.models.{module}.build_model', build_model_with_cfg))
        return load(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS, choices=MODELS)
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--output', type=Path, default=Path('output/load_weights'))
    args = parser.parse_args()

    results, rows = {}, []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(constants, 'HF_HUB_OFFLINE', True):
            cache = Path(folder)
            megabytes = fill_cache(name, cache)
            ours, timms = load(cache).state_dict(), load_as_timm(cache).state_dict()
            if not all(torch.equal(ours[key], timms[key]) for key in timms):
                raise RuntimeError(f'{name}: the two loaded different weights.')
            seconds = paired_times(
                {'timm_hne': lambda c=cache: load(c), 'timm': lambda c=cache: load_as_timm(c)}, args.repeats)
        ratio = statistics.median(a / b for a, b in zip(seconds['timm_hne'], seconds['timm']))
        medians = {key: statistics.median(times) for key, times in seconds.items()}
        results[name] = {'megabytes': megabytes, 'seconds': medians, 'ratio': ratio}
        rows.append([name, f'{megabytes:.1f}', *(f'{1000 * medians[key]:.1f}' for key in medians), f'{ratio:.2f}'])
    text = f'{describe_machine()}\n\n' + markdown_table(['model', 'MB', 'timm_hne (ms)', 'timm (ms)', 'ratio'], rows)
    print(text)
    write_text(args.output / 'load_weights.md', text)
    write_json(args.output / 'load_weights.json', {'machine': machine(), 'repeats': args.repeats, 'models': results})


if __name__ == '__main__':
    main()
