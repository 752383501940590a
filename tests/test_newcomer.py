"""What somebody does who follows the documentation to the letter, with ordinary photos."""
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_hne.cli import main

ROOT = Path(__file__).parent.parent
SIZES = [(640, 427), (31, 75), (32, 32), (9, 200), (33, 32)]


@pytest.fixture
def photos(tmp_path):
    """A folder for each of two classes, of photos of many sizes and kinds of files."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(('cats', 'dogs')):
        folder = tmp_path / 'photos' / name
        folder.mkdir(parents=True)
        for number, size in enumerate(SIZES):
            pixels = rng.integers(0, 128, (*size[::-1], 3), dtype=np.uint8) + 127 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{number}.{("jpg", "png", "jpeg")[number % 3]}')
    return tmp_path / 'photos'


def documented(page, start):
    """Return the commands of the block of a page that begins with some words."""
    text = (ROOT / 'docs' / page).read_text(encoding='utf-8')
    block, = (block for block in re.findall(r'```bash\n(.*?)```', text, re.S) if block.startswith(start))
    return [shlex.split(line, comments=True) for line in block.replace('\\\n', ' ').splitlines()]


def test_fine_tuning_on_photos(photos, tmp_path, monkeypatch, capsys):
    """The documented commands, with a smaller batch and one epoch."""
    monkeypatch.chdir(tmp_path)
    train, measure, predict = documented('training.md', 'timm-hne train --model')
    train = [str(photos) if word == 'DATA' else word for word in train[1:]]
    main([*train, '--batch-size', '4', '--epochs', '1', '--num-workers', '0', '--no-progress'])
    main([*measure[1:], '--workers', '0'])
    assert 'data: photos, split: train, held out 0.2, num images: 2' in capsys.readouterr().out
    main([str(photos / 'cats' / '0.jpg') if word == 'PHOTO' else word for word in predict[1:]])
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:3]} == {'cats', 'dogs'}


@pytest.mark.parametrize(('options', 'flag'), [
    (['--val-fraction', '0.2', '--in-memory'], '--img-size 32'),
    (['--val-fraction', '0.2', '--in-memory', '--num-workers', '1'], '--img-size 32'),
    (['--val-fraction', '0.2', '--in-memory', '--img-size', '32', '--batch-size', '64'], '--batch-size'),
    ([], '--val-fraction'),
    (['--data-dir', ''], '--data-dir'),
])
def test_errors_name_the_flag_in_one_line(photos, tmp_path, capsys, options, flag):
    with pytest.raises(SystemExit) as error:
        main(['train', '--data-dir', str(photos), '--batch-size', '4', '--num-workers', '0', '--output-dir',
              str(tmp_path / 'run'), *options])
    assert error.value.code == 1
    message = capsys.readouterr().err.strip()
    assert flag in message and len(message.splitlines()) == 1
