"""Learned scales of a weight that would cost their channel."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import FLT_EPSILON, code_range, other_axes
from amct_ext.ops._registration import reference
from amct_ext.ops.weight_lsq import check_scaled, positive_along_channels

__all__ = ["repair_weight_scale_"]


def repair_weight_scale_(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> None:
    """Set learned scales with which a channel would be lost to the scale of the channel's range, in place.

    A channel counts as lost where quantising leaves less than a tenth of its norm: a step of the optimizer has moved
    the scale far below what the weights need (or below zero, which counts as FLT_EPSILON), or far above. All other
    scales keep their bits, and so do those of channels that hold NaN or Inf or whose range is too small for a scale.

    Args:
        w, num_bits, channel_axis: as `lsq_fake_quantize`; num_bits 2 to 8.
        scale: one value, or one per channel; written to.

    Errors: as `lsq_fake_quantize`.

    Source: ours. Esser et al. 2020 (LSQ) leave positivity to the learning rate.

        >>> scale = torch.tensor([0.1, -0.01])
        >>> repair_weight_scale_(torch.tensor([[7.0, 2.0], [7.0, 2.0]]), scale, num_bits=8, channel_axis=0)
        >>> [round(v, 4) for v in scale.tolist()]
        [0.1, 0.0551]
    """
    torch.ops.amct_ext.repair_weight_scale_(w, scale, num_bits, channel_axis)


def _empty(**_: object) -> None:
    return None


@reference("repair_weight_scale_", check=partial(check_scaled, max_bits=8), empty=_empty)
def repair_weight_scale_reference(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> None:
    if w.numel() == 0:
        return
    shaped = positive_along_channels(scale, w, channel_axis)
    wide, axes = w.to(shaped.dtype), other_axes(w, channel_axis)
    lowest, highest = code_range(num_bits)
    left = torch.clamp(torch.round(wide * (torch.ones_like(shaped) / shaped)), lowest, highest) * shaped
    before, after = ((x * x).sum(axes) if axes else x * x for x in (wide.to(torch.float64), left.to(torch.float64)))
    top, bottom = (wide.amax(axes), wide.amin(axes)) if axes else (wide, wide)
    top, bottom = top.abs(), bottom.abs()
    levels = torch.where(top < bottom, torch.full_like(top, -lowest), torch.full_like(top, highest))
    widest = torch.maximum(top, bottom) / levels
    lost = (100 * after < before) & (widest >= FLT_EPSILON) & torch.isfinite(widest)
    scale.copy_(torch.where(lost.reshape(scale.shape), widest.reshape(scale.shape).to(scale.dtype), scale))
