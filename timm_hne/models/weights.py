"""Weights that fit a model: built by timm, read and checked by `timm_hne.pretrained`, cut or grown to fit here."""
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    load_pretrained,
    resolve_pretrained_cfg,
)

from ..pretrained import CONFIG_NAME, available_weights, check_config, read_weights
from .frontier import check_tree
from .grow import NOISE, grow_weights

__all__ = ['build_model', 'fit_weights', 'load_grown']

# Where weights come from, in a cfg.
SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


def build_model(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        cache_dir: str | PathLike | None = None,
        grow_noise: float = NOISE,
        grow_seed: int = 0,
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
        grow_noise: Standard deviation of the noise if the weights are those of a smaller tree; see `fit_weights`.
        grow_seed: Seed of that noise.
        **kwargs: The other arguments of `build_model_with_cfg` and of the model.

    Raises:
        RuntimeError: There are no weights for this tag.
        DigestError: A file differs from its recorded digest, also after another download.
        ValueError: The file is no safetensors file, its tensors do not fit the model, or the `config.json` beside it
            asks for another model or for arguments that no model of this class takes.
        OSError: The file is neither in the cache nor within reach.
    """
    model_args = kwargs.get('pretrained_model_args') or {}  # from config.json, which anybody may have written
    allowed = set(inspect.signature(model_cls).parameters) - {'device', 'dtype'} | {'grow_noise', 'grow_seed'}
    if unknown := sorted(model_args.keys() - allowed):
        raise ValueError(f'model_args in {CONFIG_NAME} may hold {sorted(allowed)}, got {unknown} as well.')
    if 'num_members' in kwargs and str(kwargs.get('feature_cls')).lower() in ('list', 'dict', 'hook'):
        num_members = kwargs.pop('num_members')  # these wrappers do not heed it; who loads may not have asked for it
        if num_members != model_args.get('num_members'):
            raise ValueError(
                f"feature_cls must be 'getter' with num_members, got {kwargs['feature_cls']!r}, which computes all "
                f'members, with num_members={num_members}.')
    try:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    except RuntimeError as error:
        raise RuntimeError(f'{error} {available_weights()}') from error
    overlay = pretrained_cfg_overlay or {}
    if cfg.source == 'local-dir' and not Path(cfg.file).is_dir():
        cfg = replace(cfg, source=None, label_names=None)  # train.py's --pretrained-path
    if any(key in overlay for key in SOURCES):
        # Other weights than the tag's: its file must not come before them, nor its names of classes go with them.
        cfg = replace(cfg, **{'file': None, 'source': None, 'label_names': None, **overlay})
    if 'label_names' not in overlay and not _has_own_weights(cfg, variant, pretrained):
        cfg = replace(cfg, label_names=None)  # timm's inference.py would write them as what other weights see
    if not pretrained:
        return build_model_with_cfg(model_cls, variant, False, pretrained_cfg=cfg, cache_dir=cache_dir, **kwargs)
    weights, config = read_weights(cfg, cache_dir)
    recorded = cfg
    if config is not None:
        check_config(config, variant, cfg, model_args, pretrained_cfg_overlay)
        recorded = resolve_pretrained_cfg(variant, pretrained_cfg)  # an overlay may state other classes and channels
    chosen = 'num_classes' in kwargs or 'num_classes' in overlay or kwargs.get('features_only')

    def create(**model_kwargs) -> nn.Module:
        # On the meta device nothing is allocated, however large the model would be.
        on_meta = {**model_kwargs, 'device': 'meta'}
        if config is not None:
            _check_sizes(weights, recorded, model_args, model_cls, on_meta)
        meta = model_cls(**on_meta)
        meta.pretrained_cfg = vars(cfg)
        stored = recorded if config is not None else _as_stored(cfg, weights, meta)
        if not chosen and 0 <= stored.num_classes != meta.num_classes:
            raise ValueError(
                f'num_classes must be given, the weights have {stored.num_classes} classes and {variant} has '
                f'{meta.num_classes}.')
        fitted = fit_weights(weights, meta, stored, grow_noise, grow_seed)
        source = dict(
            state_dict=fitted,
            num_classes=stored.num_classes,
            input_size=stored.input_size,
            first_conv=tuple(name for name in as_names(cfg.first_conv) if f'{name}.weight' in fitted),
        )
        model = model_cls(**model_kwargs)
        source['classifier'] = model.classifier_names
        load_pretrained(model, source, num_classes=model.num_classes, in_chans=model.in_chans)
        if model.num_classes != stored.num_classes:
            _shuffle_classifiers(model)
        return model

    return build_model_with_cfg(create, variant, False, pretrained_cfg=cfg, **kwargs)


@torch.no_grad()
def _shuffle_classifiers(model: nn.Module) -> None:
    """Bring the numbers in the classifiers of later members into another order: new ones may be copies of the first."""
    for name in model.classifier_names[1:]:
        for weight in model.get_submodule(name).parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), device=weight.device)].view_as(weight))


def _has_own_weights(cfg: PretrainedCfg, variant: str, pretrained: bool) -> bool:
    """Whether a model has the weights that the names of classes in its cfg are of, by all that is known."""
    if cfg.source in ('hf-hub', 'local-dir'):
        return True
    tags = get_arch_pretrained_cfgs(variant)
    tag = tags.get(f'{variant}.{cfg.tag}' if cfg.tag else variant)
    if tag is None or cfg.label_names != tag.label_names:
        return True  # not the names of a tag of ours
    return pretrained and all(getattr(cfg, key) == getattr(tag, key) for key in SOURCES)


def _as_stored(cfg: PretrainedCfg, weights: dict[str, torch.Tensor], model: nn.Module) -> PretrainedCfg:
    """Return a cfg with the classes and image channels that the weights have; an overlay may state other ones."""
    try:
        sizes = read_sizes(weights, model)
    except (KeyError, ValueError):
        return cfg  # `fit_weights` says what is wrong
    input_size = (sizes.get('in_chans', cfg.input_size[0]), *cfg.input_size[1:])
    # timm's train.py states -1 classes for a new classifier whatever the weights are.
    return replace(cfg, num_classes=sizes['num_classes'] if cfg.num_classes >= 0 else -1, input_size=input_size)


def _is_prefix(nodes: tuple[int, ...], tree: tuple[int, ...]) -> bool:
    """Whether the first nodes of `tree` form a tree with these `nodes`, every node having its parent."""
    if any(count > total for count, total in zip(nodes, tree)):
        return False
    return all(
        node * nodes[b] // nodes[b + 1] == node * tree[b] // tree[b + 1]
        for b in range(len(nodes) - 1) for node in range(nodes[b + 1])
    )


def _check_sizes(
        weights: dict[str, torch.Tensor],
        cfg: PretrainedCfg,
        model_args: dict[str, Any],
        model_cls: Callable[..., nn.Module],
        on_meta: dict[str, Any],
) -> None:
    """Check that the weights are those of the model that a `config.json` describes.

    The time and memory that this takes depend on the size of the weights, not on what the file asks for; but a base of
    `hne_from_timm` is built, without weights, as its `base_args` have it.
    """
    try:
        for name, stated in ('num_classes', cfg.num_classes), ('in_chans', cfg.input_size[0]):
            if model_args.get(name, stated) != stated:
                raise ValueError(f'{name} is {model_args[name]!r} as well as {stated}.')
        stated = {key: value for key, value in on_meta.items() if key != 'global_pool'}  # chosen by who loads
        stated.update(model_args, num_classes=cfg.num_classes, in_chans=cfg.input_size[0])
        for name in ('num_members', 'grow_noise', 'grow_seed'):  # chosen too, or done
            stated.pop(name, None)
        nodes = model_args.get('nodes')
        counted = isinstance(nodes, (list, tuple))
        if counted:
            # A block can have a module for each node: as many as the weights have are built later, the first do here.
            stated['nodes'] = (1,) * len(nodes)
        model = model_cls(**stated)
        found = {name: len(parts) for name, parts in node_weights(weights, model).items()}
        if counted and tuple(nodes) != _nodes_of(found, nodes):
            raise ValueError(f'nodes is {nodes}, the weights have {found}.')
        fit_weights(weights, model, cfg)
    except Exception as error:  # whatever a constructor makes of junk
        reason = str(error).partition('\n')[0]
        raise ValueError(f'{CONFIG_NAME} does not belong to the weights: {reason:.500}') from error


def read_sizes(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, Any]:
    """Read nodes, classes and image channels off weights.

    Args:
        weights: Tensors by their names.
        model: The model that they are of, whatever its nodes, classes and channels, also on the meta device.

    Returns:
        `nodes`, `num_classes`, and `in_chans` if the first layer is a convolution.

    Raises:
        KeyError: A tensor is missing.
        ValueError: The weights are those of another model.
    """
    weights = _of_members(weights, model)
    parts = node_weights({key: weight for key, weight in weights.items() if key.startswith('blocks.')}, model)
    classifier = f'{model.classifier_names[0]}.weight'
    replicated = classifier.startswith('heads.')
    nodes = [1]
    for b, block in enumerate(model.blocks):
        name = f'blocks.{b}'
        if name in parts or block.state_dict():
            nodes.append(len(parts[name]))
        else:  # a block without weights, of poolings
            last = replicated and b == len(model.nodes) - 1
            nodes.append(len({key.split('.')[1] for key in weights if key.startswith('heads.')}) if last else nodes[-1])
    members = 1 if replicated else nodes[-1]
    num_classes, rest = divmod(len(weights[classifier]), members)
    if rest:
        raise ValueError(f'{classifier} has {rest} rows more than {members} members with {num_classes} classes have.')
    sizes = {'nodes': tuple(nodes[1:]), 'num_classes': num_classes}
    stem = next((f'{name}.weight' for name in as_names(model.pretrained_cfg['first_conv'])), None)
    if stem is not None and weights[stem].dim() == 4:
        sizes['in_chans'] = weights[stem].shape[1] * model.in_chans // model.state_dict()[stem].shape[1]
    return sizes


def node_weights(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return the weights of every node of every part of a model, as many nodes as the weights have.

    Args:
        weights: Tensors by their names.
        model: Any `hne_*` model, with any number of nodes, also on the meta device.

    Returns:
        A dict of tensors for each node, by the name of the part. A part that has no weights is left out.

    Raises:
        ValueError: The tensors of a part are not those of a whole number of nodes.
    """
    nodes = {}
    for name, part in model.parts().items():
        found = {key.removeprefix(f'{name}.'): w for key, w in weights.items() if key.startswith(f'{name}.')}
        try:
            if found:
                nodes[name] = part.split_state(found)
        except ValueError as error:
            raise ValueError(f'The weights are not those of this model: in {name} {error}') from error
    return nodes


def _nodes_of(stored: Mapping[str, int], nodes: Sequence[int]) -> tuple[int, ...]:
    """Return how many nodes each block has by the `stored` numbers of parts.

    A block of poolings has no weights: it has as many as `nodes` says, and the last as many as there are heads.
    """
    *rest, last = (stored.get(f'blocks.{b}', count) for b, count in enumerate(nodes))
    return *rest, stored.get(f'blocks.{len(rest)}', stored.get('heads', last))


def load_grown(
        model: nn.Module, weights: Mapping[str, torch.Tensor], noise: float = NOISE, seed: int = 0) -> None:
    """Load weights of the same architecture, classes and images: of the same tree, or of a smaller or a larger one.

    Args:
        model: Any `hne_*` model.
        weights: Tensors by their names; see `fit_weights`.
        noise: Standard deviation of the noise of copies, relative to the root mean square of a tensor.
        seed: Seed of the noise.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
        ValueError: They are those of another model, or of a tree from which the model's cannot grow.
    """
    check_tree(model, itself=True)
    own = PretrainedCfg(num_classes=model.num_classes, input_size=(model.in_chans, 0, 0))
    model.load_state_dict(fit_weights(dict(weights), model, own, noise, seed))


def fit_weights(
        weights: dict[str, torch.Tensor],
        model: nn.Module,
        cfg: PretrainedCfg,
        noise: float = NOISE,
        seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Return weights for every node of a model from a checkpoint of the same architecture.

    The nodes may be the same, or fewer than the checkpoint has, the first of each block; or more, then those of the
    checkpoint are replicated, with noise. Weights of the base of `hne_from_timm` are those of a tree with one member.
    The classifier and the first convolution are left to timm where the numbers of classes or channels differ.

    Args:
        weights: Tensors by their names.
        model: Any `hne_*` model, also on the meta device.
        cfg: Configuration of the weights.
        noise: Standard deviation of the noise of copies, relative to the root mean square of a tensor.
        seed: Seed of the noise.

    Raises:
        ValueError: The weights are those of another model, or of a tree that does not begin with the model's and from
            which the model's cannot grow.
    """
    target = model.state_dict()
    left_out = set()
    if model.num_classes != cfg.num_classes:
        left_out = {f'{name}.{kind}' for name in model.classifier_names for kind in ('weight', 'bias')}
    # Weights of more members have classifiers that the model has not.
    classifiers = {_any_node(name) for name in left_out}

    weights = _of_members(weights, model)
    wanted = {name: tensor for name, tensor in weights.items() if _any_node(name) not in classifiers}
    stored = node_weights(wanted, model)
    parts = model.parts()
    stored_nodes = {name: len(nodes) for name, nodes in stored.items()}
    nodes = _nodes_of(stored_nodes, model.nodes)
    heads = {name: count for name, count in stored_nodes.items() if name in model.head_parts()}
    whole = all(count == nodes[-1] for count in heads.values())
    grows = nodes != model.nodes and all(not count % own for own, count in zip(nodes, model.nodes))
    if whole and grows:
        stored = grow_weights(stored, model, noise, seed)

    # What belongs to no part is fitted as it is.
    prefixes = tuple(f'{name}.' for name in parts)
    fitted = {name: tensor for name, tensor in wanted.items() if not name.startswith(prefixes)}
    for name, held in stored.items():
        joined = parts[name].join_state(held[:parts[name].nodes])
        fitted.update({f'{name}.{key}': tensor for key, tensor in joined.items()})

    missing, unexpected = target.keys() - fitted.keys() - left_out, fitted.keys() - target.keys()
    fewer = any(map(int.__lt__, nodes, model.nodes))
    if fewer and missing and all(name.startswith(('blocks.', 'heads.')) for name in missing):
        missing = set()  # of nodes, which is said below
    if missing or unexpected:
        raise ValueError(
            f'The weights are not those of this model: missing tensors {_some(missing)}, unexpected ones '
            f'{_some(unexpected)}.')
    if not whole or not (grows or _is_prefix(model.nodes, nodes)):
        raise ValueError(
            f'The weights were trained with nodes={nodes}{f" and heads {heads}" if heads else ""}, the model has '
            f'nodes={model.nodes}. Only the same tree, a prefix of it, or one with a multiple of the nodes of every '
            'block can take them.')
    stems = {f'{name}.weight' for name in as_names(cfg.first_conv)}
    if not all(name.startswith('blocks.0.') for name in stems):
        raise ValueError(f'first_conv must be in the first block, got {cfg.first_conv!r}.')
    wrong = []
    for name, tensor in fitted.items():
        shape = target[name].shape
        if name in stems and len(shape) == 4:  # some take the pixels of a patch as channels
            shape = torch.Size((shape[0], shape[1] * cfg.input_size[0] // model.in_chans, *shape[2:]))
        if tensor.shape != shape or tensor.is_floating_point() != target[name].is_floating_point():
            wrong.append(
                f'{name} {tensor.dtype} {tuple(tensor.shape)} instead of {target[name].dtype} {tuple(shape)}')
    if wrong:
        raise ValueError(f'The weights are not those of this model: {_some(wrong)}.')
    return fitted


def as_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _of_members(weights: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a base as those of a tree with one member, and others as they are."""
    names = getattr(model, 'base_names', {})
    return {names[name]: tensor for name, tensor in weights.items()} if weights.keys() <= names.keys() else weights


def _any_node(name: str) -> str:
    """Return the name of a tensor of one member's head without the number of the member."""
    return re.sub(r'^heads\.\d+\.', 'heads.*.', name)


def _some(names) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '') or 'none'
