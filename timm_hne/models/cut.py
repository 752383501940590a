"""A timm model, cut at its own stages into a chain of modules.

`forward_features` is traced by torch.fx, only as deep as the cuts lie: a stage without a cut inside stays the module
that it is, so its own code decides what it does in training and which image sizes it takes. The head is the model
itself without the modules that went into the chain: `forward_head` and `reset_classifier` are the model's own.

Every tensor that crosses a cut has the images along its first dimension, whatever the model does in between:

    in the model                                            across the cut
    a tensor (B, ...)                                       itself
    a tensor (B * k, ...), of k windows an image, say       (B, k, ...)
    a tensor for all images, as a position embedding        (B, ...), the same for every image
    numbers that follow from the size of the images         the shape of an empty tensor (B, 0, number, number, ...)
"""
import copy
import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .cut_graph import CutError, Layout, StageGraph
from .cut_trace import ShapesOnly

__all__ = ['CutModel', 'cut_model']

METHODS = ('forward_features', 'forward_head', 'get_classifier', 'reset_classifier')


@dataclass(frozen=True)
class CutModel:
    """A timm model as a chain of modules.

    Attributes:
        name: Name of the model.
        blocks: `blocks[0]` takes images `(B, C, H, W)`, the others what the one before returns: a tensor, or a tuple
            of tensors. The images lie along the first dimension of each. A block does not change its input.
        head: `head(x, pre_logits=False)` maps what the last block returns to logits; `reset_classifier` and
            `get_classifier` are those of the model.
        taps: The module that ends each block. The last block also has what follows its tap.
        out_channels: Channels of the features of each block.
        reductions: Image size over feature map size, for each block.
        channel_axes: Dimension of the channels, for each block.
        main: Which tensor of the features the two lines above are about, for each block; None where they are one.
        input_size: Channels, height and width of the images that the model was compared with its parts on.
    """
    name: str
    blocks: tuple[nn.Module, ...]
    head: nn.Module
    taps: tuple[str, ...]
    out_channels: tuple[int, ...]
    reductions: tuple[int, ...]
    channel_axes: tuple[int, ...]
    main: tuple[int | None, ...]
    input_size: tuple[int, int, int]


@torch.inference_mode(False)  # whose tensors do not count how often they are written to
def cut_model(
        model: nn.Module,
        taps: int | Sequence[str] | None = None,
) -> CutModel:
    """Cut a timm model into a chain of blocks and a head.

    The parts own a copy of the model's parameters and buffers, under their names in the model, each in one part. They
    are compared with the model on two random images (on the meta device, their shapes only).

    Args:
        model: Any timm model with a classifier. It stays as it is.
        taps: Names of the modules that end a block, in the order of their execution, or the number of blocks. The
            stages of the model's `feature_info` if None, four quarters if these have one resolution.

    Raises:
        TypeError: `model` is no timm model, or `taps` is neither a number nor names.
        ValueError: `model` is a hierarchical ensemble, has no classifier or several inputs, or cannot be cut there.
        RuntimeError: The parts do not compute what the model does.
    """
    name = check_model(model)
    meta = copy_to_meta(model)
    if hasattr(meta, 'set_grad_checkpointing'):
        meta.set_grad_checkpointing(False)
    size = find_input_size(meta, name)
    names, fixed = choose_taps(meta, name, taps)
    graph = _trace(meta, name, names, size)
    if not fixed:
        simpler = graph.simplify(names)
        if len(simpler) < 2:
            raise ValueError(f'{name} executes no two of {names}; say with taps which modules end a block.')
        if simpler != names:
            names, graph = simpler, _trace(meta, name, simpler, size)

    own = copy.deepcopy(model, _without_checkpoint(model))
    if hasattr(own, 'set_grad_checkpointing'):  # the ensemble's blocks have a switch of their own
        own.set_grad_checkpointing(False)
    try:
        blocks, layouts = graph.split(own, _cuts(graph, name, names))
    except CutError as error:
        raise ValueError(f'{name} cannot be cut behind {", ".join(names)}: {error}.') from error
    head = make_head(own, blocks, layouts[-1])
    modes = {key: module.training for key, module in model.named_modules()}
    for part in (*blocks, head):
        for key, module in part.named_modules():
            module.training = modes.get(key, model.training)
    _check_ownership(model, name, names, (*blocks, head))
    parts = _describe(model, names, layouts, size)
    chain = CutModel(name, tuple(blocks), head, tuple(names), *parts, size)
    _verify(model, chain)
    return chain


# What can be cut, and where


def check_model(model: nn.Module) -> str:
    """Return the name of a timm model that can become an ensemble.

    Raises:
        TypeError: It is no timm model.
        ValueError: It is an ensemble already, has no classifier, or takes more than images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a timm model (an instance, as of timm.create_model), got {model!r}.')
    missing = [method for method in METHODS if not callable(getattr(model, method, None))]
    if missing or getattr(model, 'pretrained_cfg', None) is None:
        raise TypeError(
            f'model must be a timm model with a classifier, got {type(model).__name__} without '
            f'{", ".join(missing or ["pretrained_cfg"])}.')
    cfg = model.pretrained_cfg
    name = (cfg.get('architecture') if isinstance(cfg, dict) else getattr(cfg, 'architecture', None)) or ''
    name = name or type(model).__name__
    if hasattr(model, 'forward_members'):
        raise ValueError(f'model must be no hierarchical ensemble already, got {name}.')
    if getattr(model, 'num_classes', 0) < 1:
        raise ValueError(
            f'model must have a classifier, got {name} with num_classes={getattr(model, "num_classes", 0)}; create it '
            'with a num_classes of at least 1.')
    for method in (model.forward, model.forward_features):
        inputs = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        if len(inputs) != 1:
            raise ValueError(f'model must take images alone, {name} takes {", ".join(inputs)}.')
    return name


def choose_taps(model: nn.Module, name: str, taps: int | Sequence[str] | None) -> tuple[list[str], bool]:
    """Return the names of the modules that end the blocks, and whether they were asked for by name."""
    modules = dict(model.named_modules())
    if taps is not None and not isinstance(taps, int):
        if isinstance(taps, str) or not isinstance(taps, Sequence) or not all(isinstance(tap, str) for tap in taps):
            raise TypeError(f'taps must be names of modules or the number of blocks, got {taps!r}.')
        taps = list(taps)
        unknown = [tap for tap in taps if not tap or tap not in modules]
        if unknown or len(set(taps)) < len(taps):
            raise ValueError(
                f'taps={taps} do not fit {name}: {unknown or "a name stands twice"}. Its stages are '
                f'{_stages(model)[0]}.')
        if len(taps) < 2:
            raise ValueError(f'taps must end at least 2 blocks, got {taps}. The stages of {name}: {_stages(model)[0]}.')
        return taps, True
    stages, isotropic = _stages(model)
    if taps is None:
        taps = min(4, len(stages)) if isotropic else len(stages)
    elif isinstance(taps, bool) or not 2 <= taps <= len(stages):
        raise ValueError(f'taps must be from 2 to {len(stages)} blocks for {name}, got {taps}. Its stages: {stages}.')
    if taps < 2:
        raise ValueError(f'{name} names no two stages to cut at (feature_info: {stages}); say where with taps.')
    return [stages[-(-len(stages) * (i + 1) // taps) - 1] for i in range(taps)], False


def _stages(model: nn.Module) -> tuple[list[str], bool]:
    """Return the modules after which `feature_info` takes features, and whether all have one resolution."""
    modules = dict(model.named_modules())
    stages, reductions = [], set()
    for info in getattr(model, 'feature_info', None) or ():
        info = dict(info)
        tap = info.get('module') or ''
        if tap not in modules:  # the name within an inner model
            found = [module for module in modules if tap and module.endswith(f'.{tap}')]
            tap = found[0] if len(found) == 1 else ''
        if tap and tap not in stages:
            stages.append(tap)
            reductions.add(info.get('reduction'))
    if len(stages) < 2:
        for container in ('stages', 'layers', 'blocks'):
            children = list(modules[container].named_children()) if container in modules else []
            if len(children) > 1:
                return [f'{container}.{child}' for child, _ in children], False
    return stages, len(reductions) == 1


def find_input_size(meta: nn.Module, name: str) -> tuple[int, int, int]:
    """Return channels, height and width of images that the model takes, `meta` being on the meta device."""
    cfg = meta.pretrained_cfg if isinstance(meta.pretrained_cfg, dict) else vars(meta.pretrained_cfg)
    stated = cfg.get('input_size') or (3, 224, 224)
    embed = getattr(meta, 'patch_embed', None)
    sizes = [getattr(embed, 'img_size', None), getattr(meta, 'img_size', None), stated[1:]]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes if size is not None]
    convolutions = (module.in_channels for module in meta.modules() if isinstance(module, nn.Conv2d))
    channels = [getattr(meta, 'in_chans', None), next(convolutions, None), stated[0]]
    error: Exception | None = None
    candidates = [
        (chans, *size) for size in dict.fromkeys(sizes)
        for chans in dict.fromkeys(chans for chans in channels if isinstance(chans, int))
    ]
    if len(candidates) == 1:
        return candidates[0]
    for candidate in candidates:
        try:
            with torch.no_grad(), ShapesOnly():
                meta.eval()(torch.empty(2, *candidate, device='meta', dtype=_dtype(meta)))
            return candidate
        except Exception as failure:
            error = failure
    raise ValueError(
        f'{name} takes no images of {" or ".join(f"{h}x{w}" for h, w in dict.fromkeys(sizes))} pixels, '
        f'create it with another img_size: {error}') from error


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return dict((*parameters, *model.named_buffers(remove_duplicate=False)))


def _without_checkpoint(model: nn.Module) -> dict[int, Any]:
    """Return a memo that keeps `copy.deepcopy` from copying a checkpoint that the model's `pretrained_cfg` may hold."""
    cfg = model.pretrained_cfg
    state = cfg.get('state_dict') if isinstance(cfg, dict) else getattr(cfg, 'state_dict', None)
    return {} if state is None else {id(state): None}


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model without memory for its tensors."""
    memo = _without_checkpoint(model)
    for tensor in _tensors(model).values():
        shape = torch.empty_like(tensor, device='meta')
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(model, memo)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.float32)


# The parts


def _trace(meta: nn.Module, name: str, taps: Sequence[str], size: tuple[int, int, int]) -> StageGraph:
    try:
        return StageGraph(meta, taps, size, _dtype(meta))
    except Exception as error:
        reason = str(error).strip().partition('\n')[0]
        if not isinstance(error, CutError):
            reason = (
                f'its forward_features cannot be traced there ({type(error).__name__}: {reason}). Modules that lie '
                'less deep may work as taps')
        raise ValueError(f'{name} cannot be cut behind {", ".join(taps)}: {reason.rstrip(".")}.') from error


def _cuts(graph: StageGraph, name: str, taps: Sequence[str]) -> list[int]:
    """Return the number of the last node of each block."""
    cuts: list[int] = []
    for tap in taps:
        place = graph.place(tap)
        if place is None:
            raise CutError(f'{tap} is not executed by forward_features')
        if cuts and place[0] <= cuts[-1]:
            raise CutError(f'{tap} is executed before the tap that it follows')
        cuts.append(place[0])
    cuts[-1] = len(graph.nodes) - 1
    return cuts


class CutHead:
    """What a head has besides the methods of its model, whose class it extends."""

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...], pre_logits: bool = False) -> torch.Tensor:
        """Return the logits, or the features before the classifier, for what the last block returns."""
        return self.forward_head(self.layout.restore(x), pre_logits=pre_logits)

    def __reduce_ex__(self, protocol):
        return _empty_head, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _head_class(model_class: type) -> type:
    return type(f'{model_class.__name__}Head', (CutHead, model_class), {})


def _empty_head(model_class: type) -> nn.Module:
    head_class = _head_class(model_class)
    return head_class.__new__(head_class)


def make_head(model: nn.Module, blocks: Sequence[torch.fx.GraphModule], layout: Layout) -> nn.Module:
    """Turn a model into its own head: an identity stands for each module of a block that has parameters or buffers."""
    owned = {
        node.target for block in blocks for node in block.graph.nodes if node.op in ('call_module', 'get_attr')
    } - {'training'}
    for target in owned:
        path, _, attribute = target.rpartition('.')
        parent = model.get_submodule(path)
        if attribute not in parent._modules:
            setattr(parent, attribute, None)
        elif _tensors(parent._modules[attribute]):
            parent._modules[attribute] = nn.Identity()
    model.__class__ = _head_class(type(model))
    model.layout = layout.detached()
    return model


def _check_ownership(model: nn.Module, name: str, taps: Sequence[str], parts: Sequence[nn.Module]) -> None:
    """Raise a ValueError unless each parameter and buffer of the model is in one part, and the parts have no other."""
    owners: dict[str, int] = {}
    tensors: dict[int, int] = {}
    for i, part in enumerate(parts):
        for key, tensor in _tensors(part).items():
            if owners.setdefault(key, i) != i or tensors.setdefault(id(tensor), i) != i:
                raise ValueError(
                    f'{name} cannot be cut behind {", ".join(taps)}: both sides of a cut need {key}.')
    expected = _tensors(model).keys()
    if expected != owners.keys():
        raise RuntimeError(f'The parts of {name} lost or gained {sorted(expected ^ owners.keys())[:3]}.')


def _describe(
        model: nn.Module,
        taps: Sequence[str],
        layouts: Sequence[Layout],
        size: tuple[int, int, int],
) -> tuple[tuple[int, ...], ...]:
    """Return channels, reduction, dimension of the channels and place of the main tensor of each block's features."""
    infos = {info['module']: info for info in map(dict, model.feature_info or ()) if info.get('module')}
    described = []
    for b, (tap, layout) in enumerate(zip(taps, layouts)):
        info = infos.get(tap) or next((infos[key] for key in infos if key and tap.endswith(f'.{key}')), {})
        expected = model.num_features if b == len(taps) - 1 else info.get('num_chs')
        # Feature maps before tokens before anything else, channels where they lie in most models.
        last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
        order = {3: (3, 1) if last else (1, 3), 2: (2, 1)}
        places = [
            (axis, i) for dims in (3, 2) for axis in order[dims]
            for i, shape in enumerate(layout.shapes) if len(shape) == dims and 0 not in shape
        ] or [(len(shape), i) for i, shape in enumerate(layout.shapes)]
        fitting = [(axis, i) for axis, i in places if layout.shapes[i][axis - 1] == expected]
        axis, i = (fitting or places)[0]
        channels = layout.shapes[i][axis - 1]
        positions = max(math.prod(layout.shapes[i]) // channels, 1)
        reduction = info.get('reduction') or max(round(math.sqrt(size[1] * size[2] / positions)), 1)
        described.append((channels, reduction, axis, i if len(layout.shapes) > 1 else None))
    return tuple(zip(*described))


def _verify(model: nn.Module, chain: CutModel) -> None:
    """Raise a RuntimeError unless the parts compute what the model does."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *chain.input_size, generator=generator, device='cpu').to(parameter.device, parameter.dtype)
    modes = [(module, module.training) for module in (model, *chain.blocks, chain.head) for module in module.modules()]
    try:
        with torch.no_grad(), ShapesOnly():
            expected = x.new_empty(2, model.num_classes) if x.is_meta else model.eval()(x)
            found = x
            for part in (*chain.blocks, chain.head):
                found = part.eval()(found)
    finally:
        for module, training in modes:
            module.training = training
    same = isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor) and found.shape == expected.shape
    if same and not found.is_meta:
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 2e-2
        scale = expected.abs().max().nan_to_num(1.).item()
        same = torch.allclose(found, expected, tolerance, tolerance * scale, equal_nan=True)
    if not same:
        raise RuntimeError(
            f'The parts of {chain.name}, cut behind {", ".join(chain.taps)}, do not compute what the model does.')
