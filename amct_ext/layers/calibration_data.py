"""How a calibration of several batches gathers its data, in one tensor: all values, or a histogram of fixed size."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.errors import InvalidDataError
from amct_ext.ops.calibration_histogram import BINS

_EXTREMES = 1024  # on either side: an exact percentile for up to 1.02e9 values
_LENGTH = 2 * BINS + _EXTREMES


class CalibrationMethod(Protocol):
    """A way to gather batches; ``gathered`` is empty at the start."""

    def add(self, gathered: Tensor, x: Tensor) -> Tensor:
        """A new tensor with the values of ``x`` (float32 or float64, one dimension) added."""

    def clips(self, gathered: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        """The clips (maximum, minimum) that the range search finds; NaN where values were not finite."""


class ExactValues:
    """All values: the range is that of one search over all batches at once; memory grows with every batch."""

    def add(self, gathered: Tensor, x: Tensor) -> Tensor:
        return torch.cat([gathered.to(x), x])

    def clips(self, gathered: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        _, _, clip_max, clip_min = ops.search_clip_range(gathered, num_bits)
        return clip_max, clip_min


class ValueHistogram:
    """A histogram (int64, 2.4 MiB) however much data there is; the bound is that of `search_clip_range_histogram`.

    Goes on from what `ExactValues` gathered before.
    """

    def add(self, gathered: Tensor, x: Tensor) -> Tensor:
        if is_histogram(gathered):
            result = gathered.clone()
        else:
            result = torch.zeros(_LENGTH, dtype=torch.int64, device=x.device)
            ops.range_histogram_(gathered, *_parts(result))
        ops.range_histogram_(x, *_parts(result))
        return result

    def clips(self, gathered: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        _, _, clip_max, clip_min, _ = ops.search_clip_range_histogram(*_parts(gathered), num_bits)
        return clip_max, clip_min


class CalibrationData:
    """The batches of one calibration that is under way: no state of the model, copied and pickled with it."""

    def __init__(self) -> None:
        self.method: CalibrationMethod = ExactValues()  # how to gather, as `configure` says
        self.data: Tensor | None = None
        self.batches = 0  # taken so far

    def add(self, x: Tensor, num_bits: int, last: bool, layer: str) -> tuple[Tensor, Tensor]:
        """Take a batch; the clips (maximum, minimum): of the batch itself or, with the last one, of all.

        A single batch is searched as it is, whichever way was asked for: nothing need be kept. A calibration that has
        begun as a histogram stays one, for its values are gone. Errors: InvalidDataError where values are not finite;
        the batch is not taken then.
        """
        data = None
        if last and self.data is None:
            clip_max, clip_min = batch_range(x, num_bits, search=True)
        else:
            way = ValueHistogram() if self.is_histogram else self.method
            data = way.add(x.new_zeros(0) if self.data is None else self.data.to(x.device), x)
            clip_max, clip_min = way.clips(data, num_bits) if last else batch_range(x, num_bits, search=False)
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(clip_max) & torch.isfinite(clip_min)):
            raise InvalidDataError(f"layer '{layer}': its input holds NaN or Inf, no clip range can be found")
        self.data = None if last else data
        self.batches += 1
        return clip_max, clip_min

    def clear(self) -> None:
        """Forget what was gathered."""
        self.data, self.batches = None, 0

    def resume(self, data: Tensor, batches: int) -> None:
        """Go on from data that were gathered elsewhere."""
        self.data, self.batches = data.clone(), batches

    @property
    def is_histogram(self) -> bool:
        """Whether the batches so far are in a histogram."""
        return self.data is not None and is_histogram(self.data)


def batch_range(x: Tensor, num_bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """The clips (maximum, minimum) for one batch: those that the range search finds, or the extremes."""
    return ExactValues().clips(x, num_bits) if search else (x.max(), x.min())


def is_histogram(gathered: Tensor) -> bool:
    """Whether the tensor holds a histogram; its dtype tells."""
    return gathered.dtype == torch.int64


def is_resumable(gathered: Tensor) -> bool:
    """Whether this version of the library can go on with what another one gathered."""
    kept = gathered.numel() == _LENGTH if is_histogram(gathered) else gathered.is_floating_point()
    return kept and gathered.dim() == 1


def _parts(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Histogram and extremes as views of what was gathered."""
    return gathered[: 2 * BINS].view(BINS, 2), gathered[2 * BINS :].view(torch.float32).view(2, _EXTREMES)
