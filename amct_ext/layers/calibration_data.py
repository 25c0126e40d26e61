"""The data of a calibration of several batches, in one tensor: all values, or a histogram of fixed size."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.errors import InvalidDataError
from amct_ext.ops.calibration_histogram import BINS

_EXTREMES = 1024  # kept on either side: exact percentiles for up to 1.02e9 values
_LENGTH = 2 * BINS + _EXTREMES


class CalibrationMethod(Protocol):
    """How the batches are kept: one tensor, ``data``, which is empty at the start."""

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        """A new tensor with the values of ``x`` (float32 or float64, one dimension) added."""

    def clips(self, data: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        """The clips (maximum, minimum) that the range search finds; NaN where values were not finite."""


class ExactValues:
    """All values: the range is that of one search over all batches at once; memory grows with every batch."""

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        return torch.cat([data.to(x), x])

    def clips(self, data: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        _, _, clip_max, clip_min = ops.search_clip_range(data, num_bits)
        return clip_max, clip_min


class ValueHistogram:
    """A histogram (int64, 2.4 MiB) however much data there is; the bound is that of `search_clip_range_histogram`.

    Data of `ExactValues` is counted into the histogram.
    """

    def add(self, data: Tensor, x: Tensor) -> Tensor:
        if is_histogram(data):
            result = data.clone()
        else:
            result = torch.zeros(_LENGTH, dtype=torch.int64, device=x.device)
            ops.range_histogram_(data, *_parts(result))
        ops.range_histogram_(x, *_parts(result))
        return result

    def clips(self, data: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        _, _, clip_max, clip_min, _ = ops.search_clip_range_histogram(*_parts(data), num_bits)
        return clip_max, clip_min


class CalibrationData:
    """The batches of one calibration under way: in no state dict, but copied and pickled with the model."""

    def __init__(self) -> None:
        self.method: CalibrationMethod = ExactValues()  # as `configure` says
        self.data: Tensor | None = None
        self.batches = 0  # taken so far

    def add(self, x: Tensor, num_bits: int, last: bool, layer: str) -> tuple[Tensor, Tensor]:
        """Add a batch (one dimension). Returns the clips (maximum, minimum) of the batch or, with the last one, of all.

        A single batch is searched as it is, whatever the method: nothing need be kept. A calibration that has begun as
        a histogram stays one, for its values are gone. Errors: InvalidDataError where values are not finite; the batch
        is not added then.
        """
        data = None
        if last and self.data is None:
            clip_max, clip_min = batch_range(x, num_bits, search=True)
        else:
            method = ValueHistogram() if self.is_histogram else self.method
            data = method.add(x.new_zeros(0) if self.data is None else self.data.to(x.device), x)
            clip_max, clip_min = method.clips(data, num_bits) if last else batch_range(x, num_bits, search=False)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(clip_max) & torch.isfinite(clip_min)):
            raise InvalidDataError(f"layer '{layer}': its input holds NaN or Inf, no clip range can be found")
        self.data = None if last else data
        self.batches += 1
        return clip_max, clip_min

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


def batch_range(x: Tensor, num_bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """The clips (maximum, minimum) for one batch: those that the range search finds, or the extremes."""
    return ExactValues().clips(x, num_bits) if search else (x.max(), x.min())


def is_histogram(data: Tensor) -> bool:
    """Whether the tensor holds a histogram, which is told by its dtype."""
    return data.dtype == torch.int64


def is_resumable(data: Tensor) -> bool:
    """Whether this version of the library can continue with calibration data that another version saved."""
    known = data.numel() == _LENGTH if is_histogram(data) else data.is_floating_point()
    return known and data.dim() == 1


def _parts(data: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (int64, BINS x 2) and extremes (float32, 2 x 1024) as views of the data of a histogram."""
    return data[: 2 * BINS].view(BINS, 2), data[2 * BINS :].view(torch.float32).view(2, _EXTREMES)
