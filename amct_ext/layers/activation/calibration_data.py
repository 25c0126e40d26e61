"""The data of a calibration of several batches, in one tensor: all values, or a histogram of fixed size."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.errors import InvalidDataError
from amct_ext.layers.activation.range_search import CalibrationStatistics, ClipPair, FoundRange, RangeSearch
from amct_ext.layers.forward_context import host_can_read
from amct_ext.ops.calibration_histogram import BINS, SIGNED_SHAPE

_VALUES_IN_CACHE = 32768
_EXTREMES = 1024  # kept on either side: exact percentiles for up to 1.02e9 values
_LENGTH = 4 * BINS + _EXTREMES
_UNSIGNED_LENGTH = 2 * BINS + _EXTREMES  # of version 0.1


class CalibrationMethod(Protocol):
    """How the batches are kept: one tensor, ``data``, which is empty at the start."""

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        """A new tensor with the values of ``x`` (float32 or float64, one dimension) added."""

    def statistics(self, data: Tensor) -> CalibrationStatistics:
        """What the range search reads of the batches."""


class ExactValues:
    """All values: the range is that of one search over all batches at once; memory grows with every batch."""

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        return torch.cat([data.to(x), x])

    def statistics(self, data: Tensor) -> CalibrationStatistics:
        return ValueStatistics(data)


class ValueHistogram:
    """A histogram (int64, 4.8 MiB) however much data there is; the bound is that of `search_clip_range_histogram`.

    Data of `ExactValues` is counted into the histogram.
    """

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        if is_histogram(data):
            result = _signed(data.clone())
        else:
            result = torch.zeros(_LENGTH, dtype=torch.int64, device=x.device)
            ops.range_histogram_(data, *_parts(result))
        ops.range_histogram_(x, *_parts(result))
        return result

    def statistics(self, data: Tensor) -> CalibrationStatistics:
        return HistogramStatistics(data)


class ValueStatistics:
    """Statistics of values that are all there: one dimension, float32 or float64."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def amct_range(self, num_bits: int) -> ClipPair:
        return ClipPair(*ops.search_clip_range(self.x, num_bits)[2:])

    def min_max(self) -> ClipPair:
        return ClipPair(self.x.max(), self.x.min())

    def majority_below(self, magnitude: Tensor) -> Tensor:
        # Parts that stay in the cache: the intermediate results are never written to memory.
        in_parts = self.x.device.type == "cpu" and host_can_read(self.x)
        parts = self.x.split(_VALUES_IN_CACHE) if in_parts else (self.x,)
        within = torch.stack([torch.count_nonzero(part.abs() <= magnitude) for part in parts]).sum()
        if in_parts and 2 * int(within) <= self.x.numel():  # whatever the number of zeros among them
            return torch.zeros((), dtype=torch.bool)
        nonzero = torch.stack([torch.count_nonzero(part) for part in parts]).sum()
        return 2 * (within - (self.x.numel() - nonzero)) > nonzero

    def histogram(self) -> tuple[Tensor, Tensor]:
        data = ValueHistogram().add(self.x.new_zeros(0), self.x)
        return _parts(data)


class HistogramStatistics:
    """Statistics of values of which a histogram was kept. What is below 2^-24 counts as zero."""

    def __init__(self, data: Tensor) -> None:
        self.data = _signed(data)

    def amct_range(self, num_bits: int) -> ClipPair:
        return ClipPair(*ops.search_clip_range_histogram(*_parts(self.data), num_bits)[2:4])

    def min_max(self) -> ClipPair:
        largest, smallest = _parts(self.data)[1][:, 0].unbind()
        return ClipPair(largest, -smallest)

    def majority_below(self, magnitude: Tensor) -> Tensor:
        one = torch.zeros(SIGNED_SHAPE, dtype=torch.int64, device=self.data.device)
        ops.range_histogram_(magnitude.abs().reshape(1), one, torch.zeros(2, 1, device=self.data.device))
        counts = _parts(self.data)[0][:, 1:, 0].sum(0)
        until = one[0, 1:, 0].flip(0).cumsum(0).flip(0)  # 1 up to the bin of the magnitude, that included
        return 2 * (counts * until).sum() > counts.sum()

    def histogram(self) -> tuple[Tensor, Tensor]:
        return _parts(self.data)


class CalibrationData:
    """The batches of one calibration under way: in no state dict, but copied and pickled with the model."""

    def __init__(self) -> None:
        self.method: CalibrationMethod = ExactValues()  # as `configure` says
        self.data: Tensor | None = None
        self.batches = 0  # taken so far

    def add(self, x: Tensor, search: RangeSearch, last: bool, layer: str) -> FoundRange:
        """Add a batch (one dimension). Returns the clips for the batch or, with the last one, for all batches.

        A single batch is searched as it is, whatever the method: nothing need be kept. A calibration that has begun as
        a histogram stays one, for its values are gone. Errors: InvalidDataError where values are not finite; the batch
        is not added then.
        """
        data: Tensor | None = None
        statistics: CalibrationStatistics = ValueStatistics(x)
        if not last or self.data is not None:
            method = ValueHistogram() if self.is_histogram else self.method
            data = method.add(x.new_zeros(0) if self.data is None else self.data.to(x.device), x)
            statistics = method.statistics(data) if last else statistics
        found = search.find(statistics, last)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(torch.stack(found.clips)).all()):
            raise InvalidDataError(f"layer '{layer}': its input holds NaN or Inf, no clip range can be found")
        self.data = None if last else data
        self.batches += 1
        return found

    def clear(self) -> None:
        """Free the data."""
        self.data, self.batches = None, 0

    def resume(self, data: Tensor, batches: int) -> None:
        """Continue with the data of another model's calibration."""
        self.data, self.batches = data.clone(), batches

    @property
    def is_histogram(self) -> bool:
        """Whether the batches so far are in a histogram."""
        return self.data is not None and is_histogram(self.data)


def is_histogram(data: Tensor) -> bool:
    """Whether the tensor holds a histogram, which is told by its dtype."""
    return data.dtype == torch.int64


def is_resumable(data: Tensor) -> bool:
    """Whether this version of the library can continue with calibration data that another version saved."""
    known = data.numel() in (_LENGTH, _UNSIGNED_LENGTH) if is_histogram(data) else data.is_floating_point()
    return known and data.dim() == 1


def _signed(data: Tensor) -> Tensor:
    """The data as a signed histogram; of one without signs half of the values count as negative, if any were."""
    if data.numel() == _LENGTH:
        return data
    magnitudes, extremes = data[: 2 * BINS], data[2 * BINS :]
    below = torch.where(extremes.view(torch.float32)[_EXTREMES] > 0, magnitudes // 2, 0)
    return torch.cat([magnitudes - below, below, extremes])


def _parts(data: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (int64, 2 x BINS x 2) and extremes (float32, 2 x 1024) as views of the data of a histogram."""
    return data[: 4 * BINS].view(SIGNED_SHAPE), data[4 * BINS :].view(torch.float32).view(2, _EXTREMES)
