"""Pretrained weights: found, compared with their recorded SHA-256, fitted to the model. Nothing is ever unpickled.

timm builds the models and adapts weights to another number of classes or channels; here stands what its own loading
lacks. A digest is recorded in a file `SHA256SUMS`, in the format of `sha256sum`: the one in `timm_hne/weights/` for the
weights of this package, or the one that a repository or folder holds beside its `model.safetensors`.
"""
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load
from timm.models import PretrainedCfg, build_model_with_cfg, list_pretrained, load_pretrained, resolve_pretrained_cfg

from .tree import validate_nodes
from .version import __version__

__all__ = ['DigestError', 'build_model', 'digest', 'fit_weights', 'packaged', 'read_digests']

_logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).parent / 'weights'
WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'
DIGESTS_NAME = 'SHA256SUMS'
CLASSIFIER = 'classifier'
ROUNDS = 8  # of reading the cache while other processes remove damaged files from it


class DigestError(RuntimeError):
    """A file is not the one whose SHA-256 was recorded."""


def packaged(name: str) -> str:
    """Return the path of the packaged weights of `name` ('architecture.tag'), for the `file` of its cfg."""
    return str(PACKAGED / f'{name}.safetensors')


def build_model(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        cache_dir: str | PathLike | None = None,
        **kwargs,
) -> nn.Module:
    """Build a model as timm's `build_model_with_cfg` does, with weights whose digest was checked.

    Args:
        model_cls: Model class.
        variant: Name of the architecture.
        pretrained: Load the pretrained weights.
        pretrained_cfg: Tag or configuration of the weights.
        pretrained_cfg_overlay: Entries that replace those of `pretrained_cfg`.
        cache_dir: Cache of the Hugging Face client, its own choice if None.
        **kwargs: The other arguments of `build_model_with_cfg` and of the model.

    Raises:
        RuntimeError: There are no weights for this tag.
        DigestError: A file differs from its recorded digest, also after another download.
        ValueError: The file is no safetensors file, or its tensors do not fit the model.
        OSError: The file is neither in the cache nor within reach.
    """
    if not pretrained:
        return build_model_with_cfg(
            model_cls,
            variant,
            False,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            **kwargs,
        )
    try:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    except RuntimeError as error:
        raise RuntimeError(f'{error} {_available()}') from error
    overlay = pretrained_cfg_overlay or {}
    if any(key in overlay for key in ('file', 'url', 'hf_hub_id', 'state_dict')):
        # Other weights than the tag's: its file must not come before them, nor its names of classes go with them.
        cfg = replace(cfg, **{'file': None, 'label_names': None, **overlay})
    weights = _read_weights(cfg, cache_dir)

    stored = cfg
    stem = weights.get(f'{cfg.first_conv}.weight')
    if not cfg.source and stem is not None and stem.dim() == 4:
        # The overlay may state other images than those of the weights.
        stored = replace(cfg, input_size=(stem.shape[1], *cfg.input_size[1:]))

    def create(**model_kwargs) -> nn.Module:
        if cfg.source:
            _check_config(weights, cfg, kwargs.get('pretrained_model_args') or {}, model_cls, model_kwargs)
        model = model_cls(**model_kwargs)
        source = dict(
            state_dict=fit_weights(weights, model, stored),
            num_classes=cfg.num_classes,
            input_size=stored.input_size,
            first_conv=cfg.first_conv,
            classifier=CLASSIFIER,
        )
        load_pretrained(model, source, num_classes=model.num_classes, in_chans=model.in_chans)
        return model

    return build_model_with_cfg(create, variant, False, pretrained_cfg=cfg, **kwargs)


# Where weights come from


def _available() -> str:
    names = list_pretrained('hne_*')
    return f'Weights exist for: {", ".join(names)}.' if names else 'This version has no weights for any hne_* model.'


def _read_weights(cfg: PretrainedCfg, cache_dir: str | PathLike | None) -> dict[str, torch.Tensor]:
    """Return the tensors that a cfg names, after the digest of their file was checked."""
    if cfg.source == 'hf-hub':
        return _parse(_fetch(cfg.hf_hub_id, (CONFIG_NAME, WEIGHTS_NAME), cache_dir)[WEIGHTS_NAME], cfg.hf_hub_id)
    if cfg.source == 'local-dir':
        return _parse(_read_folder(Path(cfg.file), (CONFIG_NAME, WEIGHTS_NAME))[WEIGHTS_NAME], cfg.file)
    if cfg.state_dict:
        return dict(cfg.state_dict)
    if cfg.file:
        path = Path(cfg.file)
        return _parse(_read_folder(path.parent, (path.name,))[path.name], path)
    if cfg.hf_hub_id:
        name = cfg.hf_hub_filename or WEIGHTS_NAME
        return _parse(_fetch(cfg.hf_hub_id, (name,), cache_dir)[name], cfg.hf_hub_id)
    name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture
    raise RuntimeError(f'{name} has no pretrained weights. {_available()}')


def _parse(data: bytes, name: str | PathLike) -> dict[str, torch.Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(f'The weights of {name} are not a valid safetensors file: {error}.') from error


def _read_folder(folder: Path, filenames: tuple[str, ...]) -> dict[str, bytes]:
    """Return files of a folder. If it records digests, as the package must, each of them has to have the right one."""
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
        # What the package records counts first
        digests = {**read_digests(paths[DIGESTS_NAME]), **{name: own for name, own in digests.items() if own}}
        revision = paths[DIGESTS_NAME].parent.name
    for name in filenames:
        paths[name] = _download(repo_id, name, revision, cache_dir)
    return digests, paths


def _fetch(model_id: str, filenames: tuple[str, ...], cache_dir: str | PathLike | None) -> dict[str, bytes]:
    """Return files of a Hub repository after comparing them with the recorded digests.

    Files that differ leave the cache and are downloaded once more.

    Args:
        model_id: 'user/name' or 'user/name@revision'.
        filenames: Files of the repository.
        cache_dir: Cache of the Hugging Face client, its own choice if None.
    """
    mismatch, before = None, {}
    for _ in range(ROUNDS):
        try:
            digests, paths = _locate(model_id, filenames, cache_dir, fresh=mismatch is not None)
            files = {name: paths[name].read_bytes() for name in filenames}
        except FileNotFoundError:
            continue  # another process has just removed a file that differs
        except (OSError, RuntimeError) as error:
            if mismatch is None:
                raise
            raise DigestError(f'{mismatch} It has left the cache, and {error}') from error
        wrong = {name: _mismatch(f'{name} of {model_id}', files[name], digests.get(name)) for name in filenames}
        wrong = {name: error for name, error in wrong.items() if error}
        if not wrong:
            break
        for name in wrong:
            paths[name].resolve().unlink(missing_ok=True)
            paths[name].unlink(missing_ok=True)
        error = next(iter(wrong.values()))
        if mismatch is not None:
            raise error
        _logger.warning(f'{error} It leaves the cache and is downloaded once more.')
        mismatch, before = error, files
    else:
        raise OSError(f'The files of {model_id} keep vanishing from the cache.')
    if before and before.get(CONFIG_NAME) != files.get(CONFIG_NAME):
        # timm has built its arguments from the damaged file by now
        raise DigestError(f'{CONFIG_NAME} of {model_id} was damaged in the cache and has been replaced, load it again.')
    return files


# What fits a model


def _is_prefix(nodes: tuple[int, ...], tree: tuple[int, ...]) -> bool:
    """Whether the first nodes of `tree` form a tree with these `nodes`, every node having its parent."""
    if any(count > total for count, total in zip(nodes, tree)):
        return False
    return all(
        node * nodes[b] // nodes[b + 1] == node * tree[b] // tree[b + 1]
        for b in range(len(nodes) - 1) for node in range(nodes[b + 1])
    )


def _rows(weights: dict[str, torch.Tensor], name: str) -> int:
    # an empty tensor may claim any number of rows
    return weights[name].shape[0] if name in weights and weights[name].ndim and weights[name].numel() else 0


def _check_config(
        weights: dict[str, torch.Tensor],
        cfg: PretrainedCfg,
        args: dict,
        model_cls: Callable[..., nn.Module],
        model_kwargs: dict,
) -> None:
    """Compare the sizes in a `config.json` with the tensors before memory is allocated for them."""
    nodes = validate_nodes(args['nodes']) if 'nodes' in args else None
    for name, stated in ('num_classes', cfg.num_classes), ('in_chans', cfg.input_size[0]):
        if args.get(name, stated) != stated:
            raise ValueError(f'{CONFIG_NAME} contradicts itself: {name} is {args[name]!r} as well as {stated}.')
    classes = _rows(weights, f'{CLASSIFIER}.weight')
    if nodes is not None and nodes[-1] * cfg.num_classes != classes:
        raise ValueError(
            f'{CONFIG_NAME} does not belong to the weights: nodes={nodes} and num_classes={cfg.num_classes} make '
            f'{nodes[-1] * cfg.num_classes} classifier outputs, the weights have {classes}.')
    for b, count in enumerate(nodes or ()):
        rows = {_rows(weights, name) for name in weights if name.startswith(f'blocks.{b}.') and weights[name].ndim}
        if not rows or 0 in rows or any(number % count for number in rows):
            raise ValueError(
                f'{CONFIG_NAME} does not belong to the weights: nodes={nodes} make {count} nodes in block {b}, the '
                f'tensors there have {sorted(rows)} rows.')
    stem = weights.get(f'{cfg.first_conv}.weight')
    if stem is None or stem.shape[1] != cfg.input_size[0]:
        raise ValueError(
            f'{CONFIG_NAME} does not belong to the weights: it states {cfg.input_size[0]} image channels for '
            f'first_conv={cfg.first_conv!r}, the weights have {None if stem is None else tuple(stem.shape)} there.')
    if nodes is None or set(args) - {'nodes', 'num_classes', 'in_chans', 'num_members', 'global_pool'}:
        # sizes may come from elsewhere: look at the shapes without the memory
        fit_weights(weights, model_cls(**{**model_kwargs, 'device': 'meta'}), cfg)


def fit_weights(weights: dict[str, torch.Tensor], model: nn.Module, cfg: PretrainedCfg) -> dict[str, torch.Tensor]:
    """Return the part of a checkpoint that a model consists of: all of it, or the first nodes of every block.

    The classifier and the first convolution are left to timm where the numbers of classes or channels differ.
    """
    target = model.state_dict()
    new_classes = model.num_classes != cfg.num_classes
    heads = {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'} if new_classes else set()
    missing, unexpected = target.keys() - weights.keys() - heads, weights.keys() - target.keys() - heads
    if missing or unexpected:
        raise ValueError(
            f'The weights are not those of this model: missing tensors {_some(missing)}, unexpected ones '
            f'{_some(unexpected)}.')

    nodes = []
    for b, count in enumerate(model.nodes):
        name = next(name for name in target if name.startswith(f'blocks.{b}.'))
        stored, rest = divmod(_rows(weights, name) * count, target[name].shape[0])
        nodes.append(stored if stored and not rest else count)
    nodes = tuple(nodes)

    fitted, wrong = {}, []
    for name in weights:
        block = int(name.split('.')[1]) if name.startswith('blocks.') else -1
        if name in heads:
            continue
        found, shape = weights[name], target[name].shape
        if shape:
            shape = torch.Size((shape[0] // model.nodes[block] * nodes[block], *shape[1:]))
        if name == f'{cfg.first_conv}.weight':
            shape = torch.Size((shape[0], cfg.input_size[0], *shape[2:]))
        if found.shape != shape or found.is_floating_point() != target[name].is_floating_point():
            wrong.append(f'{name} {found.dtype} {tuple(found.shape)} instead of {target[name].dtype} {tuple(shape)}')
        else:
            fitted[name] = found[:target[name].shape[0]] if shape else found
    if wrong:
        raise ValueError(f'The weights are not those of this model: {_some(wrong)}.')
    if not _is_prefix(model.nodes, nodes):
        raise ValueError(
            f'The weights were trained with nodes={nodes}, the model has nodes={model.nodes}. Only the same tree or a '
            'prefix of it can take them.')
    return fitted


def _some(names) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '') or 'none'
