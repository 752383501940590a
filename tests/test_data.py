"""Data sets in memory, their augmentation, and the choice of images."""
import importlib.util
import io
import json
import pickle
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader
from timm.data.readers.img_extensions import add_img_extensions, del_img_extensions
from torch.utils.data import IterableDataset, TensorDataset
from torchvision.transforms.v2.functional import resized_crop

from timm_hne.training import datasets
from timm_hne.training.datasets import DIGITS, ImageSubset, UnreadableImageError, create_datasets, open_dataset
from timm_hne.training.loader import create_image_loader, seed_epoch
from timm_hne.training.memory_loader import MemoryLoader, _random_boxes, _resized_crop, load_into_memory
from timm_hne.training.recipe import TrainConfig

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

needs_sklearn = pytest.mark.skipif(not importlib.util.find_spec('sklearn'), reason='scikit-learn is not installed')


def make_loader(count=20, batch_size=4, size=6, **kwargs):
    """Random images whose labels are their numbers."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    loader = MemoryLoader(images, torch.arange(count), batch_size, MEAN, STD, **kwargs)
    loader.images = images
    return loader


def normalize(images):
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_evaluation_batches_are_the_images_in_order():
    loader = make_loader(count=10)
    assert len(loader) == 3
    batches = list(loader)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), normalize(loader.images))
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in batches)


def test_training_without_augmentation_shuffles_only():
    loader = make_loader(count=22, training=True)
    assert len(loader) == 5
    seen = []
    for images, labels in loader:
        assert images.shape == (4, 3, 6, 6)
        torch.testing.assert_close(images, normalize(loader.images[labels]))
        seen += labels.tolist()
    assert len(set(seen)) == 20 and seen != sorted(seen)


def test_every_training_image_is_a_padded_crop_or_its_mirror_image():
    """Against a loop that crops each image by slicing."""
    loader = make_loader(count=64, batch_size=16, training=True, crop_padding=2, hflip=0.5)
    padded = F.pad(loader.images, [2] * 4)
    found = set()
    for images, labels in loader:
        for image, label in zip(images, labels):
            crops = {
                (y, x, flip): normalize(padded[label, :, y:y + 6, x:x + 6].flip(-1) if flip else
                                        padded[label, :, y:y + 6, x:x + 6])
                for y in range(5) for x in range(5) for flip in (False, True)
            }
            matches = [key for key, crop in crops.items() if torch.allclose(image, crop, atol=1e-5)]
            assert len(matches) == 1
            found.add(matches[0])
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(5))
    assert {flip for _, _, flip in found} == {False, True}


def test_every_training_image_is_a_resized_crop_or_its_mirror_image():
    """Against torchvision, where crops are of whole pixels; crops of all sizes have their area and lie in the image."""
    size, count = 12, 200
    images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
    corners = torch.randint(0, 5, (count, 2))
    sides = torch.randint(4, 8, (count, 2))
    flips = torch.rand(count) < 0.5
    crops = _resized_crop(images, torch.cat([sides, corners], dim=1) / size, flips)
    for image, (width, height), (left, top), flip, crop in zip(images, sides, corners, flips, crops):
        expected = resized_crop(image.permute(2, 0, 1).float(), top, left, height, width, [size, size], antialias=False)
        inner = crop.permute(2, 0, 1)
        inner = inner.flip(2) if flip else inner
        # On its border, a crop that is made without cutting sees the pixel beside it.
        torch.testing.assert_close(inner[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=0, atol=1e-3)
    width, height, left, top = _random_boxes(10_000, (0.3, 0.5), torch.Generator().manual_seed(0)).unbind(1)
    assert 0.3 <= (width * height).min() < 0.302 and 0.498 < (width * height).max() <= 0.5 + 1e-6
    assert 0.75 - 1e-6 <= (width / height).min() < 0.76 and 1.32 < (width / height).max() <= 4 / 3 + 1e-6
    assert left.min() >= 0 and (left + width).max() <= 1 + 1e-6 and 0.99 < (top + height).max() <= 1 + 1e-6
    loader = make_loader(training=True, scale=(1., 1.), hflip=0.)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _ in loader)


@pytest.mark.parametrize('augmentation', [{'crop_padding': 1}, {'scale': (0.2, 1.)}])
def test_order_and_augmentation_are_a_function_of_seed_and_epoch(augmentation):
    def epoch(seed, number):
        loader.seed = seed
        loader.set_epoch(number)
        return [(images.clone(), labels) for images, labels in loader]

    loader = make_loader(training=True, hflip=0.5, **augmentation)
    first = epoch(0, 3)
    torch.rand(7)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, epoch(0, 3)))
    for other in (epoch(0, 4), epoch(1, 3)):
        assert not all(torch.equal(a[1], b[1]) for a, b in zip(first, other))


@pytest.mark.parametrize('augmentation', [{'crop_padding': 1}, {'scale': (0.2, 1.)}])
def test_processes_share_the_batches_of_one(augmentation):
    torch.manual_seed(0)
    joint = make_loader(count=33, batch_size=8, training=True, hflip=0.5, **augmentation)
    parts = [
        MemoryLoader(joint.images, joint.labels, 4, MEAN, STD, training=True, hflip=0.5, rank=rank, world_size=2,
                     **augmentation)
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [len(joint)] * 2
    for (images, labels), *shares in zip(joint, *parts):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


@pytest.mark.parametrize('count', [1, 7, 8, 9, 16, 21])
def test_processes_evaluate_every_image_once(count):
    images, labels = torch.zeros(count, 3, 2, 2, dtype=torch.uint8), torch.arange(count)
    parts = [MemoryLoader(images, labels, 4, MEAN, STD, rank=rank, world_size=3) for rank in range(3)]
    batches = [list(part) for part in parts]
    assert [len(part) for part in parts] == [len(share) for share in batches]
    assert sorted(label for share in batches for _, chosen in share for label in chosen.tolist()) == list(range(count))


def test_seeds_of_an_epoch():
    def draw(*args):
        seed_epoch(*args)
        return np.random.rand(), torch.rand(1).item()

    draws = [draw(0, 0), draw(0, 1), draw(1, 0), draw(0, 0, 1)]
    assert draw(0, 0) == draws[0]
    assert len({value for pair in draws for value in pair}) == 8


@pytest.fixture
def folder(tmp_path):
    for split, count in (('train', 6), ('val', 2)):
        for label, name in enumerate('ab'):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((4, 4, 3), 100 * label + index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f'{index}.png')
    return tmp_path


def open_folder(folder, **kwargs):
    return create_datasets('', str(folder), 'train', 'val', **kwargs)


def test_folder_in_memory(folder):
    train, val, names = open_folder(folder)
    assert (len(train), len(val), names) == (12, 4, ['a', 'b'])
    images, labels = load_into_memory(train, 4)
    assert images.shape == (12, 3, 4, 4) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [100 * label + index for label in range(2) for index in range(6)]
    assert labels.tolist() == [0] * 6 + [1] * 6


@pytest.mark.parametrize('recipe, crop_padding, scale', [
    ({}, 4, None),
    ({'scale': (0.5, 1)}, 4, None),
    ({'crop_padding': 0}, 0, None),
    ({'crop_padding': None, 'scale': (0.5, 1)}, 0, (0.5, 1)),
])
def test_crops_in_memory(folder, recipe, crop_padding, scale):
    config = TrainConfig(in_memory=True, num_workers=0, img_size=4, batch_size=4, mean=MEAN, std=STD, **recipe)
    loader = create_image_loader(open_folder(folder)[0], config, True, False, torch.device('cpu'))
    assert (loader.crop_padding, loader.scale) == (crop_padding, scale)


def test_grey_images(folder):
    train, _, _ = open_folder(folder, in_chans=1)
    assert load_into_memory(train, 4)[0].shape == (12, 1, 4, 4)


def test_resizing_must_be_asked_for(folder):
    train, _, _ = open_folder(folder)
    with pytest.raises(ValueError, match=r'4x4.*8x8'):
        load_into_memory(train, 8)
    images, _ = load_into_memory(train, 8, resize=True)
    assert images.shape == (12, 3, 8, 8)
    assert images[:, 0, 3, 3].tolist() == [100 * label + index for label in range(2) for index in range(6)]


def test_images_of_several_sizes(folder):
    Image.new('RGB', (5, 4)).save(folder / 'train' / 'a' / '3.png')
    train, _, _ = open_folder(folder)
    with pytest.raises(ValueError, match='images of one size'):
        load_into_memory(train, 4)


def test_validation_part_of_the_training_split(folder):
    def split(seed):
        train, val, _ = open_folder(folder, val_fraction=0.25, seed=seed)
        assert not val.training
        return [{subset.filename(i) for i in range(len(subset))} for subset in (train, val)]

    train, val = split(0)
    assert (len(train), len(val)) == (9, 3) and not train & val
    assert split(0) == [train, val] and split(1) != [train, val]


def test_fewer_training_images(folder):
    train, val, _ = open_folder(folder, max_train_images=5, val_fraction=0.25)
    assert (len(train), len(val)) == (5, 3)
    assert not {train.filename(i) for i in range(5)} & {val.filename(i) for i in range(3)}


def test_classes_that_only_validation_has(folder):
    (folder / 'val' / 'c').mkdir()
    Image.new('RGB', (4, 4)).save(folder / 'val' / 'c' / '0.png')
    with pytest.raises(ValueError, match=r'val .*\bc\b'):
        open_folder(folder)


def test_validation_may_lack_a_class_without_shifting_labels(folder):
    for path in (folder / 'val' / 'a').iterdir():
        path.unlink()
    (folder / 'val' / 'a').rmdir()
    _, val, _ = open_folder(folder)
    assert load_into_memory(val, 4)[1].tolist() == [1, 1]


DEEP = 100 + 37 * np.arange(16, dtype=np.uint16).reshape(4, 4) * 64  # 16 bits; most are above 255


@pytest.fixture
def deep_images(tmp_path):
    """The same 16-bit image in every format that has them, by the paths of timm's readers."""
    for name in ('train/a/0.png', 'train/b/0.png', 'test/a/0.png', 'test/b/0.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(DEEP).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize('name', ['', 'torch/folder', 'hfds', 'wds'])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_16_bits_a_channel(deep_images, tmp_path, name, in_chans):
    """Pillow makes all of them white that are above 255."""
    pytest.importorskip({'wds': 'webdataset', 'hfds': 'datasets'}.get(name, 'torch'))
    if name == 'hfds':
        name = f'hfds/{deep_images}'
    elif name == 'wds':
        name = 'wds/shards'
        with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
            for suffix, data in (('png', (deep_images / 'train/a/0.png').read_bytes()), ('cls', b'0')):
                member = tarfile.TarInfo(f'0.{suffix}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        info = {'name': 'train', 'num_samples': 1, 'filenames': ['train.tar'], 'shard_lengths': [1]}
        (tmp_path / '_info.json').write_text(json.dumps({'splits': {'train': info}}))
    root = deep_images / 'train' if name == 'torch/folder' else deep_images
    dataset = open_dataset(name, str(root), 'train', in_chans)
    if isinstance(dataset, IterableDataset):
        image, _ = next(iter(dataset))
    else:
        subset = ImageSubset(dataset, None, 'error', training=False)
        image, _ = subset[0]
        images, _ = load_into_memory(subset, 4)
        assert torch.equal(images[0, 0], torch.from_numpy((DEEP >> 8).astype(np.uint8)))
    assert image.mode == ('L' if in_chans == 1 else 'RGB')
    assert np.array_equal(np.asarray(image.convert('L')), DEEP >> 8)


@pytest.mark.parametrize('dtype', ['float32', 'int32'])
def test_images_of_which_nobody_knows_what_is_white(folder, dtype):
    Image.fromarray(np.ones((4, 4), dtype=dtype)).save(folder / 'train' / 'a' / '2.tif')
    add_img_extensions('.tif')
    try:
        train, _, _ = open_folder(folder)
    finally:
        del_img_extensions('.tif')
    with pytest.raises(UnreadableImageError, match=r'a/2\.tif: .* mode [IF]'):
        train[2 + 1]


def test_pictures_are_turned_upright_as_in_prediction(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = folder / 'train' / 'a' / '0.png'
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    train, _, _ = open_folder(folder)
    assert np.array_equal(np.asarray(train[0][0]), np.asarray(picture))


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_image_in_no_class_folder_is_left_out_and_named(folder, caplog, split):
    """timm would make it a class without a name, the first one, and shift all labels."""
    Image.new('RGB', (4, 4)).save(folder / split / 'stray.PNG')
    train, val, names = open_folder(folder)
    assert names == ['a', 'b']
    assert load_into_memory(train, 4)[1].tolist() == [0] * 6 + [1] * 6
    assert load_into_memory(val, 4)[1].tolist() == [0, 0, 1, 1]
    assert [record.message for record in caplog.records if 'stray.PNG' in record.message]
    alone = open_dataset('', str(folder), split)
    assert alone.reader.class_to_idx == {'a': 0, 'b': 1}
    assert open_dataset('', str(folder / split), 'validation').reader.class_to_idx == {'a': 0, 'b': 1}


def test_a_link_to_nowhere_in_no_class_folder_is_left_out(folder):
    (folder / 'train' / 'stray.png').symlink_to(folder / 'gone.png')
    assert open_folder(folder)[2] == ['a', 'b']


def test_images_without_class_folders(folder):
    for name in 'ab':
        for path in (folder / 'train' / name).iterdir():
            path.rename(folder / 'train' / f'{name}{path.name}')
        (folder / 'train' / name).rmdir()
    with pytest.raises(FileNotFoundError, match='train'):
        open_folder(folder)


def test_a_link_to_a_folder_that_contains_it(folder):
    (folder / 'train' / 'a' / 'again').symlink_to(folder / 'train' / 'b', target_is_directory=True)
    assert len(open_folder(folder)[0]) == 18  # a link alone is no loop
    (folder / 'train' / 'b' / 'loop').symlink_to(folder / 'train' / 'a', target_is_directory=True)
    with pytest.raises(ValueError, match=r'again/loop|loop/again'):
        open_folder(folder)
    (folder / 'train' / 'b' / 'loop').unlink()
    (folder / 'train' / 'a' / 'again').unlink()
    (folder / 'train' / 'a' / 'up').symlink_to(folder / 'train', target_is_directory=True)
    with pytest.raises(ValueError, match='a/up'):
        open_folder(folder)


@pytest.mark.parametrize('in_memory', [True, False])
def test_a_worker_names_an_unreadable_image_in_one_line(folder, in_memory, monkeypatch):
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.1)  # else 5 s until the worker is gone
    broken = folder / 'train' / 'a' / '2.png'
    broken.write_bytes(broken.read_bytes()[:40])
    train, _, _ = open_folder(folder)
    config = TrainConfig(in_memory=in_memory, num_workers=1, batch_size=4, img_size=4, crop_pct=1., mean=MEAN, std=STD)
    with pytest.raises(UnreadableImageError) as caught:
        list(create_image_loader(train, config, True, False, torch.device('cpu')))
    assert str(caught.value).startswith(f'cannot read image {broken}: ') and '\n' not in str(caught.value)


def test_unreadable_images(folder):
    broken = folder / 'train' / 'a' / '2.png'
    broken.write_bytes(broken.read_bytes()[:40])
    strict, _, _ = open_folder(folder)
    with pytest.raises(UnreadableImageError, match=r'a/2\.png'):
        strict[2]
    train, _, _ = open_folder(folder, unreadable='skip')
    image, label = train[2]
    assert (np.asarray(image)[0, 0, 0], label) == (3, 0)  # the next one
    assert train.bad_files() == [str(broken)]
    assert load_into_memory(train, 4)[0][:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 100, 101, 102, 103, 104, 105]

    val = ImageSubset(train.source, None, 'skip', training=False)
    assert val[2][1] == -1 and val[3][1] == 0


def test_unreadable_images_are_known_beyond_worker_processes(folder):
    broken = folder / 'train' / 'b' / '5.png'
    broken.write_bytes(b'')
    train, _, _ = open_folder(folder, unreadable='skip')
    loader = create_loader(train, (3, 4, 4), 6, num_workers=2, device=torch.device('cpu'), persistent_workers=False)
    assert sum(len(labels) for _, labels in loader) == 12
    assert train.bad_files() == [str(broken)]


def test_nothing_readable(folder):
    for path in (folder / 'train').rglob('*.png'):
        path.write_bytes(b'')
    train, _, _ = open_folder(folder, unreadable='skip')
    with pytest.raises(UnreadableImageError, match='12'):
        train[0]


def test_many_unreadable_images_in_a_row_are_the_fault_of_the_disk(folder, monkeypatch):
    monkeypatch.setattr(datasets, '_MOST_UNREADABLE', 2)
    train, _, _ = open_folder(folder, unreadable='skip')
    for number in range(2):
        Path(train.filename(number)).write_bytes(b'')
    with pytest.raises(UnreadableImageError, match=f'2 images in a row.*{train.filename(1)}'):
        train[0]
    assert train[1][0].size


def test_torchvision_data_set(tmp_path):
    """CIFAR-10 in torchvision's own format, with the classes' names."""
    from torchvision.datasets import CIFAR10
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        (base / name).write_bytes(pickle.dumps({'data': pixels, 'labels': [3, 9]}))
    (base / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('0123456789')}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, '_check_integrity', lambda self: True)
        patch.setattr('torchvision.datasets.cifar.check_integrity', lambda path, md5: True)
        train, val, names = create_datasets('torch/cifar10', str(tmp_path), 'train', 'test')
        grey = create_datasets('torch/cifar10', str(tmp_path), 'train', 'test', in_chans=1)[1]
    assert (len(train), len(val), names) == (10, 2, list('0123456789'))
    images, labels = load_into_memory(val, 32)
    assert torch.equal(images.flatten(1), torch.from_numpy(pixels)) and labels.tolist() == [3, 9]
    assert load_into_memory(grey, 32)[0].shape == (2, 1, 32, 32)


@needs_sklearn
def test_digits():
    train, val, names = create_datasets(DIGITS, None, 'train', 'validation', in_chans=1)
    assert (len(train), len(val), names) == (1437, 360, list('0123456789'))
    images, labels = load_into_memory(val, 8)
    assert images.shape == (360, 1, 8, 8) and images.max() == 255
    assert labels.bincount().min() >= 34
    train_images, _ = load_into_memory(train, 8)
    known = {image.numpy().tobytes() for image in train_images}
    assert not any(image.numpy().tobytes() in known for image in images)


def test_a_data_set_of_tensors_is_none_of_ours():
    subset = ImageSubset(TensorDataset(torch.zeros(3, 2), torch.arange(3)), torch.tensor([2, 0]), 'error', True)
    assert [label.item() for _, label in (subset[0], subset[1])] == [2, 0]
    assert subset.filename(0) == 'number 2'


@pytest.mark.parametrize('name', ['cifar10', 'image_folder', 'DIGITS', 'foo/bar', 'torch/', '/cifar10'])
def test_unknown_names_are_no_folders(folder, name):
    """timm would read the folder."""
    with pytest.raises(ValueError, match=f"dataset .*'{name}'"):
        open_dataset(name, str(folder), 'train')


def test_unknown_data_set_of_torchvision(folder):
    with pytest.raises(ValueError, match=r"dataset .*torch/foo"):
        open_dataset('torch/foo', str(folder), 'train')


@pytest.mark.parametrize('name', ['', 'torch/cifar10', 'wds/shards'])
def test_data_dir_is_needed(monkeypatch, name):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: package)
    with pytest.raises(ValueError, match=f'data_dir .*{name}.*None.*--data-dir'):
        open_dataset(name, None, 'train')


def test_data_that_were_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'torch/cifar10'.*'train'.*download"):
        open_dataset('torch/cifar10', str(tmp_path), 'train')


@pytest.mark.parametrize(('name', 'package'), [
    ('hfds/a', 'datasets'), ('hfids/a', 'datasets'), ('tfds/a', 'tensorflow'), ('wds/a', 'webdataset'),
])
def test_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda package: None)
    with pytest.raises(ImportError, match=f"dataset .*{name}.*pip install {package}"):
        open_dataset(name, 'data', 'train')


def test_splits_of_digits_and_their_names():
    """Training on the test images would be a slip of one letter."""
    with pytest.raises(ValueError, match=r"train .*test .*'trian'"):
        open_dataset(DIGITS, None, 'trian', 1)


@pytest.mark.parametrize('name', ['torch/cifar10', 'TORCH/MNIST', 'torch/qmnist'])
def test_splits_of_what_torchvision_splits_in_two(name, tmp_path):
    """timm takes the test images for every name that is not one of the training images."""
    with pytest.raises(ValueError, match=rf"split .*{name}.*train, .*test, got 'trian'"):
        open_dataset(name, str(tmp_path), 'trian')


@pytest.mark.parametrize('options', [dict(val_fraction=0.01), dict(val_fraction=0.99)])
def test_nothing_left_to_train_on_or_to_evaluate(folder, options):
    with pytest.raises(ValueError, match=r'val_fraction .*train|val_fraction .*evaluate'):
        create_datasets('', str(folder), 'train', 'val', **options)


def test_digits_are_grey():
    with pytest.raises(ValueError, match=r'digits .*3 .*in_chans'):
        open_dataset(DIGITS, None, 'train')


def test_classes_in_nested_folders(folder):
    (folder / 'train' / 'b').rename(folder / 'b')
    (folder / 'train' / 'group').mkdir()
    (folder / 'b').rename(folder / 'train' / 'group' / 'b')
    assert open_dataset('', str(folder), 'train').reader.class_to_idx == {'a': 0, 'b': 1}


def test_training_on_a_folder_without_splits(folder):
    with pytest.raises(FileNotFoundError, match=r"'train'.*'a', 'b'"):
        create_datasets('', str(folder / 'train'), 'train', 'val')


COUNTS = {'train': 96, 'validation': 33}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """The same images as WebDataset shards, and as a folder that Hugging Face's datasets read."""
    folder = tmp_path_factory.mktemp('published')
    generator = np.random.default_rng(0)
    info = {}
    for split, count in COUNTS.items():
        filenames = [f'{split}-{shard}.tar' for shard in range(2)]
        for shard, filename in enumerate(filenames):
            with tarfile.open(folder / filename, 'w') as tar:
                for index in range(shard, count, 2):
                    image = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                    path = folder / 'images' / split / f'class{index % 3}' / f'{index}.png'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
                    for suffix, data in (('png', path.read_bytes()), ('cls', str(index % 3).encode())):
                        member = tarfile.TarInfo(f'{index:04}.{suffix}')
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        info[split] = {
            'name': split, 'num_samples': count, 'filenames': filenames,
            'shard_lengths': [(count + 1) // 2, count // 2],
        }
    (folder / '_info.json').write_text(json.dumps({'splits': info}))
    return folder


@pytest.mark.parametrize('num_workers', [0, 3])
@pytest.mark.parametrize('kind', ['wds', 'hfds'])
def test_shards_and_hub_datasets(published, tmp_path, kind, num_workers):
    pytest.importorskip({'wds': 'webdataset', 'hfds': 'datasets'}[kind])
    name, root = ('wds/shards', published) if kind == 'wds' else (f'hfds/{published / "images"}', tmp_path)
    train, val, names = create_datasets(name, str(root), 'train', 'validation', batch_size=8)
    assert names == (None if kind == 'wds' else ['class0', 'class1', 'class2'])
    config = TrainConfig(
        dataset=name, num_workers=num_workers, batch_size=8, img_size=8, crop_pct=1., mean=MEAN, std=STD)
    device = torch.device('cpu')
    batches = list(create_image_loader(train, config, True, False, device))
    assert {tuple(images.shape) for images, _ in batches} == {(8, 3, 8, 8)}
    assert {label for _, labels in batches for label in labels.tolist()} == {0, 1, 2}
    labels = torch.cat([labels for _, labels in create_image_loader(val, config, False, False, device)])
    assert sorted(labels.tolist()) == [0] * 11 + [1] * 11 + [2] * 11


def test_tiny_imagenet_becomes_folders_of_classes(tmp_path):
    source, destination = tmp_path / 'tiny-imagenet-200', tmp_path / 'data'
    for wnid in ('n1', 'n2'):
        (source / 'train' / wnid / 'images').mkdir(parents=True)
        (source / 'train' / wnid / 'images' / f'{wnid}_0.JPEG').write_text(f'train {wnid}')
    (source / 'val' / 'images').mkdir(parents=True)
    (source / 'val' / 'images' / 'val_0.JPEG').write_text('val')
    (source / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn2\t0\t0\t63\t63\n')
    (source / 'wnids.txt').write_text('n1\nn2\n')
    (source / 'words.txt').write_text('n1\tEgyptian cat\nn2\treel, spool\nn3\tnot used\n')
    script = runpy.run_path(str(Path(__file__).parents[1] / 'train_scripts' / 'tiny_imagenet.py'))
    script['arrange'](source, destination)
    found = {str(path.relative_to(destination)): path.read_text() for path in destination.rglob('*.JPEG')}
    assert found == {
        'train/Egyptian cat/n1_0.JPEG': 'train n1', 'train/reel/n2_0.JPEG': 'train n2',
        'validation/reel/val_0.JPEG': 'val'}
    with pytest.raises(FileExistsError, match='destination'):
        script['arrange'](source, destination)
    with pytest.raises(FileNotFoundError):
        script['arrange'](tmp_path / 'nothing', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
