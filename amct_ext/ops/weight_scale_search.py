"""The scale search of a weight: the scale of least squared error."""

from __future__ import annotations

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
from amct_ext.ops._checks import check_dtype, check_same_shape
from amct_ext.ops._registration import reference
from amct_ext.ops.weight_arq import check_weight, symmetric_scale

# On the scale of the range, which comes first.
FACTORS = tuple((16 - i % 8) / (16 << i // 8) for i in range(16)) + tuple(
    (8 - i % 4) / (32 << i // 4) for i in range(16)
)

__all__ = ["search_weight_scale"]


def search_weight_scale(
    w: Tensor, num_bits: int = 8, channel_axis: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """The scale of least squared quantisation error of a weight, per channel or as a whole.

    The codes of 32 scales are compared: the scale of the range, which `arq_fake_quantize` uses, times factors from 1 to
    0.02. For given codes q the best scale is sum(w q) / sum(q q); the first codes that leave the smallest error with
    their best scale win, and that scale is the result.

    Args:
        w: at least one dimension with a channel axis; float32, float64, float16 or bfloat16.
        num_bits: 2 to 8.
        channel_axis: the output-channel axis, None for one scale.
        mask: bool, shape of w: weights where it is False count as zero.

    Returns: scale of shape (channels,) or (1,), float32 (float64 for a float64 weight). As for `arq_fake_quantize` it
    is NaN or Inf where the channel holds NaN or Inf, and 1 where the channel is all zero or its range too small.

    Errors: TypeError (w not floating, mask not bool), ValueError (num_bits, shape of mask), IndexError (channel_axis).

    Source: minimum squared error with alternating codes and scale (Lloyd 1982; Zhang et al. 2018, LQ-Nets); the product
    with the reciprocal stands for the division.

        >>> w = torch.cat([torch.linspace(-1, 1, 1001), torch.tensor([3.5])])
        >>> round(search_weight_scale(w, num_bits=4).item(), 2)  # that of the range: 0.5
        0.19
    """
    return torch.ops.amct_ext.search_weight_scale(w, num_bits, channel_axis, mask)


def _check(op: str, w: Tensor, num_bits: int, channel_axis: int | None, mask: Tensor | None) -> None:
    check_weight(op, w, num_bits, channel_axis, 8)
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        check_same_shape(op, "mask", mask, "w", w)


def _empty(w: Tensor, channel_axis: int | None, **_: object) -> Tensor:
    return empty_scales(w, channel_axis)


@reference("search_weight_scale", check=_check, empty=_empty)
def search_weight_scale_reference(
    w: Tensor, num_bits: int = 8, channel_axis: int | None = None, mask: Tensor | None = None
) -> Tensor:
    kept = w if mask is None else torch.where(mask, w, torch.zeros_like(w))
    wide = kept.to(accumulate_type(w))
    if w.numel() == 0:
        return torch.ones(1 if channel_axis is None else w.shape[channel_axis], dtype=wide.dtype, device=w.device)
    axes = other_axes(w, channel_axis)
    by_range = symmetric_scale(wide.amax(axes) if axes else wide, wide.amin(axes) if axes else wide, num_bits).reshape(
        -1
    )
    best, scale = torch.zeros_like(by_range, dtype=torch.float64), by_range.to(torch.float64)
    for factor in FACTORS:
        inverse = along_channels(torch.ones_like(by_range) / (by_range * factor), w, channel_axis)
        codes = torch.clamp(torch.round(wide * inverse), *code_range(num_bits))
        products, squares = (
            (x.to(torch.float64).sum(axes) if axes else x.to(torch.float64)).reshape(-1)
            for x in (wide * codes, codes * codes)
        )
        gain = products * products / squares
        better = (squares > 0) & torch.isfinite(gain) & (gain > best)
        best = torch.where(better, gain, best)
        scale = torch.where(better, (products / squares).clamp_min(FLT_EPSILON), scale)
    return torch.where(torch.isfinite(by_range), scale.to(wide.dtype), by_range)
