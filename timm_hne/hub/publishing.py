"""Publishing a trained ensemble: a folder that timm reads, uploaded to the Hugging Face Hub as one commit."""
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from ..files import write_text
from ..models.ensemble import HierarchicalEnsemble
from ..pretrained import DIGESTS_NAME
from .card import merge_cards, renew_card
from .folder import CARD_NAME, card_digests, present_card, write_digests, write_folder

__all__ = ['publish']


def publish(
        model: HierarchicalEnsemble,
        repo_id: str,
        results: Mapping[str, Any],
        recipe: Mapping[str, Any],
        folder: str | os.PathLike | None = None,
        dtype: str = 'float16',
        label_names: Sequence[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
        private: bool = False,
        revision: str = 'main',
        token: str | None = None,
        dry_run: bool = False,
        license: str | None = None,
        base_model: str | None = None,
        datasets: Sequence[str] | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
) -> str:
    """Publish a model: write a folder, upload it as one commit, download it again and compare.

    Nothing is uploaded before timm has built the model from the folder and got the same logits. Publishing the same
    thing twice makes no second commit. What the owner wrote into the card stays: only its generated part, between two
    comments, and the metadata of the results are renewed.

    Args:
        model: A trained model, made by `timm.create_model`.
        repo_id: 'user/name' of the repository, or 'name' for one of your own. It is made if it does not exist.
        results: What `timm-hne eval` measured of these weights.
        recipe: How the model was trained.
        folder: Folder to write; the repository's name, in the current directory, if None.
        dtype: 'float16' or 'float32', the data type of the stored weights.
        label_names: Names of the classes; if None, those of the repository or folder that the model comes from.
        data_config: How images were prepared, as timm's `resolve_data_config` takes it; as in the model's cfg if None.
        private: Make a new repository private; refuse one that is public.
        revision: Branch to commit to. It is made if it does not exist.
        token: Token of the Hub; the one of `hf auth login` or `HF_TOKEN` if None.
        dry_run: Write the folder only.
        license: Id of the license on the Hub, e.g. 'mit'; the one that the card or the architecture has if None.
        base_model: Id on the Hub of the model that this one was made from.
        datasets: Ids on the Hub of the data that the model was trained on; known for CIFAR and ImageNet if None.
        commit_message: Title of the commit; 'Publish name' if None.
        create_pr: Open a pull request in a repository that exists, instead of committing to it.

    Returns:
        The URL of the commit or pull request, or the path of the folder after a dry run.

    Raises:
        TypeError: `model` is not a hierarchical ensemble.
        ValueError: An argument is not what it must be, the results are of other weights, the weights are not finite,
            timm would build another model from the folder, the repository is public or holds something else, its card
            and that of the folder were both edited, or what was downloaded differs from what was uploaded.
        OSError: A file cannot be written, or the Hub refuses, or is out of reach.
    """
    validate_repo_id(repo_id)
    if create_pr and (private or revision != 'main'):
        raise ValueError(
            f'create_pr goes to the main branch of a repository that exists, got private={private} and '
            f'revision={revision!r}.')
    if '/' not in repo_id:
        repo_id = f'{_owner(repo_id, token)}/{repo_id}'
    name = repo_id.split('/')[1]
    folder = Path(name if folder is None else folder)
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision != 'main' else '')
    given = dict(license=license, base_model=base_model, datasets=datasets)
    before = card_digests(folder)
    files = write_folder(model, folder, source, results, recipe, dtype, label_names, data_config, **given)
    if dry_run:
        return str(folder)
    given = [key for key, value in given.items() if value]
    try:
        api = HfApi(token=token, library_name='timm-hne')
        head = _open_repository(api, repo_id, private, revision, create_pr)
        if CARD_NAME in {file.rfilename for file in head.siblings}:
            _renew_card(folder, files, given, before, repo_id, head, token)
        return _commit(api, folder, files, repo_id, head.sha, commit_message or f'Publish {name}', revision, create_pr)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:
        reason = '; '.join(str(reason) for reason in (error, error.__cause__) if reason)
        raise OSError(f'Publishing to {repo_id} failed, it can be tried again: {reason}') from error


def _owner(repo_id: str, token: str | None) -> str:
    """Return the name of the user whose token it is."""
    try:
        return HfApi(token=token, library_name='timm-hne').whoami()['name']
    except Exception as error:
        raise OSError(
            f"repo_id {repo_id!r} has no owner, and the Hub does not tell yours: {error}. Log in, or give 'user/name'."
        ) from error


def _open_repository(api: HfApi, repo_id: str, private: bool, revision: str, create_pr: bool) -> Any:
    """Return what the Hub says of a repository, after making it and its branch if need be.

    Raises:
        ValueError: It is public but was to be private, or it holds something else than an ensemble.
    """
    api.whoami()  # says clearly what is wrong with a token, before anything is made
    if not create_pr:
        api.create_repo(repo_id, private=private, exist_ok=True)
    head = api.model_info(repo_id)
    if private and not head.private:
        raise ValueError(
            f'private is asked for, but {repo_id} exists and is public: make it private in its settings on the Hub, or '
            'publish without private.')
    if revision != 'main':
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
    present = {file.rfilename for file in head.siblings} - {'.gitattributes', CARD_NAME}
    if present and DIGESTS_NAME not in present:
        raise ValueError(f'repo_id must be a new repository or one of an HNE, but {repo_id} holds {sorted(present)}.')
    return head


def _renew_card(
        folder: Path,
        files: Sequence[str],
        given: Sequence[str],
        before: tuple[str | None, str | None],
        repo_id: str,
        head: Any,
        token: str | None,
) -> None:
    """Put what its owner wrote into the card on the Hub into that of the folder, whose digests `before` are.

    Raises:
        ValueError: Both were edited, and say different things.
    """
    path = folder / CARD_NAME
    with tempfile.TemporaryDirectory() as there:
        for name in {file.rfilename for file in head.siblings} & {CARD_NAME, DIGESTS_NAME}:
            hf_hub_download(repo_id, name, revision=head.sha, local_dir=there, token=token)
        present = present_card(Path(there))
        found, published = card_digests(Path(there))
    here, recorded = before
    edited = here not in (None, published)
    if present is not None and not (edited and recorded == found == published):  # or it was edited here alone
        card = (merge_cards if edited else renew_card)(present, path.read_text(encoding='utf-8'), given)
        write_text(path, card)
        write_digests(folder, [name for name in files if name != DIGESTS_NAME])


def _commit(
        api: HfApi,
        folder: Path,
        files: Sequence[str],
        repo_id: str,
        parent: str,
        message: str,
        revision: str,
        create_pr: bool,
) -> str:
    """Commit files and compare them after a download; return the URL of the commit or pull request."""
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(name, folder / name) for name in files],
        commit_message=message,
        revision=revision,
        parent_commit=parent,
        create_pr=create_pr,
    )
    with tempfile.TemporaryDirectory() as cache:
        for name in files:
            path = hf_hub_download(repo_id, name, revision=commit.oid, cache_dir=cache, token=api.token)
            if Path(path).read_bytes() != (folder / name).read_bytes():
                raise ValueError(f'{name} differs after a download from {commit.commit_url}, publish it again.')
    return str(commit.pr_url or commit.commit_url)
