"""The activation range search: where to clip so that the quantisation error is smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._common import FLT_EPSILON, accumulate_type, check_bits, check_floating, code_range, reference

PERCENTILE = 0.999999
CANDIDATES = 61


def search_clip_range(x: Tensor, num_bits: int = 8, with_offset: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the quantisation range of an activation from a sample of it.

    The extreme value m is the 0.999999 percentile on either side (zero included). 61 ranges, 0.70 m to 1.30 m in steps of
    0.01, are compared by their mean squared quantisation error; the first smallest wins.

    Args:
        x: at least one value; float32, float64, float16 or bfloat16.
        num_bits: 2 to 16.
        with_offset: keep the lower end where it is, search the upper end only and use an offset; else symmetric.

    Returns: `(scale, offset, clip_max, clip_min)`, 0-dim, float32 (float64 for float64 data). NaN each where x holds NaN
    or Inf.

    Errors: TypeError for a dtype that is not floating, ValueError for num_bits or an empty x.

    Source: AMCT's IFMR (input feature map reconstruction). Errors are computed in float32 per element, as there, and
    summed in float64.

        >>> scale, offset, high, low = search_clip_range(torch.linspace(-1, 1, 1001))
        >>> round(scale.item(), 4), offset.item(), round(high.item(), 2)
        (0.0079, 0.0, 1.0)
    """
    return torch.ops.amct_ext.search_clip_range(x, num_bits, with_offset)


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest value after leaving out one in a million at each side."""
    count = values.numel()
    rank = count - int(PERCENTILE * count)
    largest = values.topk(rank).values[-1]
    smallest = values.topk(rank, largest=False).values[-1]
    finite = torch.isfinite(values).all()
    nan = torch.full_like(largest, torch.nan)
    return torch.where(finite, largest.clamp_min(0), nan), torch.where(finite, smallest.clamp_max(0), nan)


def _symmetric_candidates(largest: Tensor, smallest: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    lowest, highest = code_range(num_bits)
    bound = torch.maximum(largest.abs(), smallest.abs())
    limit = torch.where(
        largest.abs() < smallest.abs(), torch.full_like(bound, -lowest), torch.full_like(bound, highest)
    )
    ends = _ratios(bound) * bound
    scale = ends / limit
    return torch.where(scale < FLT_EPSILON, torch.ones_like(scale), scale), torch.zeros_like(scale), ends


def _offset_candidates(largest: Tensor, smallest: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    lowest, _ = code_range(num_bits)
    ends = _ratios(largest) * largest
    scale = (ends - smallest) / torch.full_like(ends, 2**num_bits - 1)
    small = scale < FLT_EPSILON
    offset = torch.round(lowest - smallest / scale)
    return (
        torch.where(small, torch.ones_like(scale), scale),
        torch.where(small, torch.full_like(offset, lowest), offset),
        ends,
    )


def _ratios(like: Tensor) -> Tensor:
    return torch.arange(0.7, 1.3, 0.01, dtype=torch.float32, device=like.device)[:CANDIDATES].to(like.dtype)


@reference("search_clip_range")
def _reference(x: Tensor, num_bits: int = 8, with_offset: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "search_clip_range"
    check_floating(op, "x", x)
    check_bits(op, num_bits)
    torch._check_value(x.numel() > 0, lambda: f"{op}: x must hold at least one value, shape {tuple(x.shape)} has none")
    values = x.reshape(-1).to(accumulate_type(x))
    lowest, highest = code_range(num_bits)
    largest, smallest = _extremes(values)
    candidates = _offset_candidates if with_offset else _symmetric_candidates
    scales, offsets, ends = candidates(largest, smallest, num_bits)
    losses = []
    for scale, offset, end in zip(scales.unbind(), offsets.unbind(), ends.unbind(), strict=True):
        if with_offset:
            back = (torch.clamp(torch.round(values / scale + offset), lowest, highest) - offset) * scale
        else:
            back = torch.round(torch.clamp(values, -end, end) / scale) * scale
        losses.append((back - values).square().sum(dtype=torch.float64))
    loss = torch.stack(losses)
    # The first smallest, without relying on which of several equal ones argmin returns on a device.
    first = (loss <= loss.min()).to(torch.int32).cumsum(0).eq(0).sum().clamp_max(CANDIDATES - 1)
    scale = scales.gather(0, first.reshape(1)).reshape(())
    offset = offsets.gather(0, first.reshape(1)).reshape(())
    return scale, offset, (highest - offset) * scale, (lowest - offset) * scale
