"""The HTTP side of the service: a real classifier and runner behind the ASGI application, without Ray."""
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_classifier import BROKEN, FILES, bomb, encode, model, noise  # noqa: F401

EXTRA = "the service needs pip install 'timm-hne[serve]'"
testclient = pytest.importorskip('starlette.testclient', reason=EXTRA)
pytest.importorskip('prometheus_client', reason=EXTRA)

from timm_hne import AdaptiveRunner  # noqa: E402
from timm_hne.__main__ import main  # noqa: E402
from timm_hne.serving import Classifier, http  # noqa: E402
from timm_hne.serving.guard import RECEIVED, BodyGuard  # noqa: E402
from timm_hne.serving.http import create_app, read_options  # noqa: E402

TIMEOUT = 60


class Held(torch.nn.Module):
    """A model that waits where the test tells it."""

    def __init__(self, model):  # noqa: F811
        super().__init__()
        self.inner, self.error = model, None
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        self.open.set()
        self.eval()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('inner'), name)

    def forward(self, x, num_members=None):
        self.entered.release()
        assert self.open.wait(TIMEOUT)
        if self.error is not None:
            raise self.error
        return self.inner(x, num_members=num_members)


@pytest.fixture
def held(model):  # noqa: F811
    return Held(model)


@pytest.fixture
def serve(held):
    """Return a function that makes a client of the application."""
    runners = []

    def start(latency_target=100., max_pixels=1_000_000, max_queue=None, **limits):
        classifier = Classifier(held, {}, max_pixels=max_pixels)
        runner = AdaptiveRunner(held, latency_target, max_batch_size=4, max_queue=max_queue, warmup_repeats=1)
        runners.append(runner)
        while held.entered.acquire(blocking=False):
            continue
        client = testclient.TestClient(create_app(classifier, runner, **limits))
        client.runner, client.classifier = runner, classifier
        return client

    yield start
    held.open.set()
    for runner in runners:
        runner.shutdown()


@pytest.fixture
def client(serve):
    return serve()


def refused(response, status, words=''):
    """Whether a response is one clear sentence."""
    assert response.status_code == status, response.text
    assert response.headers['content-type'] == 'application/json'
    message = response.json().pop('error')
    assert re.fullmatch(r'[^\n]{10,300}\.', message) and re.search(words, message), message
    assert not re.search(r'0x[0-9a-f]{6}|Traceback|/root|site-packages', message)
    return True


def metrics(client):
    text = client.get('/metrics').text
    return {name: float(value) for name, value in re.findall(r'^(hne_[^ ]+) ([\d.e+-]+)$', text, re.M)}


@pytest.mark.parametrize('kind', FILES)
@pytest.mark.parametrize('num_members', [None, 1, 3])
def test_the_answer_is_the_models(client, model, kind, num_members):  # noqa: F811
    data = FILES[kind]()
    query = '' if num_members is None else f'?num_members={num_members}'
    answer = client.post(f'/predict{query}', content=data).json()
    n = num_members or 4
    assert answer.keys() == {'classes', 'num_members', 'milliseconds'} and answer['num_members'] == n
    with torch.no_grad():
        expected = model(client.classifier.image(data)[None], num_members=n).softmax(-1)[0].topk(5)
    assert [found['index'] for found in answer['classes']] == expected.indices.tolist()
    assert [found['probability'] for found in answer['classes']] == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert [found['name'] for found in answer['classes']] == [
        client.classifier.class_names[i] for i in expected.indices]
    assert answer['milliseconds'] > 0


def test_threshold_and_top_k(client):
    data = encode(noise())
    sure = client.post('/predict?num_members=1&top_k=1', content=data).json()['classes'][0]['probability']
    assert client.post(f'/predict?threshold={sure - 1e-4}', content=data).json()['num_members'] == 1
    assert client.post('/predict?threshold=1', content=data).json()['num_members'] == 4
    answer = client.post('/predict?threshold=1&num_members=2&top_k=3', content=data).json()
    assert answer['num_members'] == 2 and len(answer['classes']) == 3
    assert len(client.post('/predict?top_k=1000', content=data).json()['classes']) == 10


@pytest.mark.parametrize('query, words', [
    ('num_members=0', 'num_members must be from 1 to 4, got 0'),
    ('num_members=5', 'num_members must be from 1 to 4, got 5'),
    ('num_members=-1', 'num_members'),
    ('num_members=1.5', "num_members must be an integer, got '1.5'"),
    ('num_members=', 'num_members'),
    ('num_members=' + '9' * 5000, 'num_members'),
    ('num_members=1&num_members=2', 'num_members must be given once, got it 2 times'),
    ('deadline_ms=0', 'deadline_ms must be above 0'),
    ('deadline_ms=-20', 'deadline_ms must be above 0, got -20'),
    ('deadline_ms=nan', 'deadline_ms'),
    ('deadline_ms=inf', 'deadline_ms'),
    ('deadline_ms=soon', "deadline_ms must be a number, got 'soon'"),
    ('threshold=1.1', 'threshold must be at least 0 and at most 1, got 1.1'),
    ('threshold=-0.1', 'threshold'),
    ('top_k=0', 'top_k'),
    ('members=2', "unknown parameter 'members'; there are num_members, deadline_ms, threshold, top_k"),
    ('num_members=1&path=/etc/passwd', "unknown parameter 'path'"),
    ('<script>' + 'x' * 1000, 'unknown parameter'),
])
def test_bad_parameters(client, query, words):
    assert refused(client.post(f'/predict?{query}', content=encode(noise())), 400, words)
    assert client.runner.stats.submitted == 0
    counts = metrics(client)
    assert counts['hne_requests_total{status="400"}'] == counts['hne_rejected_total{reason="parameter"}'] == 1


@pytest.mark.parametrize('kind', BROKEN)
def test_what_is_no_image(client, kind):
    assert refused(client.post('/predict', content=BROKEN[kind]), 400, 'the image cannot be read')
    assert metrics(client)['hne_rejected_total{reason="image"}'] == 1


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('size', [(10_000, 10_000), (2_000_000, 1_000_000)])
def test_bombs(client, size):
    assert refused(client.post('/predict', content=bomb(*size)), 400, 'pixels')


def test_strips(client):
    assert refused(client.post('/predict', content=encode(Image.new('L', (100_000, 1)))), 400, 'too long')


def test_forms_are_told_apart(client):
    assert refused(client.post('/predict', files={'file': encode(noise())}), 415, 'not a form')


def test_bodies_above_the_limit(serve):
    client = serve(max_body=10_000)
    assert client.post('/predict', content=encode(noise(40, 40))).status_code == 200
    assert refused(client.post('/predict', content=bytes(10_001)), 413, 'at most 10,000 bytes')
    assert refused(client.post('/predict', content=iter([bytes(6000)] * 2)), 413)  # without a content-length
    assert metrics(client)['hne_rejected_total{reason="large_body"}'] == 2


@pytest.mark.parametrize('method, path, status', [
    ('GET', '/', 404), ('GET', '/../../etc/passwd', 404), ('GET', '/%2e%2e/%2e%2e/etc/passwd', 404),
    ('POST', '/predict/..%2f..%2fetc/passwd', 404), ('GET', '/static/x', 404), ('GET', '/docs', 404),
    ('GET', '/predict', 405), ('DELETE', '/predict', 405), ('POST', '/health', 405), ('PUT', '/metrics', 405),
])
def test_nothing_else_is_there(client, method, path, status):
    assert refused(client.request(method, path), status)


def test_a_path_in_the_body_is_no_path(client, tmp_path):
    noise().save(tmp_path / 'image.png')
    for body in (str(tmp_path / 'image.png'), f'file://{tmp_path}/image.png'):
        assert refused(client.post('/predict', content=body.encode()), 400, 'cannot be read')
    assert refused(client.post(f'/predict?image={tmp_path}/image.png'), 400, 'unknown parameter')


def test_health_and_metrics(client):
    health = client.get('/health')
    assert health.status_code == 200 and health.json() == {
        'status': 'ok', 'members': 4, 'classes': 10, 'engine': 'none', 'latency_target_ms': 100_000}
    for n in (1, 2, 2, 4):
        client.post(f'/predict?num_members={n}', content=encode(noise()))
    assert client.get('/metrics').headers['content-type'].startswith('text/plain')
    counts = metrics(client)
    assert counts['hne_requests_total{status="200"}'] == counts['hne_request_seconds_count'] == 4
    assert counts['hne_members_count'] == 4 and counts['hne_members_sum'] == 9
    assert [counts[f'hne_members_bucket{{le="{n}"}}'] for n in ('1.0', '2.0', '4.0', '+Inf')] == [1, 3, 4, 4]
    assert counts['hne_queue'] == 0
    client.runner.shutdown()
    assert client.get('/health').status_code == 503
    assert refused(client.post('/predict', content=encode(noise())), 503, 'shut down')


def test_a_full_queue_is_refused_at_once_and_what_waits_is_answered(serve, held):
    client = serve(max_queue=2)
    data = encode(noise())
    held.open.clear()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, '/predict', content=data)
        assert held.entered.acquire(timeout=TIMEOUT)
        others = [pool.submit(client.post, '/predict', content=data) for _ in range(2)]
        while client.runner.waiting < 2:
            time.sleep(0.001)
        assert metrics(client)['hne_queue'] == 2
        response = client.post('/predict', content=data)
        assert refused(response, 503, 'max_queue=2') and response.headers['retry-after'] == '1'
        # A shutdown answers what was accepted.
        closing = threading.Thread(target=client.runner.shutdown)
        closing.start()
        held.open.set()
        assert [future.result().status_code for future in (first, *others)] == [200] * 3
        closing.join()
    counts = metrics(client)
    assert counts['hne_rejected_total{reason="overloaded"}'] == 1 and counts['hne_queue'] == 0


def test_a_deadline_that_cannot_be_kept(serve):
    client = serve()
    client.runner.policy.seconds = {n: {size: 1. for size in (1, 2, 4)} for n in (1, 2, 4)}
    hopeless = client.post('/predict?deadline_ms=500', content=encode(noise()))
    assert refused(hopeless, 503, 'deadline=0') and 'retry-after' not in hopeless.headers
    assert refused(client.post('/predict?deadline_ms=1e-321', content=encode(noise())), 503, 'deadline=')
    assert client.post('/predict?deadline_ms=50000', content=encode(noise())).status_code == 200
    assert metrics(client)['hne_rejected_total{reason="deadline"}'] == 2
    # Nor one that only decoding makes too short, if no other image is being decoded.
    client.runner.policy.seconds = {n: {size: 1e-4 for size in (1, 2, 4)} for n in (1, 2, 4)}
    short = client.post('/predict?deadline_ms=0.2', content=encode(noise()))
    assert refused(short, 503, 'deadline=0.0002') and 'retry-after' not in short.headers


def test_a_late_request_is_answered_if_nobody_waits(serve):
    """As the first one of a replica, for which Ray has to open connections."""
    client, headers = serve(10., stamp=False), {RECEIVED.decode(): repr(time.time() - 30.)}
    assert client.post('/predict', content=encode(noise()), headers=headers).json()['num_members'] == 1
    response = client.post('/predict?deadline_ms=500', content=encode(noise()), headers=headers)
    assert refused(response, 503, 'deadline=0.5 s')
    # It came too late, which the next one may not.
    assert response.headers['retry-after'] == '1' and metrics(client)['hne_rejected_total{reason="overloaded"}'] == 1


def test_members_fall_for_a_deadline(serve):
    client = serve()
    client.runner.policy.seconds = {n: {size: float(n) for size in (1, 2, 4)} for n in (1, 2, 4)}
    found = [
        client.post(f'/predict?deadline_ms={ms}', content=encode(noise())).json()['num_members']
        for ms in (1500, 3000, 6000)]
    assert found == [1, 2, 4]


def test_a_model_that_fails(client, held):
    held.error = RuntimeError('secret /path')
    response = client.post('/predict', content=encode(noise()))
    assert refused(response, 500, 'the model failed') and 'secret' not in response.text
    held.error = None
    assert client.post('/predict', content=encode(noise())).status_code == 200


def test_logits_that_are_no_numbers_are_a_failure(client, held, monkeypatch):
    monkeypatch.setattr(Held, 'forward', lambda self, x, num_members=None: torch.full((len(x), 10), torch.nan))
    assert refused(client.post('/predict', content=encode(noise())), 500, 'the model failed')
    counts = metrics(client)
    assert counts['hne_requests_total{status="500"}'] == 1 and 'hne_requests_total{status="200"}' not in counts


def test_slow_decoding_delays_nobody_beyond_the_deadline(serve, monkeypatch):
    client, decoding = serve(decoders=1), threading.Event()
    prepare = client.classifier.image

    def slow(data):
        if data == b'slow':
            assert decoding.wait(TIMEOUT)
            data = encode(noise())
        return prepare(data)

    monkeypatch.setattr(client.classifier, 'image', slow)
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, '/predict', content=b'slow')
        time.sleep(0.2)
        begin = time.monotonic()
        response = client.post('/predict?deadline_ms=300', content=encode(noise()))
        assert refused(response, 503, 'being decoded') and time.monotonic() - begin < TIMEOUT / 2
        decoding.set()
        assert first.result().status_code == 200
        assert client.post('/predict?deadline_ms=60000', content=encode(noise())).status_code == 200


# The guard, spoken to in ASGI.

async def echo(scope, receive, send):
    message = await receive()
    body = json.dumps([len(message['body']), message['more_body']]).encode()
    await send({'type': 'http.response.start', 'status': 200, 'headers': [(b'content-type', b'application/json')]})
    await send({'type': 'http.response.body', 'body': body})


def speak(guard, *messages, headers=()):
    """Send messages, then nothing; return the status and the body."""
    async def talk():
        left, sent = list(messages), []

        async def receive():
            if not left:
                await asyncio.Event().wait()
            return left.pop(0)

        async def send(message):
            sent.append(message)

        await guard({'type': 'http', 'headers': list(headers)}, receive, send)
        return sent

    sent = asyncio.run(talk())
    return sent and (sent[0]['status'], json.loads(sent[1]['body']))


def chunk(size, more=True):
    return {'type': 'http.request', 'body': bytes(size), 'more_body': more}


def test_the_body_comes_whole():
    guard = BodyGuard(echo, max_body=100)
    assert speak(guard, chunk(40), chunk(60), chunk(0, False)) == (200, [100, False])
    assert speak(guard, {'type': 'http.request'}) == (200, [0, False])
    assert guard.held == 0


def test_a_body_that_does_not_come():
    reasons = []
    guard = BodyGuard(echo, timeout=0.05, on_refused=lambda *args: reasons.append(args))
    for messages in ([], [chunk(10)]):
        status, answer = speak(guard, *messages)
        assert status == 408 and 'within 0.05 seconds' in answer['error']
    assert reasons == [(408, 'slow_body')] * 2 and guard.held == 0


def test_whoever_hangs_up_is_not_answered():
    guard = BodyGuard(echo)
    assert speak(guard, chunk(10), {'type': 'http.disconnect'}) == [] and guard.held == 0


def test_a_large_body_is_dropped_and_then_refused():
    guard = BodyGuard(echo, max_body=100)
    for messages in ([chunk(101, False)], [chunk(60), chunk(60), chunk(3, False)], [chunk(60)] * 1000):
        assert speak(guard, *messages)[0] == 413 and guard.held == 0
    assert speak(guard, chunk(1, False), headers=[(b'content-length', b'101')])[0] == 413


def test_all_bodies_together_are_bounded():
    release, held = asyncio.Event(), []

    async def slow(scope, receive, send):
        await receive()
        held.append(guard.held)
        await release.wait()
        await echo(scope, lambda: asyncio.sleep(0, {'body': b'', 'more_body': False}), send)

    guard = BodyGuard(slow, max_body=100, max_total=250)

    async def one():
        sent = []

        async def receive():
            return chunk(100, False)

        async def send(message):
            sent.append(message)

        await guard({'type': 'http', 'headers': []}, receive, send)
        return sent[0]['status']

    async def many():
        tasks = [asyncio.ensure_future(one()) for _ in range(50)]
        while sum(task.done() for task in tasks) < 48:
            await asyncio.sleep(0)
        release.set()
        return [await task for task in tasks]

    statuses = asyncio.run(many())
    assert statuses.count(200) == 2 and statuses.count(503) == 48
    assert max(held) <= 250 and guard.held == 0


def test_fewer_are_let_in_while_those_inside_come_too_late():
    async def flood(guard, count):
        statuses = []

        async def one():
            async def receive():
                return chunk(1, False)

            async def send(message):
                if 'status' in message:
                    statuses.append(message['status'])

            await guard({'type': 'http', 'method': 'POST', 'headers': []}, receive, send)

        await asyncio.gather(*[one() for _ in range(count)])
        return statuses

    capacity, reasons = 20, []

    async def slow(scope, receive, send):
        """In time for as many as there is capacity for."""
        late = guard.inside > capacity
        await asyncio.sleep(0.001)
        headers = [(b'content-type', b'application/json')] + [(b'retry-after', b'1')] * late
        await send({'type': 'http.response.start', 'status': 503 if late else 200, 'headers': headers})
        await send({'type': 'http.response.body', 'body': b'{}'})

    guard = BodyGuard(slow, on_refused=lambda *args: reasons.append(args))
    for _ in range(30):
        statuses = asyncio.run(flood(guard, 100))
        assert len(statuses) == 100 and guard.inside == 0
    assert capacity / 2 <= guard.bound <= 2 * capacity  # of the 512 at first
    assert statuses.count(200) >= capacity / 2 and (503, 'busy') in reasons
    for _ in range(300):
        assert asyncio.run(flood(guard, 8)) == [200] * 8
    assert guard.bound > 2 * capacity
    before = guard.bound

    async def hopeless(scope, receive, send):
        headers = [(b'content-type', b'application/json')]  # and nothing of trying again
        await send({'type': 'http.response.start', 'status': 503, 'headers': headers})
        await send({'type': 'http.response.body', 'body': b'{}'})

    guard.app = hopeless
    assert asyncio.run(flood(guard, 8)) == [503] * 8 and guard.bound == before


def test_who_gets_no_answer_gets_one():
    """Ray says nothing if a replica was killed."""
    async def silent(scope, receive, send):
        await receive()

    found, answer = speak(BodyGuard(silent), chunk(10, False))
    assert found == 503 and 'try again' in answer['error']

    async def hung_up(scope, receive, send):
        await receive()
        await receive()

    assert speak(BodyGuard(hung_up), chunk(10, False), {'type': 'http.disconnect'}) == []


@pytest.mark.parametrize('status', [404, 408, 500, 503])
def test_what_the_server_says_in_plain_text_becomes_json(status):
    async def ray(scope, receive, send):
        await send({'type': 'http.response.start', 'status': status, 'headers': [(b'content-type', b'text/plain')]})
        await send({'type': 'http.response.body', 'body': b'Internal', 'more_body': True})
        await send({'type': 'http.response.body', 'body': b' Server Error'})

    reasons = []
    found, answer = speak(BodyGuard(ray, on_refused=lambda *args: reasons.append(args)), chunk(0, False))
    assert found == 503 and 'try again' in answer['error'] and reasons == [(503, 'unavailable')]


def test_when_a_request_arrived_is_nothing_that_clients_say(client, monkeypatch):
    seen = []
    predict = http.Application._answer

    async def look(self, request, begin):
        seen.append(time.perf_counter() - begin)
        return await predict(self, request, begin)

    monkeypatch.setattr(http.Application, '_answer', look)
    for stamp in ('0', 'yesterday', str(time.time() + 1000)):
        response = client.post('/predict', content=encode(noise()), headers={'x-hne-received': stamp})
        assert response.status_code == 200
    assert all(0 <= seconds < TIMEOUT for seconds in seen)


def test_a_replica_answers_without_a_guard_before_it(serve):
    client = serve(stamp=False)
    for headers in ({}, *({RECEIVED.decode(): stamp} for stamp in ('yesterday', 'nan', '-inf', 'inf', '1', '-1e308'))):
        response = client.post('/predict', content=encode(noise()), headers=headers)
        assert response.status_code == 200, response.text
        assert response.json()['milliseconds'] < 1000 * TIMEOUT


def test_options_are_read_as_they_are():
    assert read_options([], 4, 10) == dict(num_members=None, threshold=None, deadline=None, top_k=5)
    assert read_options([('deadline_ms', '250'), ('threshold', '0'), ('num_members', '4')], 4, 10) == dict(
        num_members=4, threshold=0, deadline=0.25, top_k=5)


def test_one_class_can_be_sure_of_nothing():
    with pytest.raises(ValueError, match='num_classes must be at least 2'):
        read_options([('threshold', '0.5')], 4, 1)


@pytest.mark.timeout(120)
def test_a_thousand_connections_that_send_nothing(serve):
    """And some hundred that stop in the middle of a body: others are answered in time, and memory stays bounded."""
    uvicorn = pytest.importorskip('uvicorn', reason=EXTRA)
    client = serve(latency_target=10., timeout=2.)
    server = uvicorn.Server(uvicorn.Config(client.app, port=0, log_level='warning'))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    data = encode(noise())
    head = f'POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n'.encode()
    silent = []
    try:
        for i in range(1000):
            connection = socket.create_connection(address, timeout=TIMEOUT)
            connection.sendall((b'', b'', head[:20], head + b'\r\n' + data[:1000])[i % 4])
            silent.append(connection)
        for _ in range(20):
            begin = time.monotonic()
            assert request(address, head + b'Connection: close\r\n\r\n' + data).startswith(b'HTTP/1.1 200')
            assert time.monotonic() - begin < 10
        # Those who stopped in a body are told so.
        assert silent[3].recv(1000).startswith(b'HTTP/1.1 408')
    finally:
        for connection in silent:
            connection.close()
        server.should_exit = True
        thread.join(TIMEOUT)


def request(address, data):
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        connection.sendall(data)
        answer = b''
        while received := connection.recv(65536):
            answer += received
    return answer


# The whole service on Ray Serve, in processes of its own.

def below(root):
    """Return the command lines of all processes below one."""
    parents, lines = {}, {}
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            parents[int(folder.name)] = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
            lines[int(folder.name)] = (folder / 'cmdline').read_bytes()
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: lines[pid] for pid in found if pid in lines}


def listeners(processes):
    """Return the processes that listen on more than this machine, with what they listen on."""
    here = {'0100007F', '0' * 24 + '01000000', '0000000000000000FFFF00000100007F'}
    sockets = {}
    for table in ('tcp', 'tcp6'):
        for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == '0A' and fields[1].partition(':')[0] not in here:
                sockets[f'socket:[{fields[9]}]'] = fields[1]
    found = []
    for pid, line in processes.items():
        with contextlib.suppress(OSError):
            for link in Path(f'/proc/{pid}/fd').iterdir():
                with contextlib.suppress(OSError):
                    if (target := os.readlink(link)) in sockets:
                        found.append((sockets[target], line[:150]))
    return found


def post(address, data, path='/predict'):
    """Return the status and the answer; 0 if the connection broke."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, data), timeout=TIMEOUT) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except (OSError, HTTPException) as error:
        return 0, {'error': repr(error)}


@pytest.mark.timeout(240)
def test_the_service(tmp_path):
    pytest.importorskip('ray.serve', reason=EXTRA)
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    address, log = f'http://127.0.0.1:{port}', tmp_path / 'log'
    environment = {**os.environ, 'TMPDIR': str(tmp_path), 'RAY_TMPDIR': '/tmp'}
    with open(log, 'wb') as stream:
        process = subprocess.Popen(
            [sys.executable, '-m', 'timm_hne', 'serve', 'hne_resnet50_c8', '--latency-target', '5', '--port', str(port),
             '--replicas', '2', '--threads', '1', '--engine', 'none', '--max-body', '1'],
            stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        while b'Ctrl+C' not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        # Nothing is to be reached from elsewhere, and nobody is told.
        processes = below(process.pid)
        assert listeners(processes) == []
        told = [pid for pid, line in processes.items() if b'dashboard/dashboard.py' in line]  # it is what would tell
        assert all(b'RAY_USAGE_STATS_ENABLED=0' in Path(f'/proc/{pid}/environ').read_bytes() for pid in told)

        data = encode(noise(32, 32))
        status, answer = post(address, data, '/predict?num_members=2')
        assert status == 200 and answer['num_members'] == 2
        classifier = Classifier.open('hne_resnet50_c8', 'none')
        expected = classifier.top(classifier.logits(classifier.image(data)[None], 2)[0], 2)
        assert [found['name'] for found in answer['classes']] == [label.name for label in expected]

        # Bad requests, some of which end in the proxy.
        assert post(address, data, '/predict?num_members=17')[0] == 400
        assert post(address, b'no image')[0] == 400
        assert post(address, b'')[0] == 400
        assert post(address, bytes(2 << 20))[0] == 413
        assert post(address, data, '/../../etc/passwd')[0] == 404

        # A thousand silent connections delay nobody.
        silent = [socket.create_connection(('127.0.0.1', port), timeout=TIMEOUT) for _ in range(1000)]
        for connection in silent[::2]:
            connection.sendall(b'POST /predict HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n1234')
        assert [post(address, data, '/predict?deadline_ms=5000')[0] for _ in range(10)] == [200] * 10
        for connection in silent:
            connection.close()

        # A replica is killed: every request has one answer, and the service goes on.
        victim = next(pid for pid, line in processes.items() if line.startswith(b'ray::ServeReplica:hne'))
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(post, address, data) for _ in range(60)]
            while sum(future.done() for future in futures) < 10:
                time.sleep(0.01)
            os.kill(victim, signal.SIGKILL)
            outcomes = [future.result()[0] for future in futures]
        assert set(outcomes) <= {200, 503} and outcomes.count(200) >= 40
        assert post(address, data)[0] == 200

        # What all replicas and the proxy have counted, the killed one too.
        with urllib.request.urlopen(f'{address}/metrics') as response:
            text = response.read().decode()
        counts = dict(re.findall(r'^(hne_[^ ]+) (\S+)$', text, re.M))
        assert len(counts) == len(re.findall(r'^[^#]', text, re.M))  # and nothing else
        assert float(counts['hne_requests_total{status="200"}']) >= outcomes.count(200) + 12
        assert float(counts['hne_rejected_total{reason="large_body"}']) == 1
        assert float(counts['hne_request_seconds_count']) == float(counts['hne_requests_total{status="200"}'])

        # What was accepted before the end is answered; what comes later is refused.
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(post, address, data) for _ in range(40)]
            while sum(future.done() for future in futures) < 5:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            outcomes = [future.result() for future in futures]
        assert all(status in (200, 503) for status, _ in outcomes), outcomes
        assert process.wait(60) == 0, log.read_text()
        deadline = time.monotonic() + 20
        while left := [pid for pid in processes if Path(f'/proc/{pid}/cmdline').exists() and
                       b'ray' in Path(f'/proc/{pid}/cmdline').read_bytes()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert not list(tmp_path.glob('timm_hne_metrics_*'))
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.parametrize('arguments, words', [
    (['--latency-target', '0'], 'latency_target must be above 0'),
    (['--port', '0'], 'port must be from 1'),
    (['--threads', '0'], 'threads'),
    (['--max-body', '0'], 'max_body'),
    (['--replicas', '3:2'], 'MIN:MAX'),
    (['--replicas', 'many'], 'MIN:MAX'),
    (['--min-members', '17'], 'min_members must be from 1 to 16, got 17'),
    (['--min-members', '3', '--max-members', '2'], 'min_members must be from 1 to 2, got 3'),
    (['no_such_model'], 'no_such_model'),
    (['hne_mobilenetv2_075_e4'], 'has no pretrained weights'),
    (['--host', '198.51.100.7'], 'host 198.51.100.7 and port 8000 cannot be listened on'),
])
def test_bad_arguments_of_the_command(capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(['serve', *arguments])
    assert words in capsys.readouterr().err


def test_the_config_of_a_cluster():
    """It is one of Ray Serve's, and its arguments are those of the application."""
    schema = pytest.importorskip('ray.serve.schema', reason=EXTRA)
    from timm_hne.serving.service import Settings, app

    path = Path(__file__).parent.parent / 'docs' / 'serving' / 'config.yaml'
    config = yaml.safe_load(path.read_text())
    found = schema.ServeDeploySchema(**config)
    assert found.http_options.host == '127.0.0.1'
    assert found.applications[0].import_path == 'timm_hne.serving.service:app'
    settings = Settings(**config['applications'][0]['args'])
    assert (settings.latency_target, settings.max_replicas) == (0.1, 4)
    assert app(settings) is not None
    with pytest.raises(ValueError):
        Settings(latency=0.1)
    with pytest.raises(ValueError):
        Settings(latency_target=0)
    assert Settings(latency_target='0.2', model='x').latency_target == 0.2  # as `serve run` passes it
