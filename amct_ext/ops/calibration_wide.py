"""Ranges that a few extreme values do not decide, from a signed histogram: a wide choice of ends, and a percentile."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import FLT_EPSILON, code_range, empty_scalar
from amct_ext.ops._checks import check_bits, require
from amct_ext.ops._registration import reference
from amct_ext.ops.calibration_histogram import SIGNED_SHAPE, BinnedValues, check_histogram, holds_no_range
from amct_ext.ops.calibration_search import first_smallest

_COARSE = 64  # ranges tried first, 2^(1/4) apart: the last one is 1.8e-5 of the extreme value
_FINE = 8  # then on either side of the best, 2^(1/32) apart
_EXACT_CODES = 512  # of each sign; beyond, steps are no wider than bins

__all__ = ["percentile_clip_range", "search_clip_range_wide"]


def search_clip_range_wide(
    histogram: Tensor, extremes: Tensor, num_bits: int = 8, fixed_min: bool = False, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose the range with the smallest mean absolute quantisation error, out of a wide choice, from a histogram.

    A range [-t, t] is cut where the data end, so data without negative values have the lower end 0. t goes from the
    largest magnitude down to 1.8e-5 of it in steps of 2^(1/4), then in steps of 2^(1/32) around the best. The absolute
    error counts a value that is clipped by its distance, not by the square of it: a few huge values do not widen the
    range as they do in `search_clip_range`. With H(t) the sum of max(|v| - t, 0), which the histogram gives (between
    the edges of a bin: the middle of the bounds of `search_clip_range_histogram`), the error of step s and L codes is
    H(0) - 2 sum(H((l + 1/2) s), l < L) + 2 sum(H(l s), 1 <= l <= L) on either side of zero, the squared error
    sum(v^2) - 2 s sum(H((l + 1/2) s), l < L).

    Args:
        histogram: int64, (2, 156673, 2), and extremes: as `range_histogram_` left them.
        num_bits: 2 to 16. Beyond 512 codes a side, values count with the mean error of a step, s/4 or s^2/12.
        fixed_min: the lower end is 0, whatever the data.
        squared: the squared error instead of the absolute one.

    Returns: `(clip_max, clip_min)`, 0-dim float32, for an asymmetric range (`ulq_fake_quantize`). NaN where values were
    not finite or there were none; the range of scale 1 where a scale would be below FLT_EPSILON.

    Errors: TypeError, ValueError for another dtype, shape or num_bits.

    Source: this library's.

        >>> from amct_ext.ops import range_histogram_
        >>> histogram, extremes = torch.zeros(2, 156673, 2, dtype=torch.int64), torch.zeros(2, 4)
        >>> range_histogram_(torch.cat([torch.linspace(0, 1, 10001), torch.tensor([40.0])]), histogram, extremes)
        >>> high, low = search_clip_range_wide(histogram, extremes)
        >>> 0.9 < high.item() < 1.1, low.item()
        (True, 0.0)
    """
    return torch.ops.amct_ext.search_clip_range_wide(histogram, extremes, num_bits, fixed_min, squared)


def percentile_clip_range(
    histogram: Tensor, extremes: Tensor, percentile: float = 99.9, num_bits: int = 8, fixed_min: bool = False
) -> tuple[Tensor, Tensor]:
    """The range within which a given share of the values lies, from a histogram.

    It is [-t, t], cut where the data end, t the percentile of the magnitudes (interpolated within a bin, which is
    0.1 % wide). Where that is 0, because most values are, zeros do not count.

    Args:
        histogram: int64, (2, 156673, 2), and extremes: as `range_histogram_` left them.
        percentile: above 0, up to 100, in %.
        num_bits: 2 to 16; only decides what counts as too small for a scale.
        fixed_min: the lower end is 0; negative values count as 0.

    Returns: `(clip_max, clip_min)` as of `search_clip_range_wide`.

    Errors: TypeError, ValueError for another dtype, shape, percentile or num_bits.

    Source: this library's; percentiles are the usual way.

        >>> from amct_ext.ops import range_histogram_
        >>> histogram, extremes = torch.zeros(2, 156673, 2, dtype=torch.int64), torch.zeros(2, 4)
        >>> range_histogram_(torch.arange(-100.0, 101), histogram, extremes)
        >>> high, low = percentile_clip_range(histogram, extremes, 90.0)
        >>> round(high.item()), round(low.item())
        (90, -90)
    """
    return torch.ops.amct_ext.percentile_clip_range(histogram, extremes, percentile, num_bits, fixed_min)


def _check(op: str, histogram: Tensor, extremes: Tensor, num_bits: int, **_: object) -> None:
    check_histogram(op, histogram, extremes, SIGNED_SHAPE)
    check_bits(op, num_bits)


def _check_percentile(op: str, percentile: float, **arguments: object) -> None:
    _check(op, **arguments)  # type: ignore[arg-type]
    require(0 < percentile <= 100, ValueError, lambda: f"{op}: percentile must be in (0, 100], not {percentile}")


def _empty(histogram: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return empty_scalar(histogram, torch.float32), empty_scalar(histogram, torch.float32)


@reference("search_clip_range_wide", check=_check, empty=_empty)
def search_clip_range_wide_reference(
    histogram: Tensor, extremes: Tensor, num_bits: int = 8, fixed_min: bool = False, squared: bool = False
) -> tuple[Tensor, Tensor]:
    largest, smallest = _data_ends(extremes, fixed_min)
    signs = BinnedValues(histogram[0]), BinnedValues(histogram[1])
    error = _squared_error if squared else _absolute_error

    def best(ends: Tensor) -> Tensor:
        high, low = torch.minimum(ends, largest), torch.minimum(ends, smallest)
        max_codes = 2**num_bits - 1
        scale = ((high + low) / max_codes).clamp_min(torch.finfo(torch.float64).tiny)
        codes_below = torch.round(low / scale)
        errors = error(signs[0], scale, max_codes - codes_below, max_codes)
        if not fixed_min:
            errors = errors + error(signs[1], scale, codes_below, max_codes)
        return ends.gather(0, first_smallest(errors).reshape(1))

    extreme = torch.maximum(largest, smallest)
    coarse = best(extreme * _powers(4, 0, -_COARSE, histogram))
    fine = best(torch.minimum(coarse * _powers(32, _FINE, -_FINE - 1, histogram), extreme)).reshape(())
    return _clips(torch.minimum(fine, largest), torch.minimum(fine, smallest), histogram, num_bits, fixed_min)


@reference("percentile_clip_range", check=_check_percentile, empty=_empty)
def percentile_clip_range_reference(
    histogram: Tensor, extremes: Tensor, percentile: float = 99.9, num_bits: int = 8, fixed_min: bool = False
) -> tuple[Tensor, Tensor]:
    largest, smallest = _data_ends(extremes, fixed_min)
    values = BinnedValues(histogram[0] if fixed_min else histogram.sum(0))
    ignored = histogram[1, :, 0].sum().to(torch.float64) if fixed_min else 0.0
    zeros = values.counts[0] + ignored
    wanted = percentile / 100 * (values.counts.sum() + ignored)
    wanted = torch.where(wanted > zeros, wanted, zeros + percentile / 100 * values.counts[1:].sum())
    wanted = wanted * (1 - 2.0**-40)  # a share is not exact: 99.9 % of 1000 values are 999
    until = values.counts.cumsum(0) + ignored
    at = torch.searchsorted(until, wanted.reshape(1)).clamp_max(len(until) - 1)
    share = ((wanted - until[at] + values.counts[at]) / values.counts[at].clamp_min(1)).clamp(0, 1)
    end = (values.bottom[at] + share * values.width[at]).reshape(())
    return _clips(torch.minimum(end, largest), torch.minimum(end, smallest), histogram, num_bits, fixed_min)


def _data_ends(extremes: Tensor, fixed_min: bool) -> tuple[Tensor, Tensor]:
    """How far the data reach above and below zero, float64."""
    largest, smallest = extremes[:, 0].to(torch.float64).unbind()
    return largest, torch.zeros_like(smallest) if fixed_min else smallest


def _powers(parts: int, start: int, stop: int, like: Tensor) -> Tensor:
    """2^(k / parts) for k from start down to stop, which is left out."""
    exponents = torch.arange(start, stop, -1, device=like.device, dtype=torch.float64)
    return torch.exp2(exponents / parts)


def _absolute_error(values: BinnedValues, scale: Tensor, codes: Tensor, max_codes: int) -> Tensor:
    """The summed absolute error of magnitudes for each scale with so many codes, at most `max_codes`, above zero."""
    exact = codes.clamp_max(_EXACT_CODES)
    steps = torch.arange(min(max_codes, _EXACT_CODES), device=scale.device, dtype=torch.float64)
    s = scale.reshape(-1, 1)
    wave = values.hinge_sum((steps + 1) * s) - values.hinge_sum((steps + 0.5) * s)
    wave = torch.where(steps < exact.reshape(-1, 1), wave, torch.zeros_like(wave)).sum(1)
    until, end = exact * scale, codes * scale
    beyond = (values.count_above(until) - values.count_above(end)) * scale / 4
    return (
        values.hinge_sum(torch.zeros_like(scale)) + 2 * wave - values.hinge_sum(until) + beyond + values.hinge_sum(end)
    )


def _squared_error(values: BinnedValues, scale: Tensor, codes: Tensor, max_codes: int) -> Tensor:
    """The summed squared error less sum(v^2), as `_absolute_error`."""
    exact = codes.clamp_max(_EXACT_CODES)
    steps = torch.arange(min(max_codes, _EXACT_CODES), device=scale.device, dtype=torch.float64)
    hinges = values.hinge_sum((steps + 0.5) * scale.reshape(-1, 1))
    hinges = torch.where(steps < exact.reshape(-1, 1), hinges, torch.zeros_like(hinges)).sum(1)
    until, end = exact * scale, codes * scale
    gained = values.squares_above(until) - values.squares_above(end)
    rounding = (values.count_above(until) - values.count_above(end)) * scale.square() / 12
    return rounding - 2 * scale * hinges - gained


def _clips(high: Tensor, low: Tensor, histogram: Tensor, num_bits: int, fixed_min: bool) -> tuple[Tensor, Tensor]:
    """The clips of a range [-low, high], float32."""
    lowest, highest = code_range(num_bits)
    small = (high + low) / (2**num_bits - 1) < FLT_EPSILON
    high = torch.where(small, torch.full_like(high, highest), high)
    low = torch.where(small, torch.full_like(low, 0.0 if fixed_min else -lowest), low)
    nan = torch.full_like(high, torch.nan)
    broken = holds_no_range(histogram)
    return torch.where(broken, nan, high).to(torch.float32), torch.where(broken, nan, 0 - low).to(torch.float32)
