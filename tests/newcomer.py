"""A newcomer's day, in a fresh environment that is made from the wheel: a line for every thing that is tried.

    python tests/newcomer.py [--keep FOLDER] [--extra PACKAGE ...] [--skip WORDS ...] [--timm CLONE]

Builds the wheel from this checkout, installs it with its extras into a new virtual environment in a folder elsewhere,
and works there with what pip has brought: no file of the checkout is on Python's path. What needs a package or a clone
of timm that is not there is shown as skipped. Exits with 1 if anything failed.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PHOTOS = '''
import numpy as np
from pathlib import Path
from PIL import Image
rng = np.random.default_rng(0)
for label, name in enumerate(('dark', 'light')):
    for i in range(24):
        size = rng.integers(20, 400, 2)
        pixels = rng.integers(0, 128, (*size, 3)) + 127 * label
        path = Path('photos', name, f'{i}.jpg')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype('uint8')).save(path)
'''
FROM_THE_WHEEL = '''
import timm, timm_hne, timm_hne.evaluation.figures as figures, timm_hne.training.recipe as recipe
assert 'site-packages' in timm_hne.__file__, timm_hne.__file__
assert figures.PAPER.is_file() and list(recipe.RECIPES.glob('*.yaml'))
timm.create_model('hne_resnet50_c8', pretrained=True)
'''
TRANSFORMERS = '''
import timm, torch
from transformers import AutoModelForImageClassification, pipeline
model = timm.create_model('local-dir:my-hne', pretrained=True).eval()
x = torch.randn(2, 3, 32, 32)
loaded = AutoModelForImageClassification.from_pretrained('my-hne').eval()
with torch.no_grad():
    assert torch.equal(loaded(x).logits, model(x))
labels = {row['label'] for row in pipeline('image-classification', model='my-hne')('photos/dark/0.jpg')}
assert labels == {'dark', 'light'}, labels
'''
UNET = '''
import segmentation_models_pytorch as smp, torch
unet = smp.Unet('tu-hne_mobilenetv2_075_e4', encoder_weights=None, classes=2, num_members=1)
assert unet(torch.randn(2, 3, 64, 64)).shape == (2, 2, 64, 64)
'''
FASTAI = '''
from fastai.vision.all import ImageDataLoaders, Resize, vision_learner
loaders = ImageDataLoaders.from_folder('photos', valid_pct=0.2, seed=0, item_tfms=Resize(32), bs=8, num_workers=0)
learner = vision_learner(loaders, 'hne_resnet50_c8', pretrained=False)
with learner.no_bar():
    learner.fit(1)
'''
LIGHTNING = '''
import lightning, timm, timm_hne, torch
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        model = timm.create_model('hne_resnet50_c8', num_classes=10)
        self.task = timm_hne.HNETask(model, criterion_kwargs={}, device=torch.device('cpu'))
    def training_step(self, batch, index):
        return self.task(*batch)['loss']
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
data = [(torch.randn(3, 32, 32), i % 10) for i in range(8)]
trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
'''
TRAIN = (
    'timm-hne train --model hne_resnet50_c8 --pretrained --data-dir photos --val-fraction 0.2 --in-memory '
    '--img-size 32 --opt adamw --lr 1e-3 --weight-decay 0.05 --epochs 2 --batch-size 16 --best-members 1 '
    '--output-dir runs/finetuned --no-progress')
TIMM = '--data-dir split --model hne_resnet50_c8 --num-classes 2 --img-size 32 --device cpu --workers 0 --batch-size 8'
SPLIT = '''
import os, shutil
for split in ('train', 'validation'):
    shutil.copytree('photos', f'split/{split}')
'''

# What is tried, how (Python code, or a command), and the package or clone that it needs; a command that must fail with
# some words has them as a fourth.
STEPS = [
    ('photos of many sizes', PHOTOS, None),
    ('models, recipes and weights are in the wheel', FROM_THE_WHEEL, None),
    ('timm-hne demo', 'timm-hne demo --output demo', 'sklearn'),
    ('timm-hne cost', 'timm-hne cost hne_resnet50_c16', None),
    ('predict with the packaged weights', 'timm-hne predict photos/dark/0.jpg', None),
    ('fine-tune on the photos', TRAIN, None),
    ('eval: the images held out, from the checkpoint', 'timm-hne eval --checkpoint runs/finetuned/last.pth.tar', None),
    ('predict a folder with the run', 'timm-hne predict photos --model runs/finetuned --top-k 1', None),
    ('predict with the best checkpoint', 'timm-hne predict photos/dark/1.jpg --model runs/finetuned/model_best.pth.tar',
     None),
    ('publish without results says what to run',
     'timm-hne publish runs/finetuned/last.pth.tar --repo-id me/my-hne --dry-run', None, 'timm-hne eval --checkpoint'),
    ('... which is', 'timm-hne eval --checkpoint runs/finetuned/last.pth.tar --output runs/finetuned/evaluation.json',
     None),
    ('publish --dry-run', 'timm-hne publish runs/finetuned/last.pth.tar --repo-id me/my-hne --dry-run', None),
    ('eval of the published folder', 'timm-hne eval local-dir:my-hne --data-dir photos', None),
    ('plot', 'timm-hne plot fig9 runs/finetuned/evaluation.json --no-paper --output fig9.png', 'matplotlib'),
    ('plot: the paper\'s table', 'timm-hne plot table1', None),
    ('transformers', TRANSFORMERS, 'transformers'),
    ('segmentation_models_pytorch', UNET, 'segmentation_models_pytorch'),
    ('fastai', FASTAI, 'fastai'),
    ('Lightning', LIGHTNING, 'lightning'),
    ('log: wandb', f'{TRAIN} --log wandb --output-dir runs/wandb --epochs 1', 'wandb'),
    ('log: mlflow', f'{TRAIN} --log mlflow --output-dir runs/mlflow --epochs 1', 'mlflow'),
    ('in_memory without img_size names the flag',
     'timm-hne train --data-dir photos --val-fraction 0.2 --in-memory --output-dir runs/no --batch-size 8', None,
     '--img-size 32'),
    ('train, validation as folders', SPLIT, 'timm clone'),
    ('timm\'s train.py --drop-path',
     f'timm-hne run CLONE/train.py {TIMM} --drop-path 0.1 --epochs 1 --output timm --experiment run', 'timm clone'),
    ('timm\'s validate.py', f'timm-hne run CLONE/validate.py {TIMM} --split validation '
     '--checkpoint timm/run/last.pth.tar --model-kwargs num_members=2', 'timm clone'),
    ('timm\'s onnx_export.py', 'timm-hne run CLONE/onnx_export.py model.onnx --model hne_resnet50_c8 --num-classes 10',
     'timm clone'),
]


def main() -> None:
    """Make the environment, try everything, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--keep', type=Path, metavar='FOLDER', help='work there, in its environment if it has one')
    parser.add_argument('--extra', nargs='*', default=[], metavar='PACKAGE', help='install these too, e.g. fastai')
    parser.add_argument('--skip', nargs='*', default=[], metavar='WORDS', help='leave out the lines with these words')
    parser.add_argument('--timm', type=Path, metavar='CLONE', help='folder of a clone of timm, for its scripts')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(1 if try_all(folder, args.extra, args.skip, args.timm) else 0)


def try_all(folder: Path, extra: list[str], skip: list[str], clone: Path | None) -> int:
    """Return how many steps failed."""
    work = folder / 'work'
    work.mkdir(exist_ok=True)
    bin = folder / 'venv' / ('Scripts' if os.name == 'nt' else 'bin')
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    environment |= {'PATH': f'{bin}{os.pathsep}{environment["PATH"]}', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline',
                    'MLFLOW_TRACKING_URI': f'sqlite:///{work / "mlflow.db"}'}

    def run(command: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)

    def report(name: str, done: subprocess.CompletedProcess, started: float, words: str | None = None) -> int:
        output = done.stdout + done.stderr
        good = done.returncode == 0 if words is None else done.returncode != 0 and words in output
        print(f'{"ok  " if good else "FAIL"}  {time.perf_counter() - started:4.0f} s  {name}', flush=True)
        if not good:
            print(textwrap.indent('\n'.join(output.splitlines()[-8:]), '    '), flush=True)
        return not good

    failed, started, python = 0, time.perf_counter(), str(bin / 'python')
    if not (folder / 'venv').exists():
        failed += install(folder, python, extra, run, report)
    for name, what, needs, *words in STEPS:
        if any(part in name for part in skip):
            continue
        found = needs is None or (
            clone is not None if needs == 'timm clone' else not run([python, '-c', f'import {needs}']).returncode)
        if not found:
            print(f'skip          {name}: no {needs}', flush=True)
            continue
        started = time.perf_counter()
        if '\n' in what:
            done = run([python, '-c', what])
        else:
            done = run([word.replace('CLONE', str(clone)) for word in what.split()])
        failed += report(name, done, started, *words)
    return failed


def install(folder: Path, python: str, extra: list[str], run: Callable, report: Callable) -> int:
    """Build the wheel and install it into a new environment; return how much of this failed."""
    failed, started = 0, time.perf_counter()
    venv.create(folder / 'venv', with_pip=True, clear=True)
    failed += report('the wheel', run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(folder),
                                       str(ROOT)]), started)
    wheel, = folder.glob('*.whl')
    started = time.perf_counter()
    packages = [f'{wheel}[demo,plots,export]', 'transformers', 'segmentation_models_pytorch', *extra]
    failed += report('a fresh environment', run([python, '-m', 'pip', 'install', '-q', *packages]), started)
    return failed


if __name__ == '__main__':
    main()
