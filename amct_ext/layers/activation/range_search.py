"""How the clips of an activation are chosen: AMCT's search, and ranges that a few outliers do not decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.common.ranks import is_distributed
from amct_ext.config.text import DataQuant
from amct_ext.layers.forward_context import host_can_read

_PERCENTILES = 99.99, 99.9  # in %: what lies beyond may count as outliers
Histogram = tuple[Tensor, Tensor]  # signed, and its extremes


class ClipPair(NamedTuple):
    """The ends of a range that a search proposes, 0-dim; from them clips start."""

    high: Tensor
    low: Tensor

    def text(self) -> str:
        """The range for a message; reads the device."""
        return f"[{float(self.low):.6g}, {float(self.high):.6g}]"


class FoundRange(NamedTuple):
    """The clips found and, where those of AMCT were in doubt, what else there is to choose from.

    replaced: 0-dim, whether ``clips`` are ``robust`` because ``amct`` would put most values into the code of zero.
    candidates: those between which the output of the network decides, ``clips`` first.
    """

    clips: ClipPair
    amct: ClipPair | None = None
    robust: ClipPair | None = None
    replaced: Tensor | None = None
    candidates: tuple[ClipPair, ...] = ()


class CalibrationStatistics(Protocol):
    """What a range search reads of one or several batches, which are kept as values or as a histogram."""

    def amct_range(self, num_bits: int) -> ClipPair:
        """The range that AMCT's search finds; NaN where values are not finite."""

    def min_max(self) -> ClipPair:
        """The largest and the smallest value."""

    def majority_below(self, magnitude: Tensor) -> Tensor:
        """Whether more than half of the non-zero values are no larger than this; 0-dim."""

    def histogram(self) -> Histogram:
        """The signed histogram of `range_histogram_`, and its extremes."""


def choose(first: Tensor, one: ClipPair, other: ClipPair) -> ClipPair:
    """``one`` where ``first``, a 0-dim bool, holds, else ``other``, in the dtype of the latter."""
    return ClipPair(*(torch.where(first, a.to(b.dtype), b) for a, b in zip(one, other, strict=True)))


@dataclass(frozen=True)
class RangeSearch:
    """The search that a configuration asks for. ``method`` None: AMCT's, guarded against outliers.

    AMCT's search tries 0.7 to 1.3 of the extreme value. Where that puts more than half of the non-zero values into the
    code of zero, the guard takes the first of these that does not: the range of least absolute error, that within which
    99.9 % of the values lie, AMCT's after all.
    """

    num_bits: int
    fixed_min: bool
    method: str | None = None
    percentile: float = 99.9

    @classmethod
    def of(cls, data: DataQuant, fixed_min: bool) -> RangeSearch:
        """The search for an activation with these settings."""
        return cls(data.num_bits, fixed_min, data.range_search, data.percentile)

    def find(self, statistics: CalibrationStatistics, last: bool) -> FoundRange:
        """The clips; for a batch that is not the last of a calibration AMCT takes the extreme values."""
        if self.method == "PERCENTILE":
            return FoundRange(self._percentile(statistics.histogram(), self.percentile))
        if self.method == "ABSOLUTE_ERROR":
            return FoundRange(self._least_error(statistics.histogram()))
        if self.method == "OUTPUT" and not last:  # for this batch only, and cheap
            return FoundRange(self._percentile(statistics.histogram(), _PERCENTILES[0]))
        if self.method == "OUTPUT":
            return self._candidates(statistics.histogram())
        amct = statistics.amct_range(self.num_bits) if last else statistics.min_max()
        return FoundRange(amct) if self.method == "AMCT" else self._guarded(statistics, amct)

    def _candidates(self, histogram: Histogram) -> FoundRange:
        found = [self._least_error(histogram, squared) for squared in (False, True)]
        found += [self._percentile(histogram, percentile) for percentile in _PERCENTILES]
        return FoundRange(found[0], candidates=tuple(found))

    def _guarded(self, statistics: CalibrationStatistics, amct: ClipPair) -> FoundRange:
        zeroes_majority = self._zeroes_majority(statistics, amct)
        # All ranks need a robust range where one of them does; a graph under way cannot branch.
        if host_can_read(zeroes_majority) and not is_distributed() and not bool(zeroes_majority):
            return FoundRange(amct)
        histogram = statistics.histogram()
        robust = self._least_error(histogram)
        helps = ~self._zeroes_majority(statistics, robust)
        # Where a few values weigh more than all the others together, the absolute error keeps them, too.
        if not (host_can_read(zeroes_majority) and bool(helps)):
            robust = choose(helps, robust, self._percentile(histogram, _PERCENTILES[-1]))
            helps = ~self._zeroes_majority(statistics, robust)
        replaced = zeroes_majority & helps
        return FoundRange(choose(replaced, robust, amct), amct, robust, replaced)

    def _zeroes_majority(self, statistics: CalibrationStatistics, clips: ClipPair) -> Tensor:
        """Whether quantising with these clips makes most values that are not zero the code of zero.

        AMCT's range is symmetric, and so is its step; one that begins at zero has a finer one.
        """
        low = clips.low.clamp_max(0)
        return statistics.majority_below((clips.high.clamp_min(0) - low) / (2 * (2**self.num_bits - 1)))

    def _least_error(self, histogram: Histogram, squared: bool = False) -> ClipPair:
        return ClipPair(*ops.search_clip_range_wide(*histogram, self.num_bits, self.fixed_min, squared))

    def _percentile(self, histogram: Histogram, percentile: float) -> ClipPair:
        return ClipPair(*ops.percentile_clip_range(*histogram, percentile, self.num_bits, self.fixed_min))
