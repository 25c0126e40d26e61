"""Which clips an op on activations uses, and scale and offset that follow from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import FLT_EPSILON, code_range, empty_scalar
from amct_ext.ops._checks import check_bits, check_floating, check_value


def check_activation(
    op: str,
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int,
    max_bits: int = 16,
    **_: object,
) -> None:
    check_floating(op, "x", x)
    check_bits(op, num_bits, max_bits)
    check_value(op, "clip_max", clip_max)
    check_value(op, "clip_min", clip_min)
    check_value(op, "prev_clip_max", prev_clip_max)
    check_value(op, "prev_clip_min", prev_clip_min)


class EffectiveClips(NamedTuple):
    """The clips that a forward uses, 0-dim, with scale and offset, in the arithmetic of the data."""

    high: Tensor
    low: Tensor
    scale: Tensor
    offset: Tensor

    def results(self, wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the ops return beside the data: scale, offset, clip_max, clip_min in ``dtype``, and `invalid`."""
        valid = torch.isfinite(wide).all() & torch.isfinite(self.scale) & (self.scale > 0)
        # copy=True: an output must never share storage with an input
        clips = self.high.to(dtype, copy=True), self.low.to(dtype, copy=True)
        return self.scale.to(dtype), self.offset.to(dtype), *clips, ~valid


def empty_results(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `EffectiveClips.results` returns, without values."""
    scale, offset, clip_max, clip_min = (empty_scalar(x, dtype) for _ in range(4))
    return scale, offset, clip_max, clip_min, empty_scalar(x, torch.bool)


def effective_clips(
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int,
    fixed_min: bool,
    dtype: torch.dtype,
) -> EffectiveClips:
    """The clips given, or the previous ones where those have collapsed or changed sign; around zero."""
    given = (clip_max, clip_min, prev_clip_max, prev_clip_min)
    high, low, prev_high, prev_low = (value.reshape(()).to(dtype) for value in given)
    if fixed_min:
        low = torch.zeros_like(low)
    collapsed = high - low <= FLT_EPSILON
    take_high = torch.isfinite(prev_high) & (collapsed | (high < 0))
    high = torch.where(take_high, prev_high, high)
    if not fixed_min:
        take_low = torch.isfinite(prev_low) & (collapsed | (low > 0))
        low = torch.where(take_low, prev_low, low)
    high, low = high.clamp_min(0), low.clamp_max(0)
    return EffectiveClips(high, low, *affine(high, low, num_bits))


def affine(clip_max: Tensor, clip_min: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer offset (as a float) of an asymmetric range that contains zero."""
    lowest, _ = code_range(num_bits)
    scale = (clip_max - clip_min) / torch.full_like(clip_max, 2**num_bits - 1)
    offset = torch.round(lowest - clip_min / scale)
    small = scale < FLT_EPSILON
    return torch.where(small, torch.ones_like(scale), scale), torch.where(
        small, torch.full_like(offset, lowest), offset
    )
