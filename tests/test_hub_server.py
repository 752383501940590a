"""The loopback Hub of the tests, driven by the unmodified client: it must be as strict as the real one."""
import hashlib
import os
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = os.urandom(200_000)


@pytest.fixture
def alice(hub):
    return HfApi(endpoint=hub.url, token='hf_alice')


@pytest.fixture
def repo(alice):
    alice.create_repo('alice/net', private=True)
    commit = alice.create_commit(
        'alice/net',
        [CommitOperationAdd('config.json', b'{}'), CommitOperationAdd('model.safetensors', WEIGHTS)],
        commit_message='first',
    )
    return commit.oid


def download(filename='model.safetensors', token='hf_alice', **kwargs):
    return Path(hf_hub_download('alice/net', filename, token=token, **kwargs))


def test_commit_and_download(hub, alice, repo):
    assert alice.whoami()['name'] == 'alice'
    path = download()
    assert path.read_bytes() == WEIGHTS
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    assert path.parent.name == repo
    assert download('config.json').read_text() == '{}'
    assert [file.path for file in alice.list_repo_tree('alice/net')] == [
        '.gitattributes', 'config.json', 'model.safetensors']
    info = alice.get_paths_info('alice/net', ['model.safetensors'])[0]
    assert info.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert alice.model_info('alice/net').sha == repo
    assert [commit.title for commit in alice.list_repo_commits('alice/net')] == ['first', 'initial commit']


def test_unchanged_files_make_no_commit(hub, alice, repo):
    again = alice.create_commit(
        'alice/net', [CommitOperationAdd('model.safetensors', WEIGHTS)], commit_message='again')
    assert again.oid == repo
    assert hub.commits('alice/net') == ['initial commit', 'first']


def test_branches_and_parents(hub, alice, repo):
    alice.create_branch('alice/net', branch='dev')
    add = [CommitOperationAdd('config.json', b'{"a": 1}')]
    alice.create_commit('alice/net', add, commit_message='on dev', revision='dev')
    assert download('config.json', revision='dev').read_text() == '{"a": 1}'
    assert download('config.json').read_text() == '{}'
    assert {ref.name for ref in alice.list_repo_refs('alice/net').branches} == {'main', 'dev'}
    stale = [CommitOperationAdd('config.json', b'{"b": 1}')]
    with pytest.raises(HfHubHTTPError, match='412'):
        alice.create_commit('alice/net', stale, commit_message='stale', revision='dev', parent_commit=repo)


def test_permissions(hub, alice, repo):
    bob = HfApi(endpoint=hub.url, token='hf_bob')
    add = [CommitOperationAdd('config.json', b'{"evil": 1}')]
    with pytest.raises(RepositoryNotFoundError):
        download(token='hf_bob')
    with pytest.raises(RepositoryNotFoundError):
        bob.model_info('alice/net')
    with pytest.raises(HfHubHTTPError, match='403'):
        bob.create_repo('alice/other')
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        alice.whoami(token='hf_wrong')
    with pytest.raises(HfHubHTTPError, match='403'):
        HfApi(endpoint=hub.url, token='hf_alice_read').create_commit('alice/net', add, commit_message='x')
    with pytest.raises(HfHubHTTPError, match='409'):
        alice.create_repo('alice/net')
    assert alice.create_repo('alice/net', exist_ok=True).repo_id == 'alice/net'
    assert hub.files('alice/net')['config.json'] == b'{}'


def test_missing_things_have_their_own_errors(hub, alice, repo):
    with pytest.raises(RemoteEntryNotFoundError):
        download('nothing.json')
    with pytest.raises(RevisionNotFoundError):
        download(revision='nowhere')


def test_the_token_stays_on_the_hub(hub, repo):
    request = urllib.request.Request(
        f'{hub.url}/cdn/{hashlib.sha256(WEIGHTS).hexdigest()}', headers={'Authorization': 'Bearer hf_alice'})
    with pytest.raises(urllib.error.HTTPError, match='400'):
        urllib.request.urlopen(request)


@pytest.mark.parametrize('kind', ['cut', 'truncate', 'reset', 'corrupt', 'slow', 503])
def test_faults(hub, repo, monkeypatch, kind):
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.2)
    hub.fault('GET /cdn/', kind)
    if kind in ('cut', 'slow', 'corrupt'):  # the client resumes or starts again; corrupt bytes it does not notice
        assert (download().read_bytes() == WEIGHTS) == (kind != 'corrupt')
    else:
        with pytest.raises(Exception, match=r'reset by peer|Consistency check failed|503'):
            download()
        assert download().read_bytes() == WEIGHTS
    assert sum('GET /cdn/' in line for line in hub.log) == (1 if kind == 'corrupt' else 2)


def test_a_dead_server_leaves_the_cache(hub, repo):
    with pytest.raises(LocalEntryNotFoundError):
        hub.fault('HEAD /', 500, times=None)
        download()
    hub.faults.clear()
    path = download()
    hub.fault('', 500, times=None)
    assert download() == path
