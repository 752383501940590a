"""Any timm model as a hierarchical ensemble: its own stages are the blocks of the tree, its own head is each member's.

    timm_hne.hierarchize(model, nodes=(1, 1, 2, 4, 8))                                   # a model that there is
    timm.create_model('hne_from_timm', base='resnet50', nodes=(1, 1, 2, 4, 8), pretrained=True)   # by name
"""
import copy
import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import PretrainedCfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._input import _get_global_pool, get_model_input_config

from ..checks import check_integer, check_number
from ..tree import validate_nodes
from .cut import CutModel, check_model, cut_model
from .replicated import ReplicatedBlock, ReplicatedEnsemble
from .weights import NOISE, build_model, grow_weights, node_weights

__all__ = ['HNEFromTimm', 'default_nodes', 'hierarchize']

INITS = ('copy', 'perturb', 'fresh')
# Where weights come from, in a cfg.
SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


def default_nodes(num_blocks: int, ensemble_size: int = 8) -> tuple[int, ...]:
    """Return a tree that shares the first half of its blocks and then branches evenly: (1, 1, 2, 4, 8) for 5 blocks.

    Args:
        num_blocks: Number of blocks.
        ensemble_size: Number of members.
    """
    shared = num_blocks // 2
    nodes = [1] * shared
    for b in range(shared, num_blocks):
        most = ensemble_size ** ((b + 1 - shared) / (num_blocks - shared)) + 1e-9
        parents = nodes[-1] if nodes else 1
        nodes.append(max(
            count for count in range(parents, ensemble_size + 1)
            if not ensemble_size % count and not count % parents and (count <= most or count == parents)))
    return tuple(nodes)


class HNEFromTimm(ReplicatedEnsemble):
    """A tree of the stages of a timm model.

    Args:
        model: The base. It stays as it is.
        nodes: Number of nodes of each block; `default_nodes` if None.
        ensemble_size: Number of members if `nodes` is None.
        taps: Names of the modules that end a block, or the number of blocks; see `cut_model`.
        init: How nodes start that are not on the path of the first member: 'copy' of that path, 'perturb' for a copy
            with noise, 'fresh' for new weights.
        noise: Standard deviation of the noise, relative to the root mean square of each tensor.
        seed: Seed of noise and new weights.
        num_members: Number of members evaluated unless the call says otherwise; all if None.
        base_args: Arguments that `timm.create_model` made the base with, if the base does not know them.
        base: Name of the base; the one that timm gave it if None.

    Attributes:
        base: Name of the base.
        taps: The module of the base that ends each block.

    The first member computes exactly what the base does, whatever `init` is.

    Raises:
        TypeError: `model` is no timm model, or another argument is of a wrong type.
        ValueError: `model` cannot become an ensemble (see `cut_model`), or an argument is out of range.
    """

    def __init__(
            self,
            model: nn.Module,
            nodes: Sequence[int] | None = None,
            ensemble_size: int = 8,
            taps: int | Sequence[str] | None = None,
            init: str = 'perturb',
            noise: float = NOISE,
            seed: int = 0,
            num_members: int | None = None,
            base_args: Mapping[str, Any] | None = None,
            base: str | None = None,
    ):
        name = check_model(model)
        if init not in INITS:
            raise ValueError(f'init must be one of {", ".join(INITS)}, got {init!r}.')
        check_number('noise', noise, 0)
        check_integer('seed', seed, 0)
        check_integer('ensemble_size', ensemble_size, 1)
        if nodes is not None:
            validate_nodes(nodes)
        cut = cut_model(model, taps)
        if nodes is None:
            nodes = default_nodes(len(cut.blocks), ensemble_size)
        elif len(nodes) != len(cut.blocks):
            raise ValueError(
                f'nodes must have {len(cut.blocks)} entries for {name}, one for each of the blocks that end with '
                f'{", ".join(cut.taps)}, got {tuple(nodes)}; taps chooses other blocks.')
        nodes = tuple(nodes)
        super().__init__(
            [
                ReplicatedBlock(_copies(block, count), parents, channels, axis, main)
                for block, count, parents, channels, axis, main in zip(
                    cut.blocks, nodes, (1, *nodes), cut.out_channels, cut.channel_axes, cut.main)
            ],
            cut.reductions,
            _copies(cut.head, nodes[-1]),
            model.num_classes,
            cut.head.head_hidden_size,
            cut.input_size[0],
            num_members,
        )
        for module in (self, self.blocks, *self.blocks, self.heads):
            module.training = model.training
        self.base = base or name
        self.taps = cut.taps
        self.base_args = dict(getattr(model, '_model_args', {}) if base_args is None else base_args)
        self._describe(model, cut)
        if next(self.parameters()).is_meta:
            return
        if init == 'perturb':
            self._perturb(noise, seed)
        elif init == 'fresh':
            self._renew(model, seed)

    def _describe(self, model: nn.Module, cut: CutModel) -> None:
        """Take over what timm knows of the base."""
        cfg = copy.deepcopy(model.pretrained_cfg)
        cfg = dict(cfg if isinstance(cfg, dict) else asdict(cfg))
        for key in (*SOURCES, 'source', 'tag', 'hf_hub_filename', 'custom_load', 'label_offset'):
            cfg.pop(key, None)
        self._classifiers = _names(cfg.get('classifier'))
        stems = [f'blocks.0.{node}.{stem}' for node in range(self.nodes[0]) for stem in _names(cfg.get('first_conv'))]
        self.own_names = dict(
            first_conv=stems[0] if len(stems) == 1 else tuple(stems) or None,
            classifier=self.classifier_names,
        )
        cfg.update(
            self.own_names, architecture='hne_from_timm', input_size=cut.input_size, num_classes=self.num_classes)
        self.pretrained_cfg = self.default_cfg = cfg
        self._traits = {**getattr(model, '_traits', {}), 'first_conv': cfg['first_conv']}
        # As if timm had made it by its name
        self._model_args = self.model_args
        self._no_weight_decay = frozenset(getattr(model, 'no_weight_decay', set)())

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the members' classifiers."""
        if not self._classifiers:
            return super().classifier_names
        return tuple(f'heads.{member}.{name}' for member in range(self.nodes[-1]) for name in self._classifiers)

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments by which `timm.create_model('hne_from_timm', ...)` makes such a model, weights aside."""
        own = ('num_classes', 'in_chans', 'img_size', 'num_members', 'global_pool')
        args = dict(base=self.base, nodes=list(self.nodes), taps=list(self.taps))
        pool = _get_global_pool(self.heads[0])
        if pool is not None and 'global_pool' in self.base_args:
            args['global_pool'] = pool
        base_args = {
            key: value for key, value in self.base_args.items() if key not in own and not key.endswith('drop_rate')}
        return {**args, 'base_args': base_args} if base_args else args

    def _perturb(self, noise: float, seed: int) -> None:
        """Add noise to all nodes but the first of each block."""
        one_each = {name: nodes[:1] for name, nodes in node_weights(self.state_dict(), self).items()}
        parts = self.parts()
        for name, nodes in grow_weights(one_each, self, noise, seed).items():
            parts[name].load_state_dict(parts[name].join_state(nodes))

    def _renew(self, model: nn.Module, seed: int) -> None:
        """Give all nodes but the first of each block the weights of a new base."""
        args = {**self.base_args, 'num_classes': self.num_classes, 'in_chans': self.in_chans}
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for node in range(1, self.nodes[-1]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f'{seed} {node}'.encode()))
                try:
                    fresh = timm.create_model(self.base, pretrained=False, **args).state_dict()
                except Exception as error:
                    raise ValueError(f"init='fresh' needs a base that timm can make again: {error}") from error
            if {name: tensor.shape for name, tensor in fresh.items()} != expected:
                raise ValueError(
                    f"init='fresh' needs a base that timm can make again, but timm.create_model({self.base!r}, "
                    f'**{args}) makes another one; say the arguments with base_args.')
            for part in (*self.blocks, self.heads):
                if node < part.nodes:
                    part[node].load_state_dict({name: fresh[name] for name in part[node].state_dict()})

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay: those of the base."""
        return {
            name for name, _ in self.named_parameters()
            if name.split('.', 3 if name.startswith('blocks.') else 2)[-1] in self._no_weight_decay
        }


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def hierarchize(
        model: nn.Module,
        nodes: Sequence[int] | None = None,
        ensemble_size: int = 8,
        taps: int | Sequence[str] | None = None,
        init: str = 'perturb',
        seed: int = 0,
        noise: float = NOISE,
        base_args: Mapping[str, Any] | None = None,
) -> HNEFromTimm:
    """Turn a timm model into a hierarchical ensemble whose first member is that model.

    Args:
        model: Any timm model with a classifier. It stays as it is, and shares no memory with the result.
        nodes: Number of nodes of each block; if None, the first half of the blocks is shared and the others branch.
        ensemble_size: Number of members if `nodes` is None.
        taps: Names of the modules that end a block, or the number of blocks; the model's own stages if None.
        init: How nodes start that are not on the path of the first member: 'copy' of that path, 'perturb' for a copy
            with noise, 'fresh' for new weights. Copies without noise get the same gradients and never part.
        seed: Seed of noise and new weights.
        noise: Standard deviation of the noise, relative to the root mean square of each tensor.
        base_args: Arguments that `timm.create_model` made the model with, if the model does not know them.

    Raises:
        TypeError: `model` is no timm model, or another argument is of a wrong type.
        ValueError: `model` is an ensemble already, has no classifier or several inputs or cannot be cut there, or an
            argument is out of range.
    """
    return HNEFromTimm(model, nodes, ensemble_size, taps, init, noise, seed, base_args=base_args)


# By name


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
    given = dict(global_pool=global_pool, drop_path_rate=drop_path_rate, img_size=img_size, device=device, dtype=dtype)
    given = {key: value for key, value in given.items() if value is not None}
    base_args = _check_base_args(base_args, {*given, 'num_classes', 'in_chans', 'drop_rate', 'cache_dir'})
    features_alone = num_classes == 0
    model = timm.create_model(
        base,
        pretrained=base_pretrained,
        num_classes=1 if features_alone else num_classes,
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
    if features_alone:
        ensemble.reset_classifier(0)
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
    published = cfg is not None and any(getattr(cfg, key) for key in SOURCES)
    if not published:  # timm's scripts pass the cfg below
        cfg = _cfg_of(base, kwargs.get('nodes'))
        if not cfg.num_classes and 'num_classes' not in kwargs:
            raise ValueError(f'base {base} has no classifier, num_classes must be given.')
    if 'img_size' in kwargs and not cfg.fixed_input_size:
        size = kwargs.pop('img_size')
        size = (size, size) if isinstance(size, int) else tuple(size)
        overlay['input_size'] = (kwargs.get('in_chans', cfg.input_size[0]), *size)
    of_ensemble = pretrained and (published or any(overlay.get(key) for key in SOURCES))
    if of_ensemble:
        kwargs['init'] = 'copy'  # all weights are replaced
    create = functools.partial(
        from_name, base_pretrained=pretrained and not of_ensemble, cache_dir=None if of_ensemble else cache_dir)
    feature_cfg = dict(feature_cls='getter')
    if kwargs.get('features_only'):
        probe = {**kwargs, 'device': 'meta'}
        probe.pop('features_only'), probe.pop('out_indices', None), probe.pop('pretrained_model_args', None)
        feature_cfg['out_indices'] = tuple(range(len(from_name(base, **probe).blocks)))
    model = build_model(
        create, 'hne_from_timm', of_ensemble, cfg, overlay, cache_dir, base=base, feature_cfg=feature_cfg, **kwargs)
    if isinstance(model, HNEFromTimm):
        model.pretrained_cfg.update(model.own_names, input_size=get_model_input_config(model)['input_size'])
    return model


def _cfg_of(base: str, nodes: Sequence[int] | None) -> PretrainedCfg:
    """Return the cfg of a base without its weights, with the names that modules have in an ensemble."""
    cfg = get_pretrained_cfg(base) or PretrainedCfg()
    stems = [f'blocks.0.{node}.{stem}' for node in range((nodes or (1,))[0]) for stem in _names(cfg.first_conv)]
    empty = dict.fromkeys((*SOURCES, 'source', 'tag', 'hf_hub_filename', 'label_offset'))
    return replace(cfg, **empty, architecture='hne_from_timm', custom_load=False, first_conv=tuple(stems) or None)
