"""`timm-hne app`: what the page says is the model's, in a real browser too, and it gives nothing else away.

    python tests/test_page.py             # writes docs/images/page.png
"""
import contextlib
import io
import json
import math
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_ensemble

from timm_hne.__main__ import main
from timm_hne.evaluation import metrics
from timm_hne.evaluation.plots import draw_accuracy
from timm_hne.inference.deploy import export_folder
from timm_hne.inference.latency import LatencyTable
from timm_hne.serving import Classifier
from timm_hne.serving.classifier import ImageError

ROOT = Path(__file__).parent.parent
SPACE = ROOT / 'hub_cards' / 'space'
MODEL = 'hne_resnet50_c8'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
PICTURE = ROOT / 'hub_cards' / 'hne_resnet50_c8.hcd_cifar10' / 'accuracy.png'  # a file that nobody uploaded
WINDOWS = {'wide': (1280, 900), 'phone': (390, 844)}

needs_gradio = pytest.mark.skipif(find_spec('gradio') is None, reason="needs gradio: pip install 'timm-hne[app]'")
needs_browser = pytest.mark.skipif(
    find_spec('playwright') is None or CHROMIUM is None, reason='needs the package playwright and a system Chromium')


def encode(image, format='PNG', **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def noise(shape=(40, 50, 3), dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


@pytest.fixture(scope='module')
def classifier():
    return Classifier.open(MODEL, engine='none')


@pytest.fixture(scope='module')
def page_module():
    pytest.importorskip('gradio')
    from timm_hne.serving import page

    return page


@pytest.fixture
def page(page_module, classifier):
    return page_module.Page(classifier, MODEL)


@pytest.fixture(scope='module')
def cat(page_module):
    return next(path for path in page_module.EXAMPLES if path.stem == 'cat').read_bytes()


# What the page says.

@needs_gradio
@pytest.mark.parametrize('num_members', [1, 3, 16])
def test_classes_and_facts_are_the_models(page, classifier, cat, num_members):
    shown, facts = page.predict(cat, num_members)
    with torch.no_grad():
        members = classifier.model.forward_members(classifier.image(cat)[None], num_members)
    logits = members.mean(dim=1)[0]
    temperature = classifier.results[num_members]['temperature']
    probabilities = (logits / temperature).softmax(dim=-1)
    best = probabilities.argsort(descending=True)[:5]
    assert list(shown) == [classifier.class_names[i] for i in best]
    assert list(shown.values()) == pytest.approx(probabilities[best].tolist(), abs=1e-5)
    votes = int((members[0].argmax(dim=-1) == best[0]).sum())
    assert f'{votes} of {num_members}<' in facts
    assert f'{metrics.predictive_entropy(members).item():.2f} nats' in facts
    assert f'{metrics.mutual_information(members).item():.3f} of it' in facts
    assert f'{classifier.macs[num_members] / 1e6:.1f} M' in facts


@needs_gradio
def test_an_unusual_picture_is_named(page, page_module, classifier, cat):
    assert 'Unsure' not in page.predict(cat, 16)[1]
    strict = Classifier(classifier.model, classifier.macs, {16: dict(top1=90., temperature=1., usual_confidence=0.9)})
    facts = page_module.Page(strict, MODEL).predict(cat, 16)[1]
    assert 'Unsure' in facts and 'get 90% or more' in facts and 'airplane, automobile' in facts


@needs_gradio
def test_the_examples_are_as_their_names_say(page, page_module):
    """A cat and a horse, and a cup, which is no class of the model: its members do not agree."""
    votes = {}
    for path in page_module.EXAMPLES:
        shown, facts = page.predict(path.read_bytes(), 16)
        votes[path.stem] = int(re.search(r'<dd>(\d+) of 16<', facts)[1])
        if path.stem != 'cup':
            assert next(iter(shown)) == path.stem
    assert votes['cup'] < min(votes['cat'], votes['horse'])


@needs_gradio
def test_anytime_goes_on_bar_by_bar(page, classifier, cat):
    pictures = list(page.anytime(cat))
    assert [picture.count('class="waits"') for picture in pictures] == [4, 3, 2, 1, 0]
    for picture, num_members in zip(pictures, classifier.prefixes):
        shown, _ = page.predict(cat, num_members)
        name, probability = next(iter(shown.items()))
        found = re.findall(r'<b>(.*?) (\d+)%</b>.*?<span>(\d+) members?</span>', picture)[-1]
        assert found == (name, f'{probability:.0%}'.rstrip('%'), str(num_members))
    times = [float(ms) for ms in re.findall(r'<span>([\d.]+) ms</span>', pictures[-1])]
    assert len(times) == 5 and times == sorted(times)


@needs_gradio
def test_a_budget_buys_members(page, monkeypatch):
    latency = {1: {1: 2., 2: 3., 4: 5., 8: 9., 16: 17.}}
    calls = []

    def measure(model, input_size, batch_sizes, num_members):
        calls.append(num_members)
        return LatencyTable(MODEL, 'eager', (1, 2, 4, 8, 16), input_size, 'float32', {'hardware': 'an <abacus>'},
                            dict.fromkeys(num_members, 1), latency)

    monkeypatch.setattr(LatencyTable, 'measure', measure)
    for budget, num_members in [(2, 1), (4.9, 2), (5, 4), (1000, 16), (1.99, None)]:
        said, bought = page.budget(budget)
        assert bought == num_members
        assert ('too few: 1 member takes 2.0 ms' in said) == (bought is None)
        assert said.count('class="chosen"') == (bought is not None)
        assert f'{page.classifier.results[16]["top1"]:.2f} %' in said and 'an &lt;abacus&gt;' in said
    assert calls == [(1, 2, 4, 8, 16)]
    page.budget(5, again=True)
    assert len(calls) == 2


@needs_gradio
@pytest.mark.parametrize('budget', [0, -1, math.nan, math.inf, None, '5', True])
def test_budgets_that_are_none(page, budget):
    with pytest.raises((ValueError, TypeError), match=r'the budget must be .*got'):
        page.budget(budget)


@needs_gradio
@pytest.mark.parametrize(('data', 'reason'), [
    (b'', 'empty'), (b'no image', 'identify'), (encode(Image.fromarray(noise()))[:900], 'trunc|broken'),
    (encode(Image.new('1', (10_001, 10_000))), '10001x10000'),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'identify'),
])
def test_what_is_no_picture(page, data, reason):
    for answer in (lambda: page.predict(data, 1), lambda: next(page.anytime(data))):
        with pytest.raises(ImageError, match=reason):
            answer()


@needs_gradio
@pytest.mark.parametrize('data', [
    encode(Image.fromarray(noise()).convert('CMYK'), 'JPEG'), encode(Image.fromarray(noise((40, 50), np.uint16))),
    encode(Image.fromarray(noise()).convert('P')), encode(Image.fromarray(noise((40, 50, 4)))),
    encode(Image.fromarray(noise()), 'GIF', save_all=True, append_images=[Image.new('RGB', (50, 40))]),
    encode(Image.new('1', (50, 40))), encode(Image.fromarray(noise((40, 50))), 'WEBP'),
], ids=['cmyk', '16 bits', 'palette', 'alpha', 'animated', '1 bit', 'webp'])
def test_pictures_of_all_kinds(page, data):
    shown, _ = page.predict(data, 2)
    assert len(shown) == 5 and 0 < sum(shown.values()) <= 1.001


@needs_gradio
@pytest.mark.parametrize('num_members', [0, 17, -1])
def test_members_that_there_are_not(page, cat, num_members):
    with pytest.raises(ValueError, match=f'num_members must be from 1 to 16, got {num_members}'):
        page.predict(cat, num_members)
    with pytest.raises(ValueError, match='pause'):
        next(page.anytime(cat, math.nan))


@needs_gradio
def test_nothing_is_said_of_no_picture(page):
    assert page.predict(None, 16) == (None, '')
    with pytest.raises(ImageError, match='choose a picture first'):
        next(page.anytime(None))


@needs_gradio
def test_names_that_a_stranger_chose(page_module, cat):
    classifier = Classifier.open(MODEL, engine='none')
    classifier.class_names = ('<script>alert(1)</script>',) * classifier.num_classes
    page = page_module.Page(classifier, '<b>name</b>')
    shown, facts = page.predict(cat, 16)
    assert len(shown) == 5 and '<script>alert(1)</script> (3)' in shown
    texts = [facts, *page.anytime(cat), page_module.views.unsure(0.4, classifier.class_names),
             page_module.views.heading('<b>name</b>', classifier),
             page_module.views.no_evaluation('<b>name</b>', classifier)]
    assert not any('<script>' in text or '<b>name' in text for text in texts)


@needs_gradio
def test_an_exported_folder(page_module, cat, tmp_path):
    """Between two numbers of its schedule it takes what the higher one takes."""
    pytest.importorskip('onnxruntime')
    model = tiny_ensemble((1, 2, 4))
    export_folder(model, tmp_path / 'net', (3, 8, 8), schedule=(1, 4))
    exported = Classifier.open(tmp_path / 'net')
    page = page_module.Page(exported, 'net')
    for num_members in (1, 2, 3, 4):
        shown, _ = page.predict(cat, num_members)
        with torch.no_grad():
            probabilities = model(exported.image(cat)[None], num_members=num_members)[0].softmax(dim=-1)
        assert {int(name): value for name, value in shown.items()} == pytest.approx(
            dict(enumerate(probabilities.tolist())), abs=1e-4)
        assert page.macs(num_members) == exported.macs[1 if num_members == 1 else 4]
    assert len(list(page.anytime(cat))) == 2
    said, bought = page.budget(10_000)
    assert bought == 4 and said.count('<tr') == 3
    assert_no_accuracy(page, page_module, 'An exported folder holds no evaluation.')


@needs_gradio
def test_a_model_without_an_evaluation_is_told_what_to_run(page_module, classifier):
    page = page_module.Page(Classifier(classifier.model, classifier.macs), 'net')
    said, bought = page.budget(10_000)
    assert bought == 16 and '%' not in said
    assert_no_accuracy(page, page_module, '`timm-hne eval net --output evaluation.json`')


def assert_no_accuracy(page, page_module, words):
    """The page has a sentence in the place of the plot."""
    parts = page_module.build(page.classifier, 'net').get_config_file()['components']
    assert page.rows == [] and not [part for part in parts if part['type'] == 'plot']
    assert words in next(part for part in parts if part['props'].get('elem_id') == 'accuracy')['props']['value']


def test_the_members_chosen_are_marked_in_the_plot():
    pytest.importorskip('matplotlib')
    rows = [{'num_members': n, 'macs': 1e7 * n, 'top1': 80 + n} for n in (1, 2, 3, 4)]
    assert len(draw_accuracy(rows).axes[0].lines) == len(draw_accuracy(rows, 9).axes[0].lines) == 1
    line, mark = draw_accuracy(rows, 3).axes[0].lines
    assert line.get_xydata().tolist() == [[10, 81], [20, 82], [30, 83], [40, 84]]
    assert mark.get_xydata().tolist() == [[30, 83]]


# The server.

@contextlib.contextmanager
def only_loopback(monkeypatch):
    """Record the addresses that this process connects to, and let it reach its own machine alone."""
    others, connect = [], socket.socket.connect

    def checked(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            others.append(address)
            raise ConnectionRefusedError(f'no connection to {address}')
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', checked)
    yield others


@pytest.fixture(scope='module')
def server(page_module, classifier):
    with pytest.MonkeyPatch.context() as monkeypatch, only_loopback(monkeypatch) as others:
        blocks = page_module.build(classifier, MODEL)
        url = page_module.launch(blocks)
        yield url
        blocks.close()
        assert not others


def fetch(url, data=None):
    """Return the status and the body of what a server answers."""
    request = urllib.request.Request(url, data, {'Content-Type': 'application/json'} if data else {})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@needs_gradio
def test_it_is_bound_to_this_machine_alone(server):
    port = int(re.fullmatch(r'http://127\.0\.0\.1:(\d+)/', server)[1])
    for address in {'127.0.0.2', *socket.gethostbyname_ex(socket.gethostname())[2]} - {'127.0.0.1'}:
        with socket.socket() as visitor:
            visitor.settimeout(2)
            assert visitor.connect_ex((address, port)), address


@needs_gradio
@pytest.mark.parametrize('route', ['gradio_api/file=', 'file=', 'file/', 'gradio_api/file/', 'static/', 'assets/', ''])
def test_no_file_of_the_server_can_be_read(server, route, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'secret.txt').write_text('root:secret')
    assert fetch(server)[0] == 200
    for path in ('/etc/passwd', str(tmp_path / 'secret.txt'), 'secret.txt', '../../../../../../../etc/passwd',
                 '..%2f..%2f..%2f..%2f..%2fetc%2fpasswd', 'file:///etc/passwd', str(ROOT / 'pyproject.toml')):
        status, body = fetch(server + route + path)
        assert status in (403, 404, 405) or (route == '' and b'root:' not in body), path
        assert b'root:' not in body and b'[project]' not in body


@needs_gradio
def test_it_fetches_nothing_for_others(server):
    for route in ('file=', 'gradio_api/file=', 'gradio_api/proxy='):
        assert fetch(f'{server}{route}{server}config')[0] == 403
        assert fetch(f'{server}{route}https://example.org/')[0] == 403


@needs_gradio
@pytest.mark.parametrize('path', ['/etc/passwd', str(PICTURE), '../' * 20 + str(PICTURE), 'https://example.org/a.png'])
@pytest.mark.parametrize('meta', [True, False])
def test_a_client_cannot_name_a_file_of_the_server_as_its_picture(server, path, meta):
    config = json.loads(fetch(server + 'config')[1])
    picture = next(part['id'] for part in config['components'] if part['type'] == 'image')
    call = next(call for call in config['dependencies'] if picture in call['inputs'] and len(call['outputs']) == 2)
    data = {'path': path, 'orig_name': 'a.png', **({'meta': {'_type': 'gradio.FileData'}} if meta else {})}
    session = f'session{meta}{len(path)}'
    status, _ = fetch(server + 'gradio_api/queue/join', json.dumps(
        {'data': [data, 16], 'fn_index': call['id'], 'session_hash': session}).encode())
    assert status == 200
    _, events = fetch(f'{server}gradio_api/queue/data?session_hash={session}')
    final = json.loads(re.findall(rb'data: (.*"process_completed".*)', events)[0])
    assert final['success'] is False and b'confidences' not in events and b'root:' not in events


@needs_gradio
def test_uploads_have_a_limit(server, page_module):
    def upload(size):
        body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(size)
                + b'\r\n--x--\r\n')
        request = urllib.request.Request(
            server + 'gradio_api/upload', body, {'Content-Type': 'multipart/form-data; boundary=x'})
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert upload(1000) == 200
    assert upload(page_module.MAX_FILE_SIZE + 1) == 413


# The browser.

def open_browser(playwright):
    return playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])


@pytest.fixture(scope='module')
def browser(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = open_browser(playwright)
        yield browser
        browser.close()


class Visit:
    """A visitor of the page, who sees all that it asks for."""

    def __init__(self, browser, url, window):
        from playwright.sync_api import expect

        width, height = WINDOWS[window]
        self.page = browser.new_page(viewport={'width': width, 'height': height})
        self.page.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        self.expect = expect
        self.requests, self.errors = [], []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.locator('#picture').wait_for()

    def upload(self, path):
        self.page.set_input_files('#picture input[type=file]', str(path))

    def clear(self):
        self.page.locator('#picture').get_by_label('Remove Image').click()

    def classes(self):
        """Return the classes on the page with their percentages, in order."""
        text = self.page.locator('#classes').inner_text()
        return re.findall(r'^(\w+)\s+(\d+)%', text, re.M)

    def tab(self, name):
        tab = self.page.get_by_role('tab', name=name)
        if not tab.is_visible():  # on a narrow window the last ones are in a menu
            self.page.locator('.overflow-menu button').first.click()
        tab.click()

    def overflow(self):
        """Return by how many pixels the page is wider than the window."""
        return self.page.evaluate('document.documentElement.scrollWidth - window.innerWidth')


@pytest.fixture(params=list(WINDOWS))
def visit(browser, server, request):
    visit = Visit(browser, server, request.param)
    yield visit
    visit.page.close()
    assert not [url for url in visit.requests if not url.startswith((server, 'data:', 'blob:'))]
    assert not visit.errors


@needs_browser
@needs_gradio
def test_a_picture_and_the_slider(visit, page, cat, page_module):
    """The classes are those of the picture, and change at once with the number of members."""
    visit.upload(next(path for path in page_module.EXAMPLES if path.stem == 'cat'))
    for num_members in (16, 1, 5):
        if num_members < 16:
            visit.page.locator('#members input[type=range]').fill(str(num_members))
        visit.expect(visit.page.locator('#facts')).to_contain_text(f'{num_members} of 16 members')
        shown, facts = page.predict(cat, num_members)
        expected = [(name, f'{probability:.0%}'.rstrip('%')) for name, probability in shown.items()]
        visit.expect(visit.page.locator('#classes')).to_contain_text(f'{expected[0][1]}%')
        assert visit.classes() == expected
        nats = re.search(r'[\d.]+ nats', facts)[0]
        assert nats in visit.page.locator('#facts').inner_text()
    assert visit.overflow() <= 0
    visit.clear()
    visit.expect(visit.page.locator('#facts')).to_be_empty()


@needs_browser
@needs_gradio
def test_an_example_and_the_anytime_tab(visit, page, page_module):
    visit.page.locator('#examples .gallery-item').nth(
        [path.stem for path in page_module.EXAMPLES].index('horse')).click()
    visit.expect(visit.page.locator('#classes')).to_contain_text('horse')
    visit.tab('Anytime')
    waits, steps = visit.page.locator('#steps .waits'), visit.page.locator('#steps li')
    visit.expect(waits).to_have_count(5)
    visit.page.locator('#run').click()
    seen = set()
    visit.expect(waits).not_to_have_count(5)
    while 0 not in seen:
        seen.add(waits.count())
    assert len(seen) > 2  # bar by bar, not all at once
    visit.expect(steps).to_have_count(5)
    horse = next(path for path in page_module.EXAMPLES if path.stem == 'horse').read_bytes()
    expected = re.findall(r'<b>(.*?)</b>', list(page.anytime(horse))[-1])
    assert steps.locator('b').all_inner_texts() == expected
    assert visit.overflow() <= 0


@needs_browser
@needs_gradio
def test_the_budget_tab_sets_the_slider(visit, page_module, monkeypatch):
    visit.upload(next(path for path in page_module.EXAMPLES if path.stem == 'cat'))
    visit.expect(visit.page.locator('#facts')).to_contain_text('16 of 16 members')
    visit.tab('Accuracy and cost')
    visit.expect(visit.page.locator('#accuracy img')).to_be_visible()
    number = visit.page.locator('#budget input')
    number.fill('0.001')
    visit.page.locator('#choose').click()
    bought, slider = visit.page.locator('#bought'), visit.page.locator('#members input[type=range]')
    visit.expect(bought).to_contain_text('0.001 ms are too few: 1 member takes')
    assert slider.input_value() == '16'
    times = [float(row.split()[1]) for row in bought.locator('tr').all_inner_texts()[1:]]
    assert len(times) == 5 and min(times) > 0
    number.fill(str(math.ceil(10 * times[0]) / 10 + 0.1))  # above the time of one member, as it was rounded
    number.press('Enter')
    visit.expect(bought).to_contain_text('the slider is set')
    members = re.search(r'buy (\d+) member', bought.inner_text())[1]
    assert int(members) < 16 or times[0] > 0.7 * times[-1]
    visit.expect(slider).to_have_value(members)
    assert bought.locator('.chosen').inner_text().split()[0] == members
    assert visit.overflow() <= 0
    calls, measure = [], LatencyTable.measure
    monkeypatch.setattr(LatencyTable, 'measure', lambda *args, **kwargs: calls.append(1) or measure(*args, **kwargs))
    visit.page.locator('#measure').click()
    number.fill('1000')
    visit.page.locator('#choose').click()
    visit.expect(bought).to_contain_text('1000 ms buy 16 members')
    visit.expect(slider).to_have_value('16')
    assert len(calls) == 1
    visit.tab('Predict')
    visit.expect(visit.page.locator('#facts')).to_contain_text('16 of 16 members')


@needs_browser
@needs_gradio
def test_errors_are_a_sentence(visit, tmp_path, capfd):
    (tmp_path / 'broken.png').write_bytes(b'no image')
    visit.upload(tmp_path / 'broken.png')
    toast = visit.page.get_by_test_id('toast-body')
    visit.expect(toast).to_contain_text('The image cannot be read')
    assert 'Traceback' not in visit.page.locator('body').inner_text() and '/tmp' not in toast.inner_text()
    captured = capfd.readouterr()
    assert 'Traceback' not in captured.out + captured.err
    visit.tab('Anytime')
    visit.clear()
    visit.page.locator('#run').click()
    visit.expect(visit.page.get_by_test_id('toast-body').last).to_contain_text('Choose a picture first.')


# The command, and the Space.

@needs_gradio
def test_the_command_serves_until_it_is_interrupted():
    command = [sys.executable, '-m', 'timm_hne', 'app']
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        # Shells let jobs in the background ignore it, and what these start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        assert f'preparing {MODEL}' in process.stdout.readline()
        url = re.search(r'http://127\.0\.0\.1:\d+/', process.stdout.readline())[0]
        status, body = fetch(url)
        assert status == 200 and b'timm_hne' in body
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and 'Traceback' not in errors
    finally:
        process.kill()


@needs_gradio
@pytest.mark.parametrize(('options', 'message'), [
    (['no_such_model'], 'no_such_model'), (['hne_mobilenetv2_075_e4'], 'no pretrained weights'),
    (['--host', '192.0.2.1'], '192.0.2.1: Cannot assign'), (['--host', 'no.host.invalid'], 'no.host.invalid: '),
    (['--port', '65536'], 'port must be from 1 to 65535, got 65536'), ([str(ROOT / 'README.md')], 'README.md'),
])
def test_errors_of_the_command(capsys, options, message):
    with pytest.raises(SystemExit) as error:
        main(['app', *options])
    assert error.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count('\n') == 1


@needs_gradio
def test_a_port_that_is_taken(capsys):
    with socket.create_server(('127.0.0.1', 0)) as other, pytest.raises(SystemExit):
        main(['app', '--port', str(other.getsockname()[1])])
    assert 'cannot be bound to 127.0.0.1:' in capsys.readouterr().err


def test_without_gradio_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'timm_hne.serving.page', raising=False)
    with pytest.raises(SystemExit):
        main(['app'])
    assert "pip install 'timm-hne[app]'" in capsys.readouterr().err


def test_the_space_is_complete():
    from huggingface_hub import SpaceCard
    from packaging.requirements import Requirement

    card = SpaceCard.load(SPACE / 'README.md')
    assert card.data.sdk == 'gradio' and (SPACE / card.data.app_file).is_file()
    lines = [line for line in (SPACE / 'requirements.txt').read_text().splitlines() if not line.startswith('--')]
    (requirement,) = map(Requirement, lines)
    assert (requirement.name, requirement.extras) == ('timm-hne', {'app'})
    project = (ROOT / 'pyproject.toml').read_text()
    wanted = Requirement(re.search(r'^app = .*"(gradio\S*)"', project, re.M)[1])
    assert wanted.specifier.contains(card.data.sdk_version)


@needs_gradio
def test_the_space_shows_the_same_page(page_module, classifier, monkeypatch):
    monkeypatch.delenv('MODEL', raising=False)
    made = runpy.run_path(str(SPACE / 'app.py'))['page']

    def parts(blocks):
        return [(part['type'], part['props'].get('label'), part['props'].get('elem_id'))
                for part in blocks.get_config_file()['components']]

    assert parts(made) == parts(page_module.build(classifier, MODEL)) and len(parts(made)) > 20


def main_picture():
    """Write the picture of the documentation."""
    from playwright.sync_api import sync_playwright

    from timm_hne.serving.page import EXAMPLES, build, launch

    blocks = build(Classifier.open(MODEL, engine='eager'), MODEL)
    with sync_playwright() as playwright:
        visit = Visit(open_browser(playwright), launch(blocks), 'wide')
        visit.upload(EXAMPLES[0])
        visit.page.locator('#members input[type=range]').fill('4')
        visit.expect(visit.page.locator('#facts')).to_contain_text('4 of 16 members')
        visit.page.locator('#picture img').wait_for()
        visit.page.wait_for_timeout(1000)  # transitions
        path = ROOT / 'docs' / 'images' / 'page.png'
        path.parent.mkdir(exist_ok=True)
        visit.page.screenshot(path=path, clip=dict(x=0, y=0, width=1280, height=600))
    image = Image.open(path).convert('RGB')
    image.quantize(256).save(path, optimize=True)
    blocks.close()


if __name__ == '__main__':
    main_picture()
