"""Weight quantisation with the scale of the weight's own range (ARQ: adaptive range quantisation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import (
    FLT_EPSILON,
    accumulate_type,
    along_channels,
    code_range,
    empty_scales,
    other_axes,
)
from amct_ext.ops._checks import check_axis, check_bits, check_floating, require
from amct_ext.ops._registration import reference

__all__ = ["arq_fake_quantize", "arq_fake_quantize_many"]


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


def arq_fake_quantize_many(
    weights: Sequence[Tensor], num_bits: int = 8, channel_axes: Sequence[int | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """`arq_fake_quantize` of several weights in one call: `(list of y, list of scale)`.

    Args:
        weights: as `arq_fake_quantize`, any shapes and dtypes.
        num_bits: 2 to 16.
        channel_axes: one for each weight, None for one scale; left out: axis 0 everywhere.

    Returns: as `arq_fake_quantize`. Gradients: straight through.

    Errors: as `arq_fake_quantize`; ValueError where the number of axes is not that of the weights.

    Source: as `arq_fake_quantize`; saves the cost of a call per weight.

        >>> ys, scales = arq_fake_quantize_many([torch.ones(2, 3), torch.ones(4)], channel_axes=[0, None])
        >>> [tuple(s.shape) for s in scales]
        [(2,), (1,)]
    """
    given = [0] * len(weights) if channel_axes is None else channel_axes
    for axis, w in zip(given, weights, strict=False):
        check_axis("arq_fake_quantize_many", "channel axis", w, axis)
    axes = [
        -1 if axis is None else axis % max(w.dim(), 1) if -w.dim() <= axis < 0 else axis
        for axis, w in zip(given, weights, strict=False)
    ]
    axes += [0] * (len(given) - len(axes))
    return torch.ops.amct_ext.arq_fake_quantize_many(list(weights), num_bits, axes)


def check_weight(op: str, w: Tensor, num_bits: int, channel_axis: int | None, max_bits: int = 16) -> None:
    check_floating(op, "w", w)
    check_bits(op, num_bits, max_bits)
    check_axis(op, "channel_axis", w, channel_axis)


def _check_many(op: str, weights: Sequence[Tensor], channel_axes: Sequence[int], **_: object) -> None:
    require(
        len(channel_axes) == len(weights),
        ValueError,
        lambda: (
            f"{op}: channel_axes must hold one axis (-1 for none) for each of {len(weights)} weights, "
            f"not {len(channel_axes)}"
        ),
    )
    wrong = next((axis for axis in channel_axes if axis < -1), None)
    require(wrong is None, IndexError, lambda: f"{op}: channel axis {wrong} is out of range: -1 stands for none")


def symmetric_scale(largest: Tensor, smallest: Tensor, num_bits: int) -> Tensor:
    """Scale without offset; one more level below zero than above, used when the negative extreme is the larger one."""
    lowest, highest = code_range(num_bits)
    top, bottom = largest.abs(), smallest.abs()
    # Tensors, not numbers: dividing by a Python number may be rewritten as a product with the reciprocal.
    levels = torch.where(top < bottom, torch.full_like(top, -lowest), torch.full_like(top, highest))
    scale = torch.maximum(top, bottom) / levels
    return torch.where(scale < FLT_EPSILON, torch.ones_like(scale), scale)


def to_codes(w: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Rounded half to even and clamped, as floats; the scale broadcasts against w."""
    return torch.clamp(torch.round(w / scale), *code_range(num_bits))


def _empty(w: Tensor, channel_axis: int | None, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), empty_scales(w, channel_axis)


@reference("arq_fake_quantize", check=check_weight, empty=_empty)
def arq_fake_quantize_reference(w: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    wide = w.to(accumulate_type(w))
    if w.numel() == 0:
        count = 1 if channel_axis is None else w.shape[channel_axis]
        return torch.empty_like(w), torch.ones(count, dtype=wide.dtype, device=w.device)
    axes = other_axes(w, channel_axis)
    largest = wide.amax(axes) if axes else wide
    smallest = wide.amin(axes) if axes else wide
    scale = symmetric_scale(largest, smallest, num_bits)
    shaped = along_channels(scale, w, channel_axis)
    return (to_codes(wide, shaped, num_bits) * shaped).to(w.dtype), scale.reshape(-1)


def _pairs(
    call: Callable[[Tensor, int, int | None], tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
    num_bits: int,
    channel_axes: Sequence[int],
) -> tuple[list[Tensor], list[Tensor]]:
    """Every weight by itself; -1 stands for one scale."""
    pairs = [call(w, num_bits, None if axis == -1 else axis) for w, axis in zip(weights, channel_axes, strict=True)]
    return [y for y, _ in pairs], [scale for _, scale in pairs]


@reference("arq_fake_quantize_many", check=_check_many, empty=partial(_pairs, arq_fake_quantize_reference.fake))
def arq_fake_quantize_many_reference(
    weights: Sequence[Tensor], num_bits: int = 8, channel_axes: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    return _pairs(arq_fake_quantize_reference, weights, num_bits, channel_axes)
