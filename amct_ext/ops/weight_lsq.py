"""Weight quantisation with learned scales (LSQ: learned step size quantisation)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import FLT_EPSILON, accumulate_type, along_channels, code_range, other_axes
from amct_ext.ops._checks import check_floating, check_same_shape, require
from amct_ext.ops._registration import reference
from amct_ext.ops.weight_arq import check_weight, to_codes

__all__ = ["lsq_fake_quantize", "lsq_fake_quantize_backward"]


def lsq_fake_quantize(
    w: Tensor,
    scale: Tensor,
    num_bits: int = 8,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
) -> Tensor:
    """Fake-quantise a weight with learned scales.

    Args:
        w: float32, float64, float16 or bfloat16.
        scale: one value, or one per channel; floating. Values below FLT_EPSILON count as FLT_EPSILON.
        num_bits: 2 to 16.
        channel_axis: axis that the scales run along, None for one scale.
        grad_factor: factor on the gradient of the scale; None: 1/sqrt(weights per scale * (2^(b-1)-1)).

    Returns: y like w.

    Gradients: straight through to w, also outside the range; the scale receives the rounding error inside and the
    extreme code outside, summed and multiplied by grad_factor.

    Errors: TypeError, ValueError (num_bits, number of scales), IndexError (channel_axis).

    Source: AMCT's `ulq_retrain` for weights, which is LSQ (learned step size quantisation, Esser et al. 2020) without
    the cut of the weight's gradient.

        >>> lsq_fake_quantize(torch.tensor([0.26, -3.0]), torch.tensor([0.5]), num_bits=2).tolist()
        [0.5, -1.0]
    """
    return torch.ops.amct_ext.lsq_fake_quantize(w, scale, num_bits, channel_axis, grad_factor)


def lsq_fake_quantize_backward(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    num_bits: int = 8,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
) -> Tensor:
    """Gradient of the scale of `lsq_fake_quantize`, with the shape and dtype of scale.

    Args: as the forward, and `grad`, the gradient of y with the shape of w.

    A kernel adds eight values at a time in the arithmetic type, those sums in float64 over fixed blocks: the same bits
    for any number of threads.

    Errors: as the forward; ValueError where grad and w differ in shape.

    Source: as the forward.

        >>> w, s = torch.tensor([4.0, -4.0]), torch.tensor([1.0])
        >>> lsq_fake_quantize_backward(torch.ones(2), w, s, num_bits=2, grad_factor=1.0).tolist()
        [-1.0]
    """
    return torch.ops.amct_ext.lsq_fake_quantize_backward(grad, w, scale, num_bits, channel_axis, grad_factor)


def default_grad_factor(weights_per_scale: int, num_bits: int) -> float:
    """1/sqrt(weights per scale * (2^(b-1)-1)), 1 for an empty weight."""
    return 1.0 / math.sqrt(max(weights_per_scale, 1) * (2 ** (num_bits - 1) - 1))


def check_scaled(
    op: str,
    w: Tensor,
    scale: Tensor,
    num_bits: int,
    channel_axis: int | None,
    grad: Tensor | None = None,
    max_bits: int = 16,
    **_: object,
) -> None:
    """A weight, its scales and, in a backward, the gradient of the result."""
    check_weight(op, w, num_bits, channel_axis, max_bits)
    if grad is not None:
        check_floating(op, "grad", grad)
    check_floating(op, "scale", scale)
    expected = 1 if channel_axis is None else w.shape[channel_axis]
    require(
        scale.numel() == expected,
        ValueError,
        lambda: (
            f"{op}: scale must hold {expected} value(s) for channel_axis {channel_axis} of a weight of shape "
            f"{tuple(w.shape)}, not shape {tuple(scale.shape)}"
        ),
    )
    if grad is not None:
        check_same_shape(op, "grad", grad, "w", w)


def positive_along_channels(scale: Tensor, w: Tensor, channel_axis: int | None) -> Tensor:
    """Scales of at least FLT_EPSILON, in the arithmetic of w and shaped against it."""
    return along_channels(scale.to(accumulate_type(w)).clamp_min(FLT_EPSILON), w, channel_axis)


def _empty(w: Tensor, **_: object) -> Tensor:
    return torch.empty_like(w)


@reference("lsq_fake_quantize", check=check_scaled, empty=_empty)
def lsq_fake_quantize_reference(
    w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None, grad_factor: float | None = None
) -> Tensor:
    shaped = positive_along_channels(scale, w, channel_axis)
    return (to_codes(w.to(shaped.dtype), shaped, num_bits) * shaped).to(w.dtype)


def _empty_backward(scale: Tensor, **_: object) -> Tensor:
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


@reference("lsq_fake_quantize_backward", check=check_scaled, empty=_empty_backward)
def lsq_fake_quantize_backward_reference(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    num_bits: int = 8,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
) -> Tensor:
    shaped = positive_along_channels(scale, w, channel_axis)
    wide = w.to(shaped.dtype)
    lowest, highest = code_range(num_bits)
    z = wide / shaped
    slope = torch.where(
        wide < lowest * shaped,
        torch.full_like(z, lowest),
        torch.where(wide > highest * shaped, torch.full_like(z, highest), torch.round(z) - z),
    )
    term = (slope * grad.to(wide.dtype)).to(torch.float64)
    axes = other_axes(w, channel_axis)
    total = term.sum(axes) if axes else term
    if grad_factor is None:
        grad_factor = default_grad_factor(w.numel() // max(scale.numel(), 1), num_bits)
    return (total * grad_factor).to(scale.dtype).reshape(scale.shape)
