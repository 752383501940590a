"""Any timm model as a hierarchical ensemble: its own stages are the blocks of the tree, its own head is each member's.

`hne_from_timm` makes such an ensemble by the name of the model.
"""
import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import timm
import torch
import torch.fx
import torch.nn as nn
from timm.layers import get_notrace_functions
from timm.models._input import _get_global_pool

from ..checks import check_integer, check_number
from ..tree import MAX_NODES, validate_nodes
from .cut import CutHead, CutModel, check_model, cut_model
from .grow import NOISE, grow_weights
from .replicated import ReplicatedBlock, ReplicatedEnsemble
from .weights import SOURCES, as_names, node_weights

__all__ = ['HNEFromTimm', 'default_nodes', 'hierarchize']

INITS = ('copy', 'perturb', 'fresh')


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
        check_integer('ensemble_size', ensemble_size, 1, MAX_NODES)
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
        self._classifiers = as_names(cfg.get('classifier'))
        stems = [f'blocks.0.{node}.{stem}' for node in range(self.nodes[0]) for stem in as_names(cfg.get('first_conv'))]
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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self._model_args = {**self._model_args, **self.model_args}

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of the members' classifiers."""
        if not self._classifiers:
            return super().classifier_names
        return tuple(f'heads.{member}.{name}' for member in range(self.nodes[-1]) for name in self._classifiers)

    @property
    def base_names(self) -> dict[str, str]:
        """The name that each tensor of the base has in a tree with one member."""
        return {key: f'{name}.0.{key}' for name, part in self.parts().items() for key in part[0].state_dict()}

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments by which `timm.create_model('hne_from_timm', ...)` makes such a model, weights aside."""
        own = ('num_classes', 'in_chans', 'img_size', 'num_members', 'global_pool')
        args = dict(base=self.base, nodes=list(self.nodes), taps=list(self.taps))
        pool = _get_global_pool(self.heads[0]) if self.poolings else ''
        if pool is not None:
            args['global_pool'] = pool
        base_args = {
            key: value for key, value in self.base_args.items() if key not in own and not key.endswith('drop_rate')}
        return {**args, 'base_args': base_args} if base_args else args

    def _perturb(self, noise: float, seed: int) -> None:
        """Add noise to all nodes that have an elder sibling."""
        one_each = {name: nodes[:1] for name, nodes in node_weights(self.state_dict(), self).items()}
        parts = self.parts()
        for name, nodes in grow_weights(one_each, self, noise, seed).items():
            parts[name].load_state_dict(parts[name].join_state(nodes))

    def _renew(self, model: nn.Module, seed: int) -> None:
        """Give all nodes but the first of each block the weights of a new base."""
        args = {**self.base_args, 'num_classes': self.num_classes, 'in_chans': self.in_chans}
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for node in range(1, self.nodes[-1]):
            with torch.random.fork_rng(devices=[]), torch.device('cpu'):
                # Not `torch.manual_seed`, which would seed the generators of GPUs too, for good.
                torch.random.default_generator.manual_seed(zlib.crc32(f'{seed} {node}'.encode()))
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

    def __prepare_scriptable__(self) -> torch.fx.GraphModule:
        """Return what TorchScript compiles, as it cannot compile a list of features: the modules of the base in a row.

        It evaluates `self.num_members` members.
        """
        graph = _ScriptTracer(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True).trace(self)
        graph.erase_node(next(node for node in graph.nodes if node.target == 'num_members'))
        module = torch.fx.GraphModule(self, graph)
        module.ensemble_size = self.ensemble_size  # by which a scripted ensemble is known
        return module

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimizer must not decay: those of the base."""
        names = {  # those in the base, by ours
            name: name.split('.', 3 if name.startswith('blocks.') else 2)[-1] for name, _ in self.named_parameters()}
        return {name for name, own in names.items() if any(fnmatch(own, pattern) for pattern in self._no_weight_decay)}


class _ScriptTracer(torch.fx.Tracer):
    """Traces what is ours; a module of the base is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (ReplicatedBlock, CutHead, torch.fx.GraphModule))


def _copies(module: nn.Module, count: int) -> list[nn.Module]:
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


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
