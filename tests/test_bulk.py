"""Tables of whole folders: every image has exactly one row, however often the command is interrupted."""
import csv
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from test_classifier import encode, model, noise, places  # noqa: F401
from timm.models import load_state_dict

from timm_hne.__main__ import main
from timm_hne.serving import Classifier, bulk
from timm_hne.serving.bulk import Bulk, local_rows, predict_folder, ray_rows

COUNT = 23


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'images'
    (folder / 'below, here').mkdir(parents=True)
    for i in range(COUNT - 1):
        place = folder / 'below, here' if i % 3 else folder
        Image.new('RGB', (40, 40), (10 * i, 255 - 10 * i, 7 * i % 255)).save(place / f'{i:02d}.png')
    (folder / 'broken.png').write_bytes(encode(noise())[:500])
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture
def settings(places):  # noqa: F811
    return Bulk(str(places['published']), engine='none', batch_size=4, top_k=3)


def read(path):
    if path.suffix == '.parquet':
        return pytest.importorskip('pyarrow.parquet').read_table(path).to_pylist()
    with open(path, newline='', encoding='utf-8') as stream:
        return [
            {
                name: None if value == '' else int(value) if name == 'num_members' else
                float(value) if name.startswith('probability') else value
                for name, value in row.items()
            } for row in csv.DictReader(stream)
        ]


def check(rows, folder, settings):
    classifier = Classifier.open(settings.model, 'none')
    assert sorted(row['path'] for row in rows) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob('*.png'))
    for row in rows:
        if row['path'] == 'broken.png':
            assert 'cannot be read' in row['error'] and row['label_1'] is None and row['num_members'] is None
            continue
        assert row['error'] is None and row['num_members'] == 4
        top = classifier.top(classifier.logits(classifier.image(folder / row['path'])[None])[0], 4, 3)
        for i, label in enumerate(top, 1):
            assert row[f'label_{i}'] == label.name
            assert row[f'probability_{i}'] == pytest.approx(label.probability, abs=1e-5)
        assert 'label_4' not in row


@pytest.mark.parametrize('ending', ['.csv', '.parquet'])
def test_every_image_has_a_row(folder, settings, tmp_path, ending):
    if ending == '.parquet':
        pytest.importorskip('pyarrow', reason="parquet needs pip install 'timm-hne[bulk]'")
    output = tmp_path / f'table{ending}'
    assert predict_folder(folder, output, settings, part_size=7) == COUNT
    check(read(output), folder, settings)
    assert [path.name for path in tmp_path.iterdir() if path != folder] == [output.name]


@pytest.mark.parametrize('ending', ['.csv', '.parquet'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interrupted_again_and_again(folder, settings, tmp_path, monkeypatch, ending, error):
    if ending == '.parquet':
        pytest.importorskip('pyarrow', reason="parquet needs pip install 'timm-hne[bulk]'")
    output, seen = tmp_path / f'table{ending}', []

    def interrupted(bulk, files, workers):
        for i, rows in enumerate(local_rows(bulk, files, workers)):
            if i == 2:
                raise error('interrupted')
            seen.extend(row['path'] for row in rows)
            yield rows

    rounds = 0
    while not output.exists():
        rounds += 1
        assert rounds < 10
        try:
            predict_folder(folder, output, settings, interrupted, part_size=5)
        except error:
            assert not output.exists()
    assert rounds == 3 and len(seen) == len(set(seen)) == COUNT
    check(read(output), folder, settings)


def test_what_is_killed_while_it_writes_leaves_no_half_part(folder, settings, tmp_path, monkeypatch):
    output, write, parts = tmp_path / 'table.csv', bulk._write_rows, []

    def killed(path, rows):
        parts.append(path)
        if len(parts) > 1:
            path.write_text('path,num_mem')
            raise SystemExit
        write(path, rows)

    monkeypatch.setattr(bulk, '_write_rows', killed)
    with pytest.raises(SystemExit):
        predict_folder(folder, output, settings, part_size=5)
    monkeypatch.setattr(bulk, '_write_rows', write)
    assert predict_folder(folder, output, settings, part_size=5) == COUNT
    check(read(output), folder, settings)


@pytest.mark.skipif(sys.platform != 'linux', reason='names of files are bytes only on Linux')
def test_names_in_any_encoding(folder, settings, tmp_path):
    with open(os.fsencode(folder) + b'/bad\xff.png', 'wb') as file:
        file.write(b'no image')
    assert predict_folder(folder, tmp_path / 'table.csv', settings) == COUNT + 1
    row = next(row for row in read(tmp_path / 'table.csv') if row['path'] == r'bad\xff.png')
    assert r'bad\xff.png cannot be read' in row['error']


def test_images_that_came_meanwhile_are_taken(folder, settings, tmp_path):
    output = tmp_path / 'table.csv'

    def some(bulk, files, workers):
        yield next(local_rows(bulk, files, workers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_folder(folder, output, settings, some)
    noise().save(folder / 'new.png')
    assert predict_folder(folder, output, settings) == COUNT + 1
    check(read(output), folder, settings)


def test_other_settings_do_not_continue(folder, settings, tmp_path):
    output = tmp_path / 'table.csv'

    def some(bulk, files, workers):
        yield next(local_rows(bulk, files, workers))
        raise KeyboardInterrupt

    with pytest.raises(ValueError):  # nothing was done with these, so nothing is bound to them
        predict_folder(folder, output, Bulk(str(tmp_path / 'none'), 'none'))
    with pytest.raises(KeyboardInterrupt):
        predict_folder(folder, output, settings, some)
    with pytest.raises(ValueError, match='other settings'):
        predict_folder(folder, output, Bulk(settings.model, 'none', top_k=2))
    assert json.loads((tmp_path / '.table.csv.parts' / 'settings.json').read_text())['top_k'] == 3


@pytest.mark.parametrize('output, change, error', [
    ('table.xlsx', {}, ValueError),
    ('there.csv', {}, FileExistsError),
    ('table.csv', {'num_members': 5}, ValueError),
    ('table.csv', {'top_k': 0}, ValueError),
    ('table.csv', {'batch_size': 0}, ValueError),
])
def test_bad_arguments(folder, settings, tmp_path, output, change, error):
    (tmp_path / 'there.csv').write_text('precious')
    with pytest.raises(error):
        predict_folder(folder, tmp_path / output, Bulk(**{**vars(settings), **change}))
    assert (tmp_path / 'there.csv').read_text() == 'precious'


def test_two_processes_do_not_write_one_table(folder, settings, tmp_path):
    def inner(bulk, files, workers):
        with pytest.raises(OSError, match='another process'):
            predict_folder(folder, tmp_path / 'table.csv', settings)
        yield from local_rows(bulk, files, workers)

    assert predict_folder(folder, tmp_path / 'table.csv', settings, inner) == COUNT


def test_the_command(folder, places, tmp_path, capsys):  # noqa: F811
    output = tmp_path / 'table.csv'
    arguments = ['predict', str(folder), '--model', str(places['exported']), '--output', str(output), '--top-k', '1']
    main([*arguments, '--num-members', '2'])
    assert f'{output}  {COUNT} images' in capsys.readouterr().out
    rows = read(output)
    assert len(rows) == COUNT and {row['num_members'] for row in rows} == {2, None}
    for wrong in (arguments, [*arguments[:-4], '--output', str(tmp_path / 'a.csv'), '--budget-ms', '3'],
                  ['predict', str(folder / 'broken.png'), '--output', str(tmp_path / 'a.csv')]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert not (tmp_path / 'a.csv').exists()


def test_other_weights_under_the_same_name_do_not_continue(folder, tmp_path, places):  # noqa: F811
    def interrupted(*args):
        yield next(local_rows(*args))
        raise KeyboardInterrupt

    run, output = tmp_path / 'run', tmp_path / 'table.csv'
    shutil.copytree(places['run'], run)
    with pytest.raises(KeyboardInterrupt):
        predict_folder(folder, output, Bulk(str(run), engine='none', batch_size=4), interrupted)
    before = (run / 'last.pth.tar').read_bytes()
    weights = load_state_dict(str(run / 'last.pth.tar'))
    weights['classifier.bias'] += 1
    torch.save({'state_dict': weights, 'arch': 'hne_resnet50_c8', 'epoch': 0}, run / 'last.pth.tar')
    with pytest.raises(ValueError, match='other settings'):
        predict_folder(folder, output, Bulk(str(run), engine='none', batch_size=4))
    (run / 'last.pth.tar').write_bytes(before)
    # Fewer images at a time are no other table.
    assert predict_folder(folder, output, Bulk(str(run), engine='none', batch_size=3)) == COUNT


def test_folders_of_broken_images_only(tmp_path, settings):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.png').write_bytes(b'')
    assert predict_folder(tmp_path / 'images', tmp_path / 'table.csv', settings) == 1
    assert read(tmp_path / 'table.csv')[0]['error']
    (tmp_path / 'none').mkdir()
    with pytest.raises(OSError):
        predict_folder(tmp_path / 'none', tmp_path / 'other.csv', settings)


@pytest.mark.timeout(120)
def test_by_ray_data(folder, settings, tmp_path):
    ray = pytest.importorskip('ray', reason="Ray Data needs pip install 'timm-hne[serve]'")
    pytest.importorskip('ray.data')
    threads = torch.get_num_threads()
    try:
        assert predict_folder(folder, tmp_path / 'table.csv', settings, ray_rows, workers=2) == COUNT
    finally:
        ray.shutdown()
        torch.set_num_threads(threads)
    check(read(tmp_path / 'table.csv'), folder, settings)
