"""The range search over data that is not kept: a histogram of fixed size gathers it batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import code_range, empty_scalar
from amct_ext.ops._checks import check_bits, check_dtype, check_floating, require
from amct_ext.ops._registration import reference
from amct_ext.ops.calibration_search import PERCENTILE, first_smallest, symmetric_candidates

# Bins are the upper bits of a float32 magnitude: 1024 to an octave, from 2^-24 (half the smallest scale there is) up to
# infinity and NaN, which have an octave of their own. Bin 0 holds what is smaller.
_OPEN_BITS = 13
_PER_OCTAVE = 1 << (23 - _OPEN_BITS)
_FIRST_KEY = (127 - 24) * _PER_OCTAVE - 1
BINS = 256 * _PER_OCTAVE - _FIRST_KEY
UNSIGNED_SHAPE = (BINS, 2)  # of a histogram of magnitudes
SIGNED_SHAPE = (2, BINS, 2)  # of a signed histogram: values not below zero, then those below

__all__ = ["range_histogram_", "search_clip_range_histogram"]


def range_histogram_(x: Tensor, histogram: Tensor, extremes: Tensor) -> None:
    """Add one batch to the histogram of a range search, in place.

    Start with zeros. Everything in it is exact, so the order of batches does not matter, and histograms of several
    processes may simply be added (extremes: the largest of both).

    Args:
        x: float32, float16 or bfloat16; float64 is rounded to float32.
        histogram: int64, (156673, 2): how many magnitudes fall into a bin, and the sum of the 13 bits that the bin
            leaves open; updated. 2.4 MiB, whatever the amount of data. A signed histogram, (2, 156673, 2), has this
            for values not below zero, then for those below.
        extremes: float32, (2, k): the k largest values and the k largest of the negated ones, falling, zeros where
            there are none; updated. k = 1024 makes the percentile exact for up to 1.02e9 values.

    Errors: TypeError, ValueError for another dtype or shape.

    Source: this library's.

        >>> histogram, extremes = torch.zeros(156673, 2, dtype=torch.int64), torch.zeros(2, 4)
        >>> range_histogram_(torch.tensor([0.5, -2.0, 0.0]), histogram, extremes)
        >>> int(histogram[:, 0].sum()), extremes[:, 0].tolist()
        (3, [0.5, 2.0])
    """
    torch.ops.amct_ext.range_histogram_(x, histogram, extremes)


def search_clip_range_histogram(
    histogram: Tensor, extremes: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose the symmetric range of `search_clip_range` from a histogram.

    The 61 ranges are those that `search_clip_range` tries on all the data at once (beyond k million values the k-th
    largest stands for the percentile). With H(t) the sum of max(|v| - t, 0), the squared error of a scale s is
    sum(v^2) - 2 s sum(H((l + 1/2) s)) over the codes l from 0 up to the last but one. The histogram gives H exactly at
    the edges of bins; between them H is convex, so it lies below the chord and above the tangent of the bin's mean. The
    range whose error is smallest halfway between its two bounds wins.

    The bound: in a bin of width w chord and tangent differ by w/4 a value at most, so the bounds of an error differ by
    s w/2 for each value whose bin a boundary (l + 1/2) s cuts. The winner's upper bound exceeds the lower bound of any
    other range by at most half the sum of both differences. With w <= |v|/1024, a bin that at most one boundary cuts
    (num_bits up to 11) and s the largest scale: `excess <= s/2048 mean(|v|)`, the mean taken over all values, those of
    uncut bins as zeros; with more bits mean(v^2)/2^22 is to be added (docs/ops.md). Values of at most 11 significant
    bits (float16, bfloat16) lie on edges: nothing is lost.

    Args:
        histogram, extremes: as `range_histogram_` left them; signs of a signed histogram do not count.
        num_bits: 2 to 16.

    Returns: `(scale, offset, clip_max, clip_min, excess)`, 0-dim float32, excess float64: the mean squared error of the
    range (in exact arithmetic) lies at most `excess` above the smallest of all 61; rounding of the sums is included.
    NaN where values were not finite or there were none.

    Errors: TypeError, ValueError for another dtype, shape or num_bits.

    Source: this library's; the choice is that of AMCT's IFMR.

        >>> histogram, extremes = torch.zeros(156673, 2, dtype=torch.int64), torch.zeros(2, 4)
        >>> range_histogram_(torch.linspace(-1, 1, 1001), histogram, extremes)
        >>> scale, offset, high, low, excess = search_clip_range_histogram(histogram, extremes)
        >>> round(high.item(), 2), excess.item() < 1e-7
        (1.0, True)
    """
    return torch.ops.amct_ext.search_clip_range_histogram(histogram, extremes, num_bits)


def check_histogram(op: str, histogram: Tensor, extremes: Tensor, *shapes: tuple[int, ...]) -> None:
    """A histogram of one of these shapes, with extremes."""
    check_dtype(op, "histogram", histogram, torch.int64)
    check_dtype(op, "extremes", extremes, torch.float32)
    require(
        histogram.shape in shapes,
        ValueError,
        lambda: f"{op}: histogram must have shape {' or '.join(map(str, shapes))}, not {tuple(histogram.shape)}",
    )
    require(
        extremes.dim() == 2 and extremes.shape[0] == 2 and extremes.shape[1] > 0,
        ValueError,
        lambda: f"{op}: extremes must have shape (2, k), k at least 1, not {tuple(extremes.shape)}",
    )


def holds_no_range(histogram: Tensor) -> Tensor:
    """Whether there are no values, or some that are not finite; 0-dim."""
    counts = histogram[..., 0]
    return (counts.sum() == 0) | (counts[..., -_PER_OCTAVE:].sum() > 0)


def _check_batch(op: str, x: Tensor, histogram: Tensor, extremes: Tensor) -> None:
    check_floating(op, "x", x)
    check_histogram(op, histogram, extremes, UNSIGNED_SHAPE, SIGNED_SHAPE)


@reference("range_histogram_", check=_check_batch, empty=lambda **_: None)
def range_histogram_reference(x: Tensor, histogram: Tensor, extremes: Tensor) -> None:
    values = x.reshape(-1).to(torch.float32)
    bits = values.abs().view(torch.int32)
    keys = bits.clamp_min((_FIRST_KEY + 1) << _OPEN_BITS).sub(_FIRST_KEY << _OPEN_BITS)
    keys = torch.where(bits < (_FIRST_KEY + 1) << _OPEN_BITS, torch.zeros_like(keys), keys)
    added = torch.stack([torch.ones_like(keys), keys & ((1 << _OPEN_BITS) - 1)], 1).to(torch.int64)
    bins = (keys >> _OPEN_BITS).to(torch.int64)
    if histogram.dim() == 3:
        negative = (values.signbit() & (values != 0)).reshape(-1, 1)
        histogram[0].index_add_(0, bins, torch.where(negative, 0, added))
        histogram[1].index_add_(0, bins, torch.where(negative, added, 0))
    else:
        histogram.index_add_(0, bins, added)
    finite = torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    both = torch.cat([extremes, torch.stack([finite, -finite]).clamp_min(0)], 1)
    extremes.copy_(both.topk(extremes.shape[1], 1).values)


def _check_search(op: str, histogram: Tensor, extremes: Tensor, num_bits: int) -> None:
    check_histogram(op, histogram, extremes, UNSIGNED_SHAPE, SIGNED_SHAPE)
    check_bits(op, num_bits)


def _empty_range(histogram: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale, offset, clip_max, clip_min = (empty_scalar(histogram, torch.float32) for _ in range(4))
    return scale, offset, clip_max, clip_min, empty_scalar(histogram, torch.float64)


@reference("search_clip_range_histogram", check=_check_search, empty=_empty_range)
def search_clip_range_histogram_reference(
    histogram: Tensor, extremes: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lowest, highest = code_range(num_bits)
    histogram = histogram.sum(0) if histogram.dim() == 3 else histogram
    counts = histogram[:, 0]
    total = counts.sum().to(torch.float64)
    rank = (total - torch.floor(PERCENTILE * total)).clamp(1, extremes.shape[1]).to(torch.int64) - 1
    largest, smallest = extremes.gather(1, rank.expand(2, 1)).reshape(2).unbind()
    largest = torch.where(holds_no_range(histogram), torch.full_like(largest, torch.nan), largest)
    scales, offsets, ends = symmetric_candidates(largest, -smallest, num_bits)

    low, high, rounding = _loss_bounds(histogram, scales.to(torch.float64), ends.to(torch.float64), int(-lowest))
    first = first_smallest((low + high) / 2).reshape(1)
    others = low.scatter(0, first, torch.inf)
    excess = ((high.gather(0, first).reshape(()) - others.min()).clamp_min(0) + rounding) / total
    scale = scales.gather(0, first).reshape(())
    offset = offsets.gather(0, first).reshape(()) + (scale - scale)
    return scale, offset, (highest - offset) * scale, (lowest - offset) * scale, excess


class BinnedValues:
    """The magnitudes of a histogram (BINS, 2) in float64: how many there are in a bin, and where in it they lie."""

    def __init__(self, histogram: Tensor) -> None:
        self.counts = histogram[:, 0].to(torch.float64)
        # The bits of a float32 become those of the same float64 when the exponent is moved from one bias to the other.
        keys = torch.arange(_FIRST_KEY, _FIRST_KEY + BINS + 1, device=histogram.device, dtype=torch.int64)
        edges = ((keys + (1023 - 127) * _PER_OCTAVE) << (52 - 23 + _OPEN_BITS)).view(torch.float64)
        edges[0] = 0
        self.bottom, self.width = edges[:-1], edges.diff()
        self.inside = histogram[:, 1].to(torch.float64) * (self.width / 2**_OPEN_BITS)  # from the bottom, summed
        self.sums = self.counts * self.bottom + self.inside
        self._above_counts, self._above_sums = _sums_above(self.counts), _sums_above(self.sums)

    def hinge_bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of H(t), the sum of max(|v| - t, 0), from below and above; any shape, float64, not negative."""
        index, rest = self._locate(t)
        whole_bins = self._above_sums[index] - t * self._above_counts[index]
        lower = (self.inside[index] - self.counts[index] * rest).clamp_min(0)
        upper = torch.maximum(self.inside[index] * (1 - rest / self.width[index]), lower)
        return whole_bins + lower, whole_bins + upper

    def hinge_sum(self, t: Tensor) -> Tensor:
        """H(t), taken halfway between its bounds."""
        lower, upper = self.hinge_bounds(t)
        return (lower + upper) / 2

    def count_above(self, t: Tensor) -> Tensor:
        """How many magnitudes lie above t, as if they were spread evenly within a bin."""
        index, rest = self._locate(t)
        return self._above_counts[index] + self.counts[index] * (1 - rest / self.width[index]).clamp(0, 1)

    def squares_above(self, t: Tensor) -> Tensor:
        """The sum of max(|v| - t, 0)^2, as if the values of a bin were all its mean."""
        index, rest = self._locate(t)
        mean = self.inside / self.counts.clamp_min(1)
        squares = _sums_above(self.counts * (self.bottom + mean).square())
        whole_bins = squares[index] - 2 * t * self._above_sums[index] + t.square() * self._above_counts[index]
        return whole_bins + self.counts[index] * (mean[index] - rest).clamp_min(0).square()

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of t, and how far above its bottom t lies."""
        bits = t.view(torch.int64) >> (52 - 23 + _OPEN_BITS)
        index = (bits - (1023 - 127) * _PER_OCTAVE - _FIRST_KEY).clamp(0, BINS - 1)
        return index, (t - self.bottom[index]).clamp_min(0)


def _sums_above(values: Tensor) -> Tensor:
    return torch.cat([values.flip(0).cumsum(0).flip(0)[1:], values.new_zeros(1)])


def _loss_bounds(histogram: Tensor, scales: Tensor, ends: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The squared error of each scale less sum(v^2), from both sides, and how far float64 may be off."""
    values = BinnedValues(histogram)
    steps = torch.arange(levels, device=histogram.device, dtype=torch.float64)
    t = (steps + 0.5) * scales.reshape(-1, 1)
    crossed = t < ends.reshape(-1, 1)  # what is clipped lies below the boundaries beyond
    lower, upper = values.hinge_bounds(t)
    zero = torch.zeros_like(t)

    def loss(hinge: Tensor) -> Tensor:
        return -2 * scales * torch.where(crossed, hinge, zero).sum(1)

    # A running sum over all bins is off by BINS * 2^-53 of itself at most, in any order.
    return loss(upper), loss(lower), BINS * 2.0**-51 * levels * scales.max() * values.sums.sum()
