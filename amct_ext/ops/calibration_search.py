"""The activation range search: where to clip so that the quantisation error is smallest."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import FLT_EPSILON, accumulate_type, code_range, empty_scalar
from amct_ext.ops._checks import check_bits, check_floating, require
from amct_ext.ops._registration import reference

PERCENTILE = 0.999999
# torch.arange(0.7, 1.3, 0.01) in float32; written out because its last bits depend on how a device vectorises it.
RATIOS = (
    0.699999988, 0.709999979, 0.719999969, 0.729999959, 0.74000001, 0.75, 0.75999999, 0.769999981,
    0.779999971, 0.789999962, 0.799999952, 0.809999943, 0.819999993, 0.829999983, 0.839999974, 0.849999964,
    0.860000014, 0.870000005, 0.879999995, 0.889999986, 0.900000036, 0.910000026, 0.920000017, 0.930000007,
    0.939999998, 0.949999988, 0.959999979, 0.969999969, 0.980000019, 0.99000001, 1.0, 1.00999999,
    1.01999998, 1.02999997, 1.03999996, 1.04999995, 1.05999994, 1.06999993, 1.07999992, 1.09000003,
    1.10000002, 1.11000001, 1.12, 1.13, 1.13999999, 1.14999998, 1.15999997, 1.17000008,
    1.17999995, 1.19000006, 1.20000005, 1.21000004, 1.22000003, 1.23000002, 1.24000001, 1.25,
    1.25999999, 1.26999998, 1.27999997, 1.28999996, 1.29999995,
)  # fmt: skip
CANDIDATES = len(RATIOS)

__all__ = ["search_clip_range"]


def search_clip_range(x: Tensor, num_bits: int = 8, with_offset: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the quantisation range of an activation from a sample of it.

    The extreme value m is the 0.999999 percentile on either side (zero included). 61 ranges, 0.70 m to 1.30 m in steps
    of 0.01, are compared by their mean squared quantisation error; the first smallest wins.

    Args:
        x: at least one value; float32, float64, float16 or bfloat16.
        num_bits: 2 to 16.
        with_offset: keep the lower end where it is, search the upper end only and use an offset; else symmetric.

    Returns: `(scale, offset, clip_max, clip_min)`, 0-dim, float32 (float64 for float64 data). NaN each where x holds
    NaN or Inf.

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


def symmetric_candidates(largest: Tensor, smallest: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, offsets (zero) and upper ends of the symmetric ranges that are tried."""
    lowest, highest = code_range(num_bits)
    bound = torch.maximum(largest.abs(), smallest.abs())
    limit = torch.where(
        largest.abs() < smallest.abs(), torch.full_like(bound, -lowest), torch.full_like(bound, highest)
    )
    ends = _ratios(bound) * bound
    scale = ends / limit
    return torch.where(scale < FLT_EPSILON, torch.ones_like(scale), scale), torch.zeros_like(scale), ends


def _offset_candidates(largest: Tensor, smallest: Tensor, num_bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the ranges whose lower end stays where it is."""
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
    return torch.tensor(RATIOS, dtype=torch.float32, device=like.device).to(like.dtype)


def first_smallest(loss: Tensor) -> Tensor:
    """Index of the first smallest, 0-dim; which of several equal ones argmin returns depends on the device."""
    return (loss <= loss.min()).to(torch.int32).cumsum(0).eq(0).sum().clamp_max(len(loss) - 1)


def _check(op: str, x: Tensor, num_bits: int, **_: object) -> None:
    check_floating(op, "x", x)
    check_bits(op, num_bits)
    require(
        x.numel() > 0,
        ValueError,
        lambda: f"{op}: x must hold at least one value, shape {tuple(x.shape)} has none",
    )


def _empty(x: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, offset, clip_max, clip_min = (empty_scalar(x, accumulate_type(x)) for _ in range(4))
    return scale, offset, clip_max, clip_min


@reference("search_clip_range", check=_check, empty=_empty)
def search_clip_range_reference(
    x: Tensor, num_bits: int = 8, with_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values = x.reshape(-1).to(accumulate_type(x))
    lowest, highest = code_range(num_bits)
    largest, smallest = _extremes(values)
    candidates = _offset_candidates if with_offset else symmetric_candidates
    scales, offsets, ends = candidates(largest, smallest, num_bits)
    losses = []
    for scale, offset, end in zip(scales.unbind(), offsets.unbind(), ends.unbind(), strict=True):
        if with_offset:
            back = (torch.clamp(torch.round(values / scale + offset), lowest, highest) - offset) * scale
        else:
            back = torch.round(torch.clamp(values, -end, end) / scale) * scale
        losses.append((back - values).square().sum(dtype=torch.float64))
    first = first_smallest(torch.stack(losses))
    scale = scales.gather(0, first.reshape(1)).reshape(())
    offset = offsets.gather(0, first.reshape(1)).reshape(()) + (scale - scale)  # NaN where there is no range
    return scale, offset, (highest - offset) * scale, (lowest - offset) * scale
