"""Weight quantisation: adaptive range (ARQ), learned scales (LSQ) and the integers for export."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amct_ext.ops._common import (
    FLT_EPSILON,
    accumulate_type,
    along_channels,
    check_axis,
    check_bits,
    check_floating,
    check_scale,
    code_range,
    other_axes,
    reference,
    symmetric_scale,
)


def arq_fake_quantize(w: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Fake-quantise a weight with the scale of its own range, per channel or as a whole.

    Args:
        w: at least one dimension with a channel axis; float32, float64, float16 or bfloat16.
        num_bits: 2 to 16.
        channel_axis: the output-channel axis (0 for convolutions and Linear, 1 for transposed ones), None for one
            scale.

    Returns: `(y, scale)`: y like w; scale of shape (channels,) or (1,), float32 (float64 for a float64 weight).

    The scale is the validity flag, found in the same pass: it is NaN or Inf where the channel holds NaN or Inf, and
    exactly 1 where the channel is degenerate, all zero or so small that its scale would be below FLT_EPSILON (y is zero
    then). A sound channel has scale 1 only if its extreme is exactly 2^(b-1) or 2^(b-1)-1, and then y is not zero.

    Gradients: straight through to w; scale is not differentiable.

    Errors: TypeError for a dtype that is not floating, ValueError for num_bits, IndexError for channel_axis.

    Source: AMCT's ARQ (symmetric; the divisor is 2^(b-1) where the negative extreme is the larger, else 2^(b-1)-1).

        >>> y, scale = arq_fake_quantize(torch.tensor([[1.27, -0.5], [-1.28, 0.2]]), channel_axis=0)
        >>> [round(v, 4) for v in scale.tolist()]
        [0.01, 0.01]
    """
    return torch.ops.amct_ext.arq_fake_quantize(w, num_bits, channel_axis)


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


def quantize_weight(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    """The integer codes of a weight, as int8.

    Args: as `lsq_fake_quantize`; num_bits 2 to 8.

    Returns: int8 tensor with the shape of w; round half to even, clamped to the code range. NaN gives 0.

    Errors: TypeError, ValueError (num_bits, number of scales), IndexError (channel_axis).

    Source: AMCT's export of quantised weights.

        >>> quantize_weight(torch.tensor([0.5, -1.5, 300.0]), torch.tensor([1.0])).tolist()
        [0, -2, 127]
    """
    return torch.ops.amct_ext.quantize_weight(w, scale, num_bits, channel_axis)


def default_grad_factor(weights_per_scale: int, num_bits: int) -> float:
    """1/sqrt(weights per scale * (2^(b-1)-1)), 1 for an empty weight."""
    return 1.0 / math.sqrt(max(weights_per_scale, 1) * (2 ** (num_bits - 1) - 1))


def _codes(w: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    return torch.clamp(torch.round(w / scale), *code_range(num_bits))


def check_weight(op: str, w: Tensor, num_bits: int, channel_axis: int | None, most: int = 16) -> None:
    check_floating(op, "w", w)
    check_bits(op, num_bits, most)
    check_axis(op, "channel_axis", w, channel_axis)


def check_scaled(
    op: str,
    w: Tensor,
    scale: Tensor,
    num_bits: int,
    channel_axis: int | None,
    grad: Tensor | None = None,
    most: int = 16,
) -> None:
    check_weight(op, w, num_bits, channel_axis, most)
    if grad is not None:
        check_floating(op, "grad", grad)
    check_floating(op, "scale", scale)
    check_scale(op, scale, w, channel_axis)
    torch._check_value(
        grad is None or grad.shape == w.shape,
        lambda: f"{op}: grad must have the shape of w, {tuple(w.shape)}, not {tuple(grad.shape)}",  # type: ignore[union-attr]
    )


@reference("arq_fake_quantize")
def _reference_arq(w: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    check_weight("arq_fake_quantize", w, num_bits, channel_axis)
    wide = w.to(accumulate_type(w))
    if w.numel() == 0:
        count = 1 if channel_axis is None else w.shape[channel_axis]
        return torch.empty_like(w), torch.ones(count, dtype=wide.dtype, device=w.device)
    axes = list(range(w.dim())) if channel_axis is None else other_axes(w, channel_axis)
    largest = wide.amax(axes) if axes else wide
    smallest = wide.amin(axes) if axes else wide
    scale = symmetric_scale(largest, smallest, num_bits)
    shaped = along_channels(scale, w, channel_axis)
    return (_codes(wide, shaped, num_bits) * shaped).to(w.dtype), scale.reshape(-1)


@reference("lsq_fake_quantize")
def _reference_lsq(
    w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None, grad_factor: float | None = None
) -> Tensor:
    check_scaled("lsq_fake_quantize", w, scale, num_bits, channel_axis)
    wide = w.to(accumulate_type(w))
    shaped = along_channels(scale.to(wide.dtype).clamp_min(FLT_EPSILON), w, channel_axis)
    return (_codes(wide, shaped, num_bits) * shaped).to(w.dtype)


@reference("lsq_fake_quantize_backward")
def _reference_lsq_backward(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    num_bits: int = 8,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
) -> Tensor:
    check_scaled("lsq_fake_quantize_backward", w, scale, num_bits, channel_axis, grad)
    wide = w.to(accumulate_type(w))
    shaped = along_channels(scale.to(wide.dtype).clamp_min(FLT_EPSILON), w, channel_axis)
    lowest, highest = code_range(num_bits)
    z = wide / shaped
    slope = torch.where(
        wide < lowest * shaped,
        torch.full_like(z, lowest),
        torch.where(wide > highest * shaped, torch.full_like(z, highest), torch.round(z) - z),
    )
    term = (slope * grad.to(wide.dtype)).to(torch.float64)
    axes = list(range(w.dim())) if channel_axis is None else other_axes(w, channel_axis)
    total = term.sum(axes) if axes else term
    if grad_factor is None:
        grad_factor = default_grad_factor(w.numel() // max(scale.numel(), 1), num_bits)
    return (total * grad_factor).to(scale.dtype).reshape(scale.shape)


@reference("quantize_weight")
def _reference_quantize(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    check_scaled("quantize_weight", w, scale, num_bits, channel_axis, most=8)
    wide = w.to(accumulate_type(w))
    shaped = along_channels(scale.to(wide.dtype).clamp_min(FLT_EPSILON), w, channel_axis)
    return _codes(wide, shaped, num_bits).nan_to_num(0.0).to(torch.int8)
