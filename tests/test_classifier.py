"""The classifier that page, service and command share: every kind of name, every kind of image."""
import argparse
import contextlib
import io
import json
import shutil
import struct
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from pictures import load_image
from PIL import Image
from test_hub import put, results_of, trained_model
from timm.utils import CheckpointSaver

import timm_hne
from timm_hne.evaluation.cost import member_macs
from timm_hne.hub import write_folder
from timm_hne.inference.deploy import export_folder
from timm_hne.pretrained import PACKAGED
from timm_hne.serving import Classifier, ExportedEnsemble, views
from timm_hne.serving.classifier import FORMATS, ImageError, locate

NODES = (1, 1, 2, 2, 4)
LABELS = ['ant', 'bee', 'cow', 'dog', 'eel', 'fox', 'gnu', 'hen', 'ibex', 'jay']


def encode(image, format='PNG', **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def noise(width=50, height=40, channels=3):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


@pytest.fixture(scope='module')
def model():
    model = trained_model(nodes=NODES)
    model.classifier.weight.data /= 100  # else one class is so sure that all probabilities are 0 or 1
    return model


@pytest.fixture(scope='module')
def places(model, tmp_path_factory):
    """The same model as a published folder, a checkpoint, a run, and an exported folder."""
    folder = tmp_path_factory.mktemp('places')
    write_folder(model, folder / 'net', 'hf-hub:alice/net', results_of(model), dict(epochs=1), label_names=LABELS)
    (folder / 'run').mkdir()
    args = argparse.Namespace(model='hne_resnet50_c8', label_names=LABELS)
    CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), args=args, checkpoint_dir=str(folder / 'run'),
        recovery_dir=str(folder / 'run')).save_checkpoint(epoch=0)
    published = timm.create_model(f'local-dir:{folder / "net"}', pretrained=True).eval()
    export_folder(published, folder / 'exported')
    return {
        'published': folder / 'net', 'run': folder / 'run', 'checkpoint': folder / 'run' / 'last.pth.tar',
        'exported': folder / 'exported',
    }


@pytest.fixture(scope='module')
def classifier(places):
    return Classifier.open(places['published'], 'none')


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    # Published weights are stored in half precision.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize('place', ['published', 'run', 'checkpoint', 'exported'])
def test_every_kind_of_name(places, model, images, place):
    classifier = Classifier.open(places[place], 'none')
    assert classifier.ensemble_size == 4 and classifier.prefixes == (1, 2, 4)
    assert classifier.class_names == tuple(LABELS)
    assert classifier.macs == member_macs(model)
    assert classifier.input_size == (3, 32, 32)
    assert (classifier.results is not None) == (place == 'published')
    with torch.no_grad():
        for n in (1, 2, 3, 4):
            close(classifier.logits(images, n), model(images, num_members=n))
        close(classifier.member_logits(images), model.forward_members(images))
    assert torch.equal(classifier.image(noise()), classifier.image(encode(noise())))


def test_a_name_of_the_hub(hub, places):
    put(hub, {path.name: path.read_bytes() for path in places['published'].iterdir()})
    classifier = Classifier.open('hf-hub:alice/net', 'none')
    assert classifier.class_names == tuple(LABELS)
    assert classifier.results[3]['top1'] == 83


def test_the_weights_of_the_package():
    classifier = Classifier.open('hne_resnet50_c8', 'none')
    measured = json.loads((PACKAGED / 'hne_resnet50_c8.hcd_cifar10.json').read_text())['members']
    assert classifier.class_names[0] == 'airplane'
    assert [classifier.results[n]['top1'] for n in (1, 16)] == [measured[n - 1]['top1'] for n in (1, 16)]
    assert (classifier.macs[1], classifier.macs[16]) == (13_077_760, 102_166_528)
    logits = torch.arange(10.)
    expected = (logits / measured[0]['temperature']).softmax(0)
    assert classifier.probabilities(logits, 1).tolist() == pytest.approx(expected.tolist())
    assert [label.index for label in classifier.top(logits, 1, 3)] == [9, 8, 7]
    assert classifier.top(logits, 1, 3)[0].probability == pytest.approx(expected[9].item())


def test_classes_without_names_are_numbers(model):
    model = timm.create_model('hne_resnet50_c8', nodes=NODES, num_classes=3).eval()
    assert Classifier(model, {}).class_names == ('0', '1', '2')


@pytest.mark.parametrize('name, kwargs, error', [
    ('no_such_model', {}, RuntimeError),
    ('resnet50', {}, ValueError),
    ('hne_mobilenetv2_075_e4', {}, RuntimeError),
    ('/no/such/file.pth', {}, ValueError),
    ('hne_resnet50_c8', {'engine': 'tensorflow'}, ValueError),
    ('hne_resnet50_c8', {'max_pixels': 0}, ValueError),
    ('hne_resnet50_c8', {'num_classes': 0}, ValueError),
])
def test_a_wrong_name_or_argument(name, kwargs, error):
    with pytest.raises(error):
        Classifier.open(name, **{'engine': 'none', **kwargs})


def test_an_exported_model_takes_no_arguments(places):
    with pytest.raises(ValueError, match='nodes'):
        Classifier.open(places['exported'], nodes=NODES)


def test_engines_compute_the_same(places, classifier, images):
    fast = Classifier.open(places['published'])
    assert fast.engine == 'auto'
    torch.testing.assert_close(fast.logits(images, 3), classifier.logits(images, 3), rtol=1e-4, atol=1e-3)
    assert fast.engine in ('onnxruntime', 'openvino', 'inductor')


@pytest.mark.parametrize('place', ['published', 'exported'])
def test_anytime_and_early_exit(places, place, images):
    classifier = Classifier.open(places[place], 'none')
    steps = list(classifier.anytime(images))
    assert [n for n, _ in steps] == [1, 2, 4]
    for n, logits in [*steps, *classifier.anytime(images, (1, 3))]:
        torch.testing.assert_close(logits, classifier.logits(images, n), rtol=1e-4, atol=1e-3)
    assert len(list(classifier.anytime(images, deadline=0.))) == 1
    assert len(list(classifier.anytime(images, deadline=1e6))) == 3

    # The threshold that the middle one of three images reaches with one member.
    sure = classifier.logits(images, 1).softmax(1).amax(1)
    threshold = sure.sort().values[1].item()
    logits, used = classifier.early_exit(images, threshold)
    assert used[sure >= threshold].tolist() == [1, 1] and used[sure < threshold].item() > 1
    for i, n in enumerate(used.tolist()):
        torch.testing.assert_close(logits[i:i + 1], classifier.logits(images[i:i + 1], n), rtol=1e-4, atol=1e-3)


def test_an_exported_model_keeps_to_the_threads_of_pytorch(places):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runtime = Classifier.open(places['exported']).model.runtime
            assert {session._threads for _, session in runtime._steps} == {count}
    finally:
        torch.set_num_threads(threads)


def test_an_exported_model_stays_on_the_cpu(places, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert next(Classifier.open(places['exported'], device='auto').model.parameters()).device.type == 'cpu'
    devices = []

    class Stopped(Exception):
        pass

    def to(device):
        devices.append(device)
        raise Stopped

    monkeypatch.setattr('timm_hne.serving.classifier._open_model', lambda name: SimpleNamespace(to=to))
    with pytest.raises(Stopped):
        Classifier.open(places['published'], 'none', device='auto')
    assert devices == ['cuda']


def test_an_exported_model_stands_in_for_an_ensemble(places, images):
    exported = ExportedEnsemble.load(places['exported'])
    assert exported(images[:0]).shape == (0, 10)
    with pytest.raises(ValueError):
        exported.train()
    for place in (torch.bfloat16, 'meta'):
        with pytest.raises(ValueError, match='CPU in float32'):
            exported.to(place)
    assert next(exported.parameters()).dtype == torch.float32
    with pytest.raises(ValueError):
        exported(images, num_members=5)
    exported = ExportedEnsemble.load(places['exported'])
    with timm_hne.AdaptiveRunner(exported, 10., max_batch_size=2, warmup_repeats=1) as runner:
        answer = runner.submit(images[0]).result()
    torch.testing.assert_close(answer.logits[None], exported(images[:1], answer.num_members), rtol=1e-4, atol=1e-3)


def sixteen_bits():
    return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16))


def animation(format, **kwargs):
    frames = [noise(), Image.new('RGB', (50, 40), 'red')]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], **kwargs)


FILES = {
    'rgb': lambda: encode(noise()),
    'grey': lambda: encode(noise(channels=1)),
    'alpha': lambda: encode(noise(channels=4)),
    'palette': lambda: encode(noise().quantize(16)),
    'transparent palette': lambda: encode(noise().quantize(16), transparency=3),
    'one bit': lambda: encode(noise().convert('1')),
    'cmyk': lambda: encode(noise().convert('CMYK'), 'JPEG'),
    '16 bits': lambda: encode(sixteen_bits()),
    '16 bits, TIFF': lambda: encode(sixteen_bits(), 'TIFF'),
    '16 bits, PGM': lambda: b'P5 50 40 65535\n' + np.asarray(sixteen_bits()).astype('>u2').tobytes(),
    'animated GIF': lambda: animation('GIF'),
    'animated PNG': lambda: animation('PNG'),
    'animated WebP': lambda: animation('WEBP', lossless=True),
    'bitmap': lambda: encode(noise(), 'BMP'),
    'turned': lambda: encode(noise(), exif=turned()),
}


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize('kind', FILES)
def test_images_of_all_modes_are_prepared_as_elsewhere(classifier, tmp_path, kind):
    data = FILES[kind]()
    (tmp_path / 'image').write_bytes(data)
    expected = load_image(tmp_path / 'image', classifier.model)[0]
    with Image.open(io.BytesIO(data)) as picture:
        for source in (data, bytearray(data), str(tmp_path / 'image'), tmp_path / 'image', picture):
            assert torch.equal(classifier.image(source), expected)
        assert picture.size == (50, 40)  # and not turned


def test_the_first_frame_of_an_animation_counts(classifier):
    assert torch.equal(classifier.image(animation('PNG')), classifier.image(encode(noise())))


def test_a_model_of_one_channel():
    model = timm.create_model('hne_resnet50_c8', nodes=NODES, in_chans=1, pretrained_cfg_overlay=dict(
        input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))).eval()
    assert Classifier(model, {}).image(noise()).shape == (1, 32, 32)


@pytest.mark.parametrize('in_chans, cfg', [(1, {}), (4, dict(input_size=(4, 32, 32), mean=(0.5,) * 4, std=(1.,) * 4))])
def test_a_model_whose_images_it_cannot_make_is_refused(in_chans, cfg):
    model = timm.create_model('hne_resnet50_c8', nodes=NODES, in_chans=in_chans, pretrained_cfg_overlay=cfg).eval()
    with pytest.raises(ValueError, match=f'1 or 3 channels.*in_chans={in_chans}'):
        Classifier(model, {})


def tiff(pixels, bits=8, photometric=1, compression=1, tile=None):
    """A grey TIFF file of 8x8 pixels."""
    tags = {256: 8, 257: 8, 258: bits, 259: compression, 262: photometric, 277: 1}
    layout = {273: None, 278: 8, 279: len(pixels)} if tile is None else {
        322: tile[0], 323: tile[1], 324: None, 325: len(pixels)}
    tags = sorted({**tags, **layout}.items())
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, start if value is None else value) for tag, value in tags)
    return b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4) + pixels


@pytest.mark.parametrize('bits, photometric, byte, expected', [
    (8, 1, 255, 255), (12, 1, 255, 255), (16, 1, 255, 255), (8, 0, 255, 0), (16, 0, 255, 0),
    (16, 1, 0, 0), (16, 0, 0, 255),
])
def test_grey_tiff_files_of_many_bits(classifier, bits, photometric, byte, expected):
    data = tiff(bytes([byte]) * (8 * bits), bits, photometric)
    white = Image.new('RGB', (8, 8), (expected,) * 3)
    assert torch.equal(classifier.image(data), classifier.image(white))
    with Image.open(io.BytesIO(data)) as image:
        assert torch.equal(classifier.image(image), classifier.image(white))


@pytest.mark.parametrize('kind, size', [(1, 1), (3, 2), (4, 4), (5, 8)])  # bytes, integers and fractions of TIFF
@pytest.mark.parametrize('tag', [273, 324])
def test_a_tiff_of_many_strips_is_refused_before_it_is_opened(classifier, monkeypatch, tmp_path, tag, kind, size):
    """Pillow would make an object of each, hundreds of bytes for one."""
    def many(count):
        tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
        start = 8 + 2 + 12 * (len(tags) + 1) + 4
        entries = sorted([(key, 4, 1, value) for key, value in tags.items()] + [(tag, kind, count, start)])
        packed = b''.join(struct.pack('<HHII', *entry) for entry in entries)
        return b'II*\0' + struct.pack('<IH', 8, len(entries)) + packed + bytes(4) + bytes(size * count)

    (tmp_path / 'image.tif').write_bytes(many(65_537))
    monkeypatch.setattr(Image, 'open', lambda *args, **kwargs: pytest.fail('opened'))
    for source in (many(65_537), tmp_path / 'image.tif'):
        with pytest.raises(ImageError, match='65,537 strips or tiles'):
            classifier.image(source)
    with pytest.raises(pytest.fail.Exception, match='opened'):
        classifier.image(many(65_536))


def test_more_pixels_than_pillow_opens(classifier, monkeypatch):
    assert Classifier.open('hne_resnet50_c8', 'none', max_pixels=200_000_000).max_pixels == 178_956_970
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    assert Classifier.open('hne_resnet50_c8', 'none').max_pixels == 2000
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert Classifier.open('hne_resnet50_c8', 'none', max_pixels=200_000_000).max_pixels == 200_000_000


def test_tiles_that_are_larger_than_their_image_count(classifier):
    for tile, error in (((16, 16), False), ((16, 6_250_000), True), ((16, 0), True)):
        data = tiff(bytes(256), compression=8 if error else 1, tile=tile)
        for source in (data, Image.open(io.BytesIO(data))):
            refused = pytest.raises(ImageError, match=r'16x6250000 pixels|damaged')
            with refused if error else contextlib.nullcontext():
                assert classifier.image(source).shape == (3, 32, 32)


END = bytes(4) + b'IEND'  # begins the last chunk of a PNG
BROKEN = {
    'empty': b'',
    'text': b'no image',
    'zeros': bytes(5000),
    'header only': encode(noise())[:40],
    'truncated PNG': encode(noise())[:-1000],
    'truncated JPEG': encode(noise(), 'JPEG')[:1000],
    'truncated GIF': encode(noise(), 'GIF')[:400],
    'truncated WebP': encode(noise(), 'WEBP')[:500],
    'PostScript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n',
    'a TIFF that Pillow trips over': tiff(bytes(64), compression=2),
    'no palette': bytes(encode(noise())[:8]) + b''.join(
        len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big') for kind, data in (
            (b'IHDR', struct.pack('>IIBBBBB', 4, 4, 8, 3, 0, 0, 0)), (b'tRNS', b'\0'),
            (b'IDAT', zlib.compress(bytes(20))), (b'IEND', b''))),
    'floating point': encode(Image.new('F', (4, 4)), 'TIFF'),
    'empty profile': encode(noise()).replace(END, b'\0\0\0\0iCCP' + zlib.crc32(b'iCCP').to_bytes(4, 'big') + END),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_what_is_no_image_is_refused(classifier, tmp_path, kind):
    with pytest.raises(ImageError, match=r'^the image cannot be read: .+\.$') as info:
        classifier.image(BROKEN[kind])
    assert '\n' not in str(info.value) and '0x' not in str(info.value)
    (tmp_path / 'image').write_bytes(BROKEN[kind])
    with pytest.raises(ImageError, match=f'image {tmp_path / "image"} cannot be read'):
        classifier.image(tmp_path / 'image')
    if 'TIFF' in kind:
        with Image.open(tmp_path / 'image') as image, pytest.raises(ImageError, match='the image cannot be read'):
            classifier.image(image)


@pytest.mark.parametrize('source', [None, 3, ['image'], np.zeros((4, 4, 3), np.uint8)])
def test_other_things_are_refused(classifier, source):
    with pytest.raises(TypeError):
        classifier.image(source)


def test_a_missing_file_is_an_error_of_the_system(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.png cannot be read'):
        classifier.image(tmp_path / 'none.png')


def bomb(width, height):
    """A PNG that says it has so many pixels, with hardly any data."""
    data = bytearray(encode(Image.new('L', (1, 1))))
    data[16:24] = width.to_bytes(4, 'big') + height.to_bytes(4, 'big')
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    return bytes(data)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('size', [(10_000, 10_000), (12_000, 10_000), (60_000, 60_000), (2 ** 31 - 1, 2 ** 31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(classifier, monkeypatch, size):
    def load(self):
        raise AssertionError('decoded')

    data = bomb(*size)
    monkeypatch.setattr(Image.Image, 'load', load)
    with pytest.raises(ImageError, match='pixels'):
        classifier.image(data)


@pytest.mark.parametrize('size', [(1, 1_000_000), (1_000_000, 2)])
def test_a_strip_that_would_be_resized_to_a_huge_image_is_refused(classifier, size):
    with pytest.raises(ImageError, match='too long'):
        classifier.image(Image.new('L', size))


@pytest.mark.parametrize('size', [(1, 1), (1, 100), (300, 2)])
def test_small_images_are_taken(classifier, size):
    assert classifier.image(encode(Image.new('RGB', size))).shape == (3, 32, 32)


def test_the_limit_of_pixels_can_be_chosen(model):
    classifier = Classifier(model, {}, max_pixels=2000)
    classifier.image(Image.new('L', (50, 40)))
    for source in (Image.new('L', (51, 40)), encode(Image.new('L', (51, 40)))):
        with pytest.raises(ImageError, match='2,000'):
            classifier.image(source)


def test_only_formats_that_say_how_large_an_image_is():
    assert not {'EPS', 'ICO', 'ICNS', 'WMF', 'PSD'} & set(FORMATS)


def test_many_threads(classifier, images):
    expected, found = classifier.logits(images), {}

    def work(i):
        found[i] = torch.equal(classifier.image(encode(noise())), classifier.image(noise())) and torch.allclose(
            classifier.logits(images), expected, atol=1e-4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def test_the_name_of_a_model_of_the_package_is_no_folder_that_has_it(places, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert locate('hne_resnet50_c8') == 'hne_resnet50_c8' and not caplog.messages
    shutil.copytree(places['exported'], 'hne_resnet50_c8')
    assert locate('hne_resnet50_c8') == 'hne_resnet50_c8' and './hne_resnet50_c8' in caplog.text
    assert locate(Path('hne_resnet50_c8')) == Path('hne_resnet50_c8')
    assert isinstance(Classifier.open('./hne_resnet50_c8').model, ExportedEnsemble)
    assert Classifier.open('hne_resnet50_c8', 'none').ensemble_size == 16
    (tmp_path / 'hne_resnet50_c8.pth.tar').touch()
    assert locate('hne_resnet50_c8.pth.tar') == Path('hne_resnet50_c8.pth.tar')
    assert locate('hne_resnet50_c8.hcd_cifar100') == 'hne_resnet50_c8.hcd_cifar100'
    for name in ('hne_mobilenetv2_075_e4', 'resnet18'):  # without weights of ours
        (tmp_path / name).mkdir()
        assert locate(name) == Path(name)
    with pytest.raises(FileNotFoundError, match='none'):
        locate(tmp_path / 'none')


@pytest.mark.parametrize('place, which', [
    ('published', 'local-dir:{}'), ('checkpoint', '--checkpoint {}'), ('run', '--checkpoint {}/last.pth.tar'),
])
def test_the_page_says_how_to_evaluate_what_it_shows(classifier, places, place, which):
    name = str(places[place])
    assert f'`timm-hne eval {which.format(name)} --output' in views.no_evaluation(name, classifier)
    assert '`timm-hne eval hne_resnet50_c8 --output' in views.no_evaluation('hne_resnet50_c8', classifier)
