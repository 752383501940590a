"""What n members cost: multiply-accumulates and parameters (section 3.1 of the paper)."""
import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models.create import check_ensemble
from ..models.ensemble import HierarchicalEnsemble
from ..models.layers import BranchedLinear
from ..tree import node_span

# What counts as a MAC in the paper: convolutions and linear layers, nothing else. In attention fvcore finds products of
# matrices too, or not, as it is computed; only a `BranchedLinear` is one.
_OPERATORS = ('conv', 'linear')


@dataclass(frozen=True)
class MemberCost:
    """The cost of evaluating the first n members for one image.

    Attributes:
        num_members: Number of members, n.
        macs: Multiply-accumulates of convolutions and linear layers.
        params: Parameters of the nodes that are evaluated.
        ratio: `macs` over those of n independent networks.
        predicted_ratio: The same if all blocks cost the same: Eq. 8, for any tree and any n.
    """
    num_members: int
    macs: int
    params: int
    ratio: float
    predicted_ratio: float


def _scale_to_prefixes(model: HierarchicalEnsemble, costs: dict[str, int]) -> dict[int, int]:
    """Turn the cost of all members in each part of the model into that of the first n, for n = 1..N."""
    parts = {name: part.nodes for name, part in model.parts().items()}
    leaves = model.nodes[-1]

    def used(part: str, num_members: int) -> int:
        return node_span(parts[part], 0, num_members, leaves)[1]

    return {
        # The nodes of a part are alike, so the division is exact.
        n: sum(costs[part] // used(part, model.ensemble_size) * used(part, n) for part in parts)
        for n in range(1, model.ensemble_size + 1)
    }


def resolve_input_size(model: HierarchicalEnsemble, input_size: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Return the channels, height and width of images for a model; the model's own if `input_size` is None.

    Raises:
        TypeError: `input_size` is not a sequence.
        ValueError: It does not fit the model, or is None and the model has none of its own.
    """
    if input_size is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError('the size of the images must be given for a model that timm.create_model did not make.')
        input_size = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
    if not isinstance(input_size, Sequence):
        raise TypeError(f'input_size must be ({model.in_chans}, height, width) in pixels, got {input_size!r}.')
    if len(input_size) != 3 or input_size[0] != model.in_chans or min(input_size) < 1:
        raise ValueError(f'input_size must be ({model.in_chans}, height, width) in pixels, got {tuple(input_size)}.')
    return tuple(input_size)


def member_macs(model: HierarchicalEnsemble, img_size: int | tuple[int, int] | None = None) -> dict[int, int]:
    """Count the multiply-accumulates of one image for every number of members, with fvcore.

    Args:
        model: Any `hne_*` model; it is neither run nor changed.
        img_size: Height and width of the image in pixels; the model's own if None.

    Returns:
        MACs for n = 1..N.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
        ValueError: `img_size` is None, and the model has no size of its own.
    """
    check_ensemble(model)
    with warnings.catch_warnings():
        # Importing fvcore scripts functions of its own that have nothing to do with counting.
        warnings.simplefilter('ignore', FutureWarning)
        from fvcore.nn import FlopCountAnalysis
    if img_size is None:
        img_size = resolve_input_size(model)[1:]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    # fvcore traces a forward pass, which needs memory but no particular values.
    model = copy.deepcopy(model).to_empty(device='cpu').float().eval()
    for buffer in model.buffers():
        buffer.zero_()  # some are indices, which must exist
    model.num_members = None
    image = torch.zeros(1, model.in_chans, height, width)
    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    branched = [name for name, module in model.named_modules() if isinstance(module, BranchedLinear)]
    return _scale_to_prefixes(model, {
        part: int(sum(counts[operator] for operator in (*_OPERATORS, *['matmul'] * (part in branched))))
        for part, counts in analysis.by_module_and_operator().items()
    })


def member_params(model: HierarchicalEnsemble) -> dict[int, int]:
    """Count the parameters of the nodes that n members run through, for n = 1..N.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
    """
    check_ensemble(model)
    return _scale_to_prefixes(model, {
        part: sum(p.numel() for p in module.parameters()) for part, module in model.named_modules()
    })


def cost_table(model: HierarchicalEnsemble, img_size: int | tuple[int, int] | None = None) -> list[MemberCost]:
    """Return what n members cost, for n = 1..N.

    Args:
        model: Any `hne_*` model; it is neither run nor changed.
        img_size: Height and width of the image in pixels; the model's own if None.

    Raises:
        TypeError: `model` is no hierarchical ensemble.
        ValueError: `img_size` is None, and the model has no size of its own.
    """
    macs, params = member_macs(model, img_size), member_params(model)
    rows = []
    for n in macs:
        nodes = sum(node_span(count, 0, n, model.nodes[-1])[1] for count in model.nodes)
        rows.append(MemberCost(
            num_members=n,
            macs=macs[n],
            params=params[n],
            ratio=macs[n] / (n * macs[1]),
            predicted_ratio=nodes / (n * len(model.nodes)),
        ))
    return rows
