"""Convolution with the gradients of PyTorch's, sooner on a CPU."""
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ['convolve_in_training', 'has_slow_gradient']

MIN_CHANNELS = 24  # of a group; with fewer, matrix products of each group by itself take longer


def has_slow_gradient(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...], groups: int) -> bool:
    """Whether `convolve_in_training` is the faster way (`benchmarks/gradients.py`).

    It is in two cases, on a CPU in float32 and channels_last: a 1x1 convolution in groups of many channels, and a
    depth-wise 3x3 one on feature maps of at most 2x2 pixels.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled('cpu'):
        return False
    if type(x) is not torch.Tensor or groups == 1 or set(stride) != {1}:  # such as torch.fx traces with
        return False
    if x.device.type != 'cpu' or not x.dtype == weight.dtype == torch.float32 or not weight.requires_grad:
        return False
    if tuple(weight.shape[2:]) == (1, 1):
        fits = min(weight.shape[1], weight.shape[0] // groups) >= MIN_CHANNELS
    else:
        fits = tuple(weight.shape[1:]) == (1, 3, 3) and max(x.shape[2:]) <= 2
    return fits and x.is_contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    """`F.conv2d` at stride 1 that keeps the resolution."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, weight, ctx.groups = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the gradient of the gradient
            gradients = _plain_gradients
        else:
            grad = grad.contiguous(memory_format=torch.channels_last)
            gradients = _pointwise_gradients if weight.shape[-1] == 1 else _depthwise_gradients
        return *gradients(grad, x, weight, ctx.groups, ctx.needs_input_grad[0]), None


def _plain_gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        groups: int,
        of_input: bool,
        of_weight: bool = True,
) -> list[torch.Tensor | None]:
    """As PyTorch does."""
    padding = [weight.shape[-1] // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], groups, [of_input, of_weight, False])[:2]


def _pointwise_gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        groups: int,
        of_input: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """As matrix products of each group, read and written in place."""
    grad_x = torch.empty_like(x) if of_input else None
    grad_weight = torch.empty_like(weight)
    pairs = zip(
        _split_groups(grad, groups),
        _split_groups(x, groups),
        weight.flatten(1).chunk(groups),
        _split_groups(grad_x, groups) if of_input else [None] * groups,
        grad_weight.view(weight.shape[:2]).chunk(groups),
    )
    for out, inp, matrix, grad_inp, grad_matrix in pairs:
        if of_input:
            torch.mm(out, matrix, out=grad_inp)
        torch.mm(out.t(), inp, out=grad_matrix)
    return grad_x, grad_weight


def _split_groups(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, ...]:
    """Views (pixels of all images, channels of a group) of a tensor in channels_last."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1]).chunk(groups, dim=1)


def _depthwise_gradients(
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        groups: int,
        of_input: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """That of the weight with feature maps filled up to 3x3, which changes no sum but takes oneDNN's fast path."""
    missing = [0, 3 - x.shape[3], 0, 3 - x.shape[2]]
    grad_x = _plain_gradients(grad, x, weight, groups, True, False)[0] if of_input else None
    return grad_x, _plain_gradients(F.pad(grad, missing), F.pad(x, missing), weight, groups, False)[1]


def convolve_in_training(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Convolve as `F.conv2d(x, weight, padding='same', groups=groups)`; the gradients come by other operations.

    Args:
        x: `(B, C, H, W)`, channels_last
        weight: `(C', C / groups, k, k)`, 1x1 in groups, or depth-wise 3x3
        groups: Groups of channels.

    Returns:
        `(B, C', H, W)`
    """
    return _Convolution.apply(x, weight, groups)
