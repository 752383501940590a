"""`timm.create_model('hne_from_timm', base='resnet50', nodes=(1, 1, 2, 4, 8), pretrained=True)`: see `from_timm`."""
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.models import PretrainedCfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._input import get_model_input_config

from ..tree import validate_nodes
from .from_timm import HNEFromTimm
from .grow import NOISE
from .weights import SOURCES, as_names, build_model

__all__ = ['hne_from_timm']


def from_name(
        base: str = 'resnet18',
        nodes: Sequence[int] | None = None,
        ensemble_size: int = 8,
        taps: int | Sequence[str] | None = None,
        init: str | None = None,
        noise: float = NOISE,
        seed: int = 0,
        base_args: Mapping[str, Any] | None = None,
        base_pretrained: bool = False,
        num_classes: int | None = None,
        in_chans: int = 3,
        num_members: int | None = None,
        global_pool: str | None = None,
        drop_rate: float = 0.,
        drop_path_rate: float | None = None,
        img_size: int | Sequence[int] | None = None,
        cache_dir: str | None = None,
        device=None,
        dtype=None,
) -> HNEFromTimm:
    """Create a base by its name and turn it into an ensemble.

    Args:
        base: timm's name of the base, with or without a tag.
        init: As for `hierarchize`; 'perturb' with pretrained weights and 'fresh' without if None.
        base_args: Further arguments of the base.
        base_pretrained: Start from the base's own weights.

    The other arguments are those of `hierarchize` and of timm's models.
    """
    check_base(base)
    if not _base_cfg(base).fixed_input_size:
        img_size = None  # images of any size, as the model's cfg says
    given = dict(global_pool=global_pool, drop_path_rate=drop_path_rate, img_size=img_size, device=device, dtype=dtype)
    base_args = _check_base_args(base_args, {*given, 'num_classes', 'in_chans', 'drop_rate', 'cache_dir'})
    pooled = global_pool != ''
    given = {key: value for key, value in given.items() if value not in (None, '')}
    model = timm.create_model(
        base,
        pretrained=base_pretrained,
        num_classes=1 if num_classes == 0 else num_classes,  # a base must have a classifier
        in_chans=in_chans,
        drop_rate=drop_rate or None,
        cache_dir=cache_dir,
        **given,
        **base_args,
    )
    if init is None:
        init = 'perturb' if base_pretrained else 'fresh'
    kept = {key: value for key, value in given.items() if key not in ('device', 'dtype')}
    ensemble = HNEFromTimm(
        model, nodes, ensemble_size, taps, init, noise, seed, num_members, {**base_args, **kept}, base)
    if num_classes == 0 or not pooled:
        ensemble.reset_classifier(ensemble.num_classes if num_classes else 0, None if pooled else '')
    return ensemble


def check_base(base: str) -> None:
    """Raise an error unless `base` names a model of timm that is no ensemble already.

    Raises:
        TypeError: It is no name.
        ValueError: There is no such model, or it is an `hne_*` model.
    """
    if not isinstance(base, str):
        raise TypeError(f"base must name a timm model, such as 'resnet50', got {base!r}.")
    if ':' in base or not timm.is_model(base):
        raise ValueError(
            f"base must name a timm model, such as 'resnet50', got {base!r}; timm.list_models() has them all, and "
            'timm_hne.hierarchize takes any instance.')
    if base.startswith('hne_'):
        raise ValueError(f'base must be no hierarchical ensemble already, got {base!r}.')


def _check_base_args(base_args: Mapping[str, Any] | None, taken: set[str]) -> dict[str, Any]:
    if base_args is not None and not isinstance(base_args, Mapping):
        raise TypeError(f'base_args must be names and values, got {base_args!r}.')
    base_args = dict(base_args or {})
    # A config.json, which anybody may have written, must not name weights to fetch or files to open.
    refused = sorted(
        name for name in base_args
        if name in taken or name.startswith(('pretrained', 'checkpoint', 'features_only', 'device', 'dtype')))
    if refused:
        raise ValueError(f'base_args must not hold {", ".join(refused)}: they are arguments of their own.')
    return base_args


default_cfgs = generate_default_cfgs({
    # What timm's scripts ask for before the base is known; the model has the cfg of its base. 'fixed_input_size' makes
    # the scripts pass on --img-size.
    'hne_from_timm': dict(num_classes=1000, input_size=(3, 224, 224), fixed_input_size=True),
})


@register_model
def hne_from_timm(
        pretrained: bool = False,
        pretrained_cfg: str | dict | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict | None = None,
        base: str = 'resnet18',
        cache_dir: str | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        feature_cls: str = 'getter',
        **kwargs,
) -> HNEFromTimm:
    """Hierarchical ensemble of the stages of any timm model, `base`; see `timm_hne.hierarchize`.

    With `pretrained`, all members start from the base's own weights, through timm; or from those of an ensemble that
    was published or that the overlay names.
    """
    check_base(base)
    if 'base_pretrained' in kwargs:
        raise TypeError('pretrained says whether to take the weights of the base, not base_pretrained.')
    overlay = dict(pretrained_cfg_overlay or {})
    if isinstance(pretrained_cfg, str):
        raise ValueError(f'hne_from_timm has no weights of its own, got the tag {pretrained_cfg!r}; base takes a tag.')
    cfg = PretrainedCfg(**pretrained_cfg) if isinstance(pretrained_cfg, dict) else pretrained_cfg
    if cfg is None or cfg.source not in ('hf-hub', 'local-dir'):
        given = {} if cfg is None else vars(cfg)
        if isinstance(pretrained_cfg, dict):
            given = {key: given[key] for key in pretrained_cfg}
        if 'architecture' in given:  # timm's scripts pass what is registered below, with what an overlay changes
            registered = vars(get_pretrained_cfg('hne_from_timm'))
            given = {key: value for key, value in given.items() if value != registered[key]}
        if kwargs.get('nodes') is not None:
            validate_nodes(kwargs['nodes'])
        cfg = replace(_cfg_of(base, kwargs.get('nodes')), **given)
        if not cfg.num_classes and 'num_classes' not in kwargs:
            raise ValueError(f'base {base} has no classifier, num_classes must be given.')
    if kwargs.get('img_size') is not None:
        size = kwargs['img_size']
        size = (size, size) if isinstance(size, int) else tuple(size)
        overlay['input_size'] = (kwargs.get('in_chans', cfg.input_size[0]), *size)
    of_ensemble = pretrained and any(getattr(cfg, key) or overlay.get(key) for key in SOURCES)
    if of_ensemble:
        kwargs['init'] = 'copy'  # all weights are replaced
    for name in ('noise', 'seed'):
        if f'grow_{name}' in kwargs:  # as the other models call it
            kwargs.setdefault(name, kwargs.pop(f'grow_{name}'))
    create = functools.partial(
        from_name, base_pretrained=pretrained and not of_ensemble, cache_dir=None if of_ensemble else cache_dir)
    if features_only:
        if feature_cls != 'getter':
            raise ValueError(f"feature_cls must be 'getter' for hne_from_timm, got {feature_cls!r}.")
        if out_indices is None:
            probe = {key: value for key, value in kwargs.items() if key != 'pretrained_model_args'}
            out_indices = range(len(from_name(base, **{**probe, 'device': 'meta'}).blocks))
        kwargs.update(features_only=True, out_indices=out_indices, feature_cls='getter')
    model = build_model(
        create, 'hne_from_timm', of_ensemble, cfg, overlay, cache_dir, kwargs.get('noise', NOISE),
        kwargs.get('seed', 0), base=base, **kwargs)
    if isinstance(model, HNEFromTimm):
        model.pretrained_cfg.update(model.own_names, input_size=get_model_input_config(model)['input_size'])
    return model


def _base_cfg(base: str) -> PretrainedCfg:
    return get_pretrained_cfg(base) or PretrainedCfg()


def _cfg_of(base: str, nodes: Sequence[int] | None) -> PretrainedCfg:
    """Return the cfg of a base without its weights, with the names that modules have in an ensemble."""
    cfg = _base_cfg(base)
    stems = [f'blocks.0.{node}.{stem}' for node in range((nodes or (1,))[0]) for stem in as_names(cfg.first_conv)]
    empty = dict.fromkeys((*SOURCES, 'source', 'tag', 'hf_hub_filename', 'label_offset'))
    return replace(cfg, **empty, architecture='hne_from_timm', custom_load=False, first_conv=tuple(stems) or None)
