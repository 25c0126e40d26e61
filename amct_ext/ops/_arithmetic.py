"""Numbers and shapes that the references share."""

from __future__ import annotations

import torch
from torch import Tensor

FLT_EPSILON = torch.finfo(torch.float32).eps


def accumulate_type(x: Tensor) -> torch.dtype:
    """Arithmetic runs in float32, and in float64 for float64 data."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def code_range(num_bits: int) -> tuple[float, float]:
    """Smallest and largest signed code of `num_bits`."""
    half = 2 ** (num_bits - 1)
    return float(-half), float(half - 1)


def along_channels(values: Tensor, x: Tensor, channel_axis: int | None) -> Tensor:
    """Shape per-channel values (or a single one) so that they broadcast against x."""
    if channel_axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[channel_axis] = x.shape[channel_axis]
    return values.reshape(shape)


def other_axes(x: Tensor, channel_axis: int | None) -> list[int]:
    """All axes but the channel's; all of them without a channel axis."""
    if channel_axis is None:
        return list(range(x.dim()))
    axis = channel_axis % x.dim()
    return [i for i in range(x.dim()) if i != axis]


def empty_scalar(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor without a value, on the device of another."""
    return torch.empty((), dtype=dtype, device=like.device)


def empty_scales(w: Tensor, channel_axis: int | None) -> Tensor:
    """A scale per channel, or one, without values."""
    return w.new_empty(1 if channel_axis is None else w.shape[channel_axis], dtype=accumulate_type(w))
