"""A small Hugging Face Hub on the loopback interface, for the unmodified `huggingface_hub` client.

It keeps everything in memory and speaks what downloads and commits need: accounts and tokens, private repositories,
branches, pre-upload, git-LFS, commits as NDJSON, `resolve` with its redirects, HEAD metadata and byte ranges. Like the
real one it serves large files from a second host (`localhost` instead of `127.0.0.1`) that must not see the token.

Faults are injected per request:

    with HubServer() as hub:
        hub.fault('GET /cdn/', 'corrupt')            # the next matching request only
        hub.fault('GET /cdn/', 503, times=None)      # every one until `hub.faults.clear()`
"""
import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that the client of this process uses, with an empty cache, no stored token and no waiting in retries."""
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(
            constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
        monkeypatch.setattr(constants, 'HF_STORED_TOKENS_PATH', str(tmp_path / 'stored_tokens'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.delenv('HF_TOKEN', raising=False)
        for module in (_http, file_download):
            patient = SimpleNamespace(**{**vars(module.time), 'sleep': lambda seconds: None})
            monkeypatch.setattr(module, 'time', patient)
        yield server
        _http.close_session()


LFS_PATTERNS = ('*.safetensors', '*.bin', '*.pth', '*.png')
FAULTS = ('cut', 'reset', 'slow', 'truncate', 'corrupt')


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    repo_id: str
    private: bool = False
    history: dict[str, list[Commit]] = field(default_factory=dict)  # branch -> commits, oldest first

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        commits = self.history.setdefault(branch, [])
        content = repr((self.repo_id, len(commits), title, sorted((path, file.oid) for path, file in files.items())))
        commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), title, files))
        return commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.history:
            return self.history[revision][-1]
        return next((c for commits in self.history.values() for c in commits if c.oid == revision), None)


@dataclass
class Fault:
    match: str
    kind: int | str
    times: int | None


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class HubServer:
    """The server, a context manager. `url` is what `HF_ENDPOINT` would be; `log` lists the requests it has seen."""

    def __init__(self, slow_seconds: float = 1.0):
        self.tokens = {'hf_alice': 'alice', 'hf_bob': 'bob'}
        self.read_only = {'hf_alice_read': 'alice'}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.slow_seconds = slow_seconds
        self.lock = threading.RLock()

    def __enter__(self) -> 'HubServer':
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), type('BoundHandler', (Handler,), {'hub': self}))
        self.http.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        self.cdn = f'http://localhost:{self.http.server_port}'
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.http.shutdown()
        self.http.server_close()

    def fault(self, match: str, kind: int | str, times: int | None = 1) -> None:
        """Let the next `times` requests whose 'METHOD /path' contains `match` fail; `kind` is a status or in FAULTS."""
        if not isinstance(kind, int) and kind not in FAULTS:
            raise ValueError(f'kind must be a status or one of {FAULTS}, got {kind!r}.')
        self.faults.append(Fault(match, kind, times))

    def take_fault(self, request: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault.match in request and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault.kind
        return None

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, title: str = 'Add files') -> str:
        """Put files into a repository without the client; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private))
        old = repo.at('main').files if 'main' in repo.history else {}
        new = {path: File(data, is_lfs(path)) for path, data in files.items()}
        self.objects.update({file.oid: file.data for file in new.values() if file.lfs})
        return repo.commit('main', title, {**old, **new}).oid

    def files(self, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
        return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, branch: str = 'main') -> list[str]:
        return [commit.title for commit in self.repos[repo_id].history[branch]]


def is_lfs(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


def describe(path: str, file: File) -> dict:
    lfs = dict(oid=file.oid, sha256=file.oid, size=len(file.data), pointerSize=130) if file.lfs else None
    return dict(type='file', path=path, oid=file.oid[:40], size=len(file.data), **(dict(lfs=lfs) if lfs else {}))


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # the body follows its headers without waiting for their receipt

    def log_message(self, *args):
        """Keep silent; `HubServer.log` has the requests."""

    def handle_request(self):
        self.hub.log.append(f'{self.command} {self.path}')
        self.body = self.read_body()
        self.url = urlsplit(self.path)
        self.fault = self.hub.take_fault(f'{self.command} {self.path}')
        if self.fault == 'slow':
            time.sleep(self.hub.slow_seconds)
        if self.fault == 'reset':
            self.drop(reset=True)
            return
        try:
            if isinstance(self.fault, int):
                raise HubError(self.fault, 'injected')
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, self.url.path)
                if match and self.command in method:
                    with self.hub.lock:
                        answer = getattr(self, name)(*map(unquote, match.groups()))
                    self.send(*answer)
                    return
            raise HubError(404, f'no such route: {self.path}')
        except HubError as error:
            headers = {'X-Error-Message': error.message, **error.headers}
            if error.code:
                headers['X-Error-Code'] = error.code
            self.send(error.status, dict(error=error.message), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def drop(self, reset: bool = False):
        if reset:  # closing with a zero linger sends RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self.connection.close()

    def send(self, status: int, content: bytes | dict | list, headers: dict | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault == 'corrupt' and data:
            middle = len(data) // 2
            data = data[:middle] + bytes(byte ^ 0x55 for byte in data[middle:middle + 4]) + data[middle + 4:]
        if self.fault == 'truncate':
            data = data[:len(data) // 2]
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, str(value))
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.fault == 'cut':
            self.wfile.write(data[:len(data) // 2])
            self.wfile.flush()
            self.drop()
            return
        self.wfile.write(data)

    # Who asks, and for what

    def user(self, write: bool = False) -> str | None:
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if token and token not in self.hub.tokens and token not in self.hub.read_only:
            raise HubError(401, 'Invalid credentials in Authorization header')
        if write and not token:
            raise HubError(401, 'Invalid username or password.')
        if write and token in self.hub.read_only:
            raise HubError(403, 'This token has no write permission')
        return self.hub.tokens.get(token) or self.hub.read_only.get(token)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.split('/')[0]
        if repo is None or (repo.private and user != owner):
            raise HubError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if write and self.user(write=True) != owner:
            raise HubError(403, f'You have no write access to {repo_id}')
        return repo

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return commit

    def file_at(self, commit: Commit, path: str) -> File:
        if path not in commit.files:
            raise HubError(404, 'Entry not found', 'EntryNotFound', {'X-Repo-Commit': commit.oid})
        return commit.files[path]

    # Downloads

    def resolve(self, repo_id: str, revision: str, path: str):
        repo = self.repo(repo_id)
        commit = self.commit_at(repo, revision)
        file = self.file_at(commit, path)
        headers = {'X-Repo-Commit': commit.oid, 'X-Linked-Etag': f'"{file.oid}"', 'X-Linked-Size': len(file.data)}
        if file.lfs:
            headers['Location'] = f'{self.hub.cdn}/cdn/{file.oid}?filename={quote(path)}&signature=abc'
            return 302, b'', headers
        headers['Location'] = f'/api/resolve-cache/models/{repo_id}/{commit.oid}/{quote(path)}'
        return 307, b'', headers

    def resolve_cache(self, repo_id: str, oid: str, path: str):
        file = self.file_at(self.commit_at(self.repo(repo_id), oid), path)
        return self.ranged(file.data, {'X-Repo-Commit': oid, 'ETag': f'"{file.oid}"'})

    def cdn(self, oid: str):
        if self.headers.get('Authorization'):
            raise HubError(400, 'Only one auth mechanism allowed')
        name = parse_qs(self.url.query).get('filename', [''])[0]
        disposition = f'inline; filename="{name}";'
        return self.ranged(self.hub.objects[oid], {'ETag': f'"{oid}"', 'Content-Disposition': disposition})

    def ranged(self, data: bytes, headers: dict):
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not wanted:
            return 200, data, {'Accept-Ranges': 'bytes', **headers}
        start = int(wanted[1])
        stop = int(wanted[2]) + 1 if wanted[2] else len(data)
        if start >= len(data):
            raise HubError(416, 'Range not satisfiable', headers={'Content-Range': f'bytes */{len(data)}'})
        return 206, data[start:stop], {'Content-Range': f'bytes {start}-{stop - 1}/{len(data)}', **headers}

    # Information

    def whoami(self):
        user = self.user(write='Authorization' not in self.headers)
        return 200, dict(type='user', name=user, orgs=[], auth=dict(type='access_token'))

    def model_info(self, repo_id: str, revision: str = 'main'):
        repo = self.repo(repo_id)
        commit = self.commit_at(repo, revision)
        siblings = [
            dict(rfilename=path, size=len(file.data), blobId=file.oid[:40], lfs=describe(path, file).get('lfs'))
            for path, file in commit.files.items()
        ]
        return 200, dict(
            id=repo_id, modelId=repo_id, author=repo_id.split('/')[0], sha=commit.oid, private=repo.private,
            siblings=siblings, tags=[])

    def tree(self, repo_id: str, revision: str):
        files = self.commit_at(self.repo(repo_id), revision).files
        return 200, [describe(path, file) for path, file in files.items()]

    def paths_info(self, repo_id: str, revision: str):
        files = self.commit_at(self.repo(repo_id), revision).files
        paths = parse_qs(self.body.decode()).get('paths', [])
        return 200, [describe(path, files[path]) for path in paths if path in files]

    def refs(self, repo_id: str):
        branches = self.repo(repo_id).history
        return 200, dict(converts=[], tags=[], branches=[
            dict(name=name, ref=f'refs/heads/{name}', targetCommit=commits[-1].oid)
            for name, commits in branches.items()
        ])

    def list_commits(self, repo_id: str, revision: str):
        repo = self.repo(repo_id)
        self.commit_at(repo, revision)
        return 200, [
            dict(id=commit.oid, title=commit.title, message='', authors=[], date='2026-01-01T00:00:00.000Z')
            for commit in reversed(repo.history[revision])
        ]

    # Uploads

    def create_repo(self):
        user = self.user(write=True)
        wanted = json.loads(self.body)
        owner = wanted.get('organization') or user
        repo_id = f'{owner}/{wanted["name"]}'
        if owner != user:
            raise HubError(403, f'You have no rights to create a model under the namespace "{owner}"')
        answer = dict(url=f'{self.hub.url}/{repo_id}', name=repo_id)
        if repo_id in self.hub.repos:
            return 409, dict(error='You already created this model repo', **answer)
        repo = self.hub.repos[repo_id] = Repo(repo_id, wanted.get('visibility') == 'private')
        attributes = ''.join(f'{pattern} filter=lfs diff=lfs merge=lfs -text\n' for pattern in LFS_PATTERNS)
        repo.commit('main', 'initial commit', {'.gitattributes': File(attributes.encode(), False)})
        return 200, answer

    def create_branch(self, repo_id: str, branch: str):
        repo = self.repo(repo_id, write=True)
        if branch in repo.history:
            raise HubError(409, f'Reference already exists: {branch}')
        start = self.commit_at(repo, (json.loads(self.body or b'{}')).get('startingPoint', 'main'))
        repo.history[branch] = [start]
        return 200, {}

    def validate_yaml(self):
        front_matter = re.match(r'---\n(.*?)\n---', json.loads(self.body)['content'], re.DOTALL)
        try:
            card = yaml.safe_load(front_matter[1]) if front_matter else {}
        except yaml.YAMLError as error:
            return 400, dict(errors=[dict(message=str(error))], warnings=[])
        warnings = [] if card else [dict(message='empty or missing yaml metadata in repo card')]
        return 200, dict(errors=[], warnings=warnings)

    def preupload(self, repo_id: str, revision: str):
        pull_request = parse_qs(self.url.query).get('create_pr') == ['1']
        current = self.commit_at(self.repo(repo_id, write=not pull_request), revision).files
        return 200, dict(files=[
            dict(
                path=file['path'],
                uploadMode='lfs' if is_lfs(file['path']) else 'regular',
                shouldIgnore=False,
                oid=current[file['path']].oid if file['path'] in current else None,
            )
            for file in json.loads(self.body)['files']
        ])

    def lfs_batch(self, repo_id: str):
        # The client names no branch for a pull request, to which everybody may upload.
        self.repo(repo_id, write='ref' in json.loads(self.body))
        self.user(write=True)
        objects = []
        for wanted in json.loads(self.body)['objects']:
            actions = dict(
                upload=dict(href=f'{self.hub.cdn}/cdn/{wanted["oid"]}?signature=abc'),
                verify=dict(href=f'{self.hub.url}/{repo_id}.git/info/lfs/objects/verify'),
            )
            objects.append({**wanted, **({} if wanted['oid'] in self.hub.objects else dict(actions=actions))})
        return 200, dict(transfer='basic', objects=objects)

    def lfs_put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, 'XAmzContentSHA256Mismatch')
        self.hub.objects[oid] = self.body
        return 200, b''

    def lfs_verify(self, repo_id: str):
        self.repo(repo_id)
        self.user(write=True)
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted['oid'], b'')) != wanted['size']:
            raise HubError(404, 'object not found')
        return 200, {}

    def commit(self, repo_id: str, revision: str):
        pull_request = parse_qs(self.url.query).get('create_pr') == ['1']
        repo = self.repo(repo_id, write=not pull_request)
        self.user(write=True)
        if revision not in repo.history:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        head = self.commit_at(repo, revision)
        files = dict(head.files)
        title = None
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry['key'], entry['value']
            if key == 'header':
                title = value['summary']
                if value.get('parentCommit', head.oid) != head.oid:
                    raise HubError(412, 'A commit has happened since. Please refresh and try again.')
            elif key == 'file':
                files[value['path']] = File(base64.b64decode(value['content']), False)
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.objects:
                    raise HubError(400, f'LFS object {value["oid"]} was never uploaded')
                files[value['path']] = File(self.hub.objects[value['oid']], True)
            elif key == 'deletedFile':
                del files[value['path']]
            else:
                raise HubError(400, f'unknown operation {key}')
        answer = {}
        if pull_request:
            number = sum(branch.startswith('refs/pr/') for branch in repo.history) + 1
            revision = f'refs/pr/{number}'
            repo.history[revision] = [head]
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
        new = repo.commit(revision, title, files)
        url = f'{self.hub.url}/{repo_id}/commit/{new.oid}'
        return 200, dict(success=True, commitOid=new.oid, commitUrl=url, **answer)


REPO = r'([^/]+/[^/]+)'
ROUTES = (
    ('GET HEAD', rf'/{REPO}/resolve/([^/]+)/(.+)', 'resolve'),
    ('GET HEAD', rf'/api/resolve-cache/models/{REPO}/([^/]+)/(.+)', 'resolve_cache'),
    ('GET HEAD', r'/cdn/(\w+)', 'cdn'),
    ('GET', r'/api/whoami-v2', 'whoami'),
    ('GET', rf'/api/models/{REPO}', 'model_info'),
    ('GET', rf'/api/models/{REPO}/revision/([^/]+)', 'model_info'),
    ('GET', rf'/api/models/{REPO}/tree/([^/]+)', 'tree'),
    ('POST', rf'/api/models/{REPO}/paths-info/([^/]+)', 'paths_info'),
    ('GET', rf'/api/models/{REPO}/refs', 'refs'),
    ('GET', rf'/api/models/{REPO}/commits/([^/]+)', 'list_commits'),
    ('POST', r'/api/repos/create', 'create_repo'),
    ('POST', rf'/api/models/{REPO}/branch/([^/]+)', 'create_branch'),
    ('POST', r'/api/validate-yaml', 'validate_yaml'),
    ('POST', rf'/api/models/{REPO}/preupload/([^/]+)', 'preupload'),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/batch', 'lfs_batch'),
    ('POST', rf'/{REPO}\.git/info/lfs/objects/verify', 'lfs_verify'),
    ('PUT', r'/cdn/(\w+)', 'lfs_put'),
    ('POST', rf'/api/models/{REPO}/commit/([^/]+)', 'commit'),
)
