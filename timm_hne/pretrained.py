"""Pretrained weights: found in the package, in a folder or on the Hub, and compared with their recorded SHA-256.

Nothing is ever unpickled. The digests are recorded in a file `SHA256SUMS`, in the format of `sha256sum`: the one in
`timm_hne/weights/` for the weights of this package, or the one that a repository or folder holds beside its
`model.safetensors`.
"""
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models import PretrainedCfg, list_pretrained, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .version import __version__

__all__ = [
    'DigestError', 'digest', 'packaged', 'read_digests', 'read_folder', 'read_results', 'read_weights', 'state_digest',
]

_logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / 'weights'
WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'
DIGESTS_NAME = 'SHA256SUMS'
RESULTS_NAME = 'evaluation.json'
ROUNDS = 8  # attempts to read the cache while other processes remove damaged files from it


class DigestError(RuntimeError):
    """A file is not the one whose SHA-256 was recorded."""


def packaged(name: str) -> str:
    """Return the path of the packaged weights of `name` ('architecture.tag'), for the `file` of its cfg."""
    return str(PACKAGED / f'{name}.safetensors')


def available_weights() -> str:
    names = list_pretrained('hne_*')
    return f'Weights exist for: {", ".join(names)}.' if names else 'This version has no weights for any hne_* model.'


def read_weights(
        cfg: PretrainedCfg,
        cache_dir: str | PathLike | None,
) -> tuple[dict[str, torch.Tensor], bytes | None]:
    """Return the weights that a cfg names, after the digest of their file was checked.

    Args:
        cfg: Configuration of the weights.
        cache_dir: Cache of the Hugging Face client, its own choice if None.

    Returns:
        The tensors by their names, and the `config.json` beside them, checked too, if they come from a Hub repository
        or a folder.

    Raises:
        RuntimeError: The cfg names no weights.
        DigestError: A file differs from its recorded digest, also after another download.
        ValueError: The weights are no safetensors file, or the cfg names nothing but a URL.
        OSError: A file cannot be read or downloaded.
    """
    config = None
    if cfg.source in ('hf-hub', 'local-dir'):
        names, where = (CONFIG_NAME, WEIGHTS_NAME), cfg.hf_hub_id if cfg.source == 'hf-hub' else cfg.file
        files = _fetch(where, names, cache_dir) if cfg.source == 'hf-hub' else read_folder(Path(where), names)
        config, data = files[CONFIG_NAME], files[WEIGHTS_NAME]
    elif cfg.state_dict:
        return dict(cfg.state_dict), None
    elif cfg.file:
        where = Path(cfg.file)
        data = read_folder(where.parent, (where.name,))[where.name]
    elif cfg.hf_hub_id:
        name, where = cfg.hf_hub_filename or WEIGHTS_NAME, cfg.hf_hub_id
        data = _fetch(where, (name,), cache_dir)[name]
    elif cfg.url:
        raise ValueError(f'url is not read, its digest is unknown: give file, hf_hub_id or state_dict; got {cfg.url}')
    else:
        name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
        raise RuntimeError(f'{name} has no pretrained weights. {available_weights()}')
    try:
        return load(data), config
    except SafetensorError as error:
        raise ValueError(f'The weights of {where} are not a valid safetensors file: {error}.') from error


def read_results(source: str | Path, model: torch.nn.Module) -> dict[str, Any] | None:
    """Return the evaluation that belongs to weights, on images of the model's size, or None if there is none of them.

    Args:
        source: 'hf-hub:user/name' or the name of a registered model; or a file or folder, beside or in which it is.
        model: The model with its weights.
    """
    try:
        if isinstance(source, Path):
            folder = source if source.is_dir() else source.parent
            data = (folder / RESULTS_NAME).read_bytes()  # may be newer than the folder; it names its weights
        elif source.lower().startswith(('hf-hub:', 'hf_hub:')):  # as timm's create_model takes it
            data = _fetch(source.partition(':')[2], (RESULTS_NAME,), None)[RESULTS_NAME]
        else:
            cfg = model.pretrained_cfg
            data = (PACKAGED / f'{cfg["architecture"]}.{cfg.get("tag")}.json').read_bytes()
        results = json.loads(data)
        size = list(model.pretrained_cfg['input_size'])
        ours = results['weights_sha256'] == state_digest(model.state_dict()) and results.get('input_size', size) == size
        return results if ours else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def check_config(
        config: bytes,
        variant: str,
        cfg: PretrainedCfg,
        model_args: Mapping[str, Any],
        overlay: Mapping[str, Any] | None,
) -> None:
    """Check that timm built its arguments from the `config.json` that belongs to the weights.

    timm has read that file before its digest could be checked, and possibly from an older commit of the repository than
    the one that the weights are of, or from a folder that was written anew since.

    Args:
        config: The file whose digest was checked.
        variant: Architecture, as timm read it.
        cfg: Configuration of the weights as timm read it, with `overlay`.
        model_args: Arguments of the model as timm read them.
        overlay: Entries that the user put in the place of those of the file.

    Raises:
        DigestError: timm has read something else.
        ValueError: The file is no configuration of a model.
    """
    where = cfg.hf_hub_id if cfg.source == 'hf-hub' else cfg.file
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG_NAME).write_bytes(config)
        try:
            pretrained_cfg, architecture, args = load_model_config_from_path(folder)
            right = {**vars(resolve_pretrained_cfg(variant, pretrained_cfg, overlay)), 'model_args': args}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{CONFIG_NAME} of {where} does not describe a model: {error!r}.') from error
    right['architecture'] = architecture
    read = {**vars(cfg), 'architecture': variant, 'model_args': model_args}
    for key in sorted(read.keys() - {'file', 'hf_hub_id', 'source', 'state_dict'}):
        # A list of the file may be a tuple by now.
        before, now = (json.dumps(value, sort_keys=True, default=str) for value in (read[key], right[key]))
        if before != now:
            raise DigestError(
                f'{CONFIG_NAME} of {where} has changed since timm read it: {key} was {before:.100} and is {now:.100}. '
                'Load the model again.')


def read_folder(folder: Path, filenames: tuple[str, ...]) -> dict[str, bytes]:
    """Return files of a folder, compared with its `SHA256SUMS` if it has one; the folder of this package must.

    Raises:
        DigestError: A file differs from its recorded digest, or has none there.
        OSError: A file cannot be read.
    """
    files = {name: (folder / name).read_bytes() for name in filenames}
    record = folder / DIGESTS_NAME
    if folder == PACKAGED or record.exists():
        digests = read_digests(record) if record.exists() else {}
        for name, data in files.items():
            if error := _mismatch(folder / name, data, digests.get(name)):
                raise error
    return files


def read_digests(path: str | PathLike) -> dict[str, str]:
    """Read a file in the format of `sha256sum`, also of `sha256sum --binary`: lines of '<hex digest>  <file name>'.

    Returns:
        The digest of each file name.
    """
    lines = Path(path).read_text(encoding='utf-8', errors='replace').splitlines()
    return {
        name.lstrip(' *').removeprefix('./'): sha256.lower()
        for sha256, _, name in (line.partition(' ') for line in lines)
    }


def digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def state_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of weights, by which an evaluation says which weights it is of.

    It covers names, shapes and values. The values are rounded to float16 first, so that weights and what
    `timm-hne publish` stores of them have the same digest.

    Args:
        state_dict: Tensors by their names, on any device and in any floating-point type.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        found.update(f'{name} {tuple(tensor.shape)}\n'.encode())
        # The values with their lowest byte first, whatever the machine's order.
        found.update(tensor.detach().cpu().half().numpy().astype('<f2', copy=False).tobytes())
    return found.hexdigest()


def _mismatch(name: str | PathLike, data: bytes, expected: str | None) -> DigestError | None:
    found = digest(data)
    if found == expected:
        return None
    return DigestError(f'{name} has the SHA-256 digest {found}, but {expected or "none"} is recorded for it.')


def _download(
        repo_id: str,
        filename: str,
        revision: str | None,
        cache_dir: str | PathLike | None,
        fresh: bool = False,
) -> Path:
    try:
        return Path(hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            force_download=fresh,
            library_name='timm-hne',
            library_version=__version__,
        ))
    except RemoteEntryNotFoundError:
        raise
    except Exception as error:
        where = '' if fresh else 'is not in the cache and '
        raise OSError(f'{filename} of {repo_id} {where}cannot be downloaded: {error}') from error


def _locate(
        model_id: str,
        filenames: tuple[str, ...],
        cache_dir: str | PathLike | None,
        fresh: bool,
) -> tuple[dict[str, str | None], dict[str, Path]]:
    """Return the recorded digests and the cached paths of files of a Hub repository, all of one commit.

    `fresh` downloads the digests again; the ones in the cache stay there until that has succeeded.
    """
    repo_id, _, revision = model_id.partition('@')
    revision = revision or None
    record = read_digests(PACKAGED / DIGESTS_NAME) if (PACKAGED / DIGESTS_NAME).exists() else {}
    digests = {name: record.get(f'{model_id}/{name}') for name in filenames}
    paths = {}
    if None in digests.values():
        try:
            paths[DIGESTS_NAME] = _download(repo_id, DIGESTS_NAME, revision, cache_dir, fresh)
        except RemoteEntryNotFoundError as error:
            raise RuntimeError(
                f'{repo_id} has no file {DIGESTS_NAME}, so its weights cannot be checked. '
                '`timm-hne publish` writes one.') from error
        # What this package records counts more than what the repository says.
        digests = {**read_digests(paths[DIGESTS_NAME]), **{name: own for name, own in digests.items() if own}}
        revision = paths[DIGESTS_NAME].parent.name
    for name in filenames:
        paths[name] = _download(repo_id, name, revision, cache_dir)
    return digests, paths


def _fetch(model_id: str, filenames: tuple[str, ...], cache_dir: str | PathLike | None) -> dict[str, bytes]:
    """Return files of a Hub repository after comparing them with the recorded digests.

    Files that differ are removed from the cache and downloaded once more.

    Args:
        model_id: 'user/name' or 'user/name@revision'.
        filenames: Files of the repository.
        cache_dir: Cache of the Hugging Face client, its own choice if None.
    """
    mismatch = None
    for _ in range(ROUNDS):
        try:
            digests, paths = _locate(model_id, filenames, cache_dir, fresh=mismatch is not None)
            files = {name: paths[name].read_bytes() for name in filenames}
        except FileNotFoundError:
            continue  # another process has just removed a file whose digest was wrong
        except (OSError, RuntimeError) as error:
            if mismatch is None:
                raise
            raise DigestError(f'{mismatch} It was removed from the cache, and {error}') from error
        wrong = {name: _mismatch(f'{name} of {model_id}', files[name], digests.get(name)) for name in filenames}
        wrong = {name: error for name, error in wrong.items() if error}
        if not wrong:
            return files
        error = next(iter(wrong.values()))
        try:
            for name in wrong:
                paths[name].resolve().unlink(missing_ok=True)
                paths[name].unlink(missing_ok=True)
        except OSError as reason:
            raise DigestError(f'{error} It cannot be removed from the cache: {reason}') from reason
        if mismatch is not None:
            raise error
        _logger.warning(f'{error} It is removed from the cache and downloaded once more.')
        mismatch = error
    raise OSError(f'The files of {model_id} keep vanishing from the cache.')
