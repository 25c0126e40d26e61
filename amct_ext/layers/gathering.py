"""How a calibration of several batches gathers its data, in one buffer: all values, or a histogram of fixed size."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.ops.histogram import BINS

_EXTREMES = 1024  # on either side: an exact percentile for up to 1.02e9 values
_LENGTH = 2 * BINS + _EXTREMES


class Gathering(Protocol):
    """A way to gather batches; ``gathered`` is the buffer, empty at the start."""

    def add(self, gathered: Tensor, x: Tensor) -> Tensor:
        """A new buffer with the values of ``x`` (float32 or float64, one dimension) added."""

    def clips(self, gathered: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        """The clips (maximum, minimum) that the range search finds; NaN where values were not finite."""


class Values:
    """All values: the range is that of one search over all batches at once; memory grows with every batch."""

    def add(self, gathered: Tensor, x: Tensor) -> Tensor:
        return torch.cat([gathered.to(x), x])

    def clips(self, gathered: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
        _, _, clip_max, clip_min = ops.search_clip_range(gathered, num_bits)
        return clip_max, clip_min


class Histogram:
    """A histogram (int64, 2.4 MiB) however much data there is; the bound is that of `search_clip_range_histogram`.

    Goes on from what `Values` gathered before.
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


def take_batch(
    asked: Gathering, gathered: Tensor, x: Tensor, num_bits: int, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a batch: (new buffer, clip_max, clip_min), the range of the batch itself or, with the last one, of all.

    A single batch is searched as it is, whichever way was asked for: nothing need be kept. A calibration that has
    begun as a histogram stays one, for its values are gone.
    """
    if last and gathered.numel() == 0:
        return gathered, *Values().clips(x, num_bits)
    way = Histogram() if is_histogram(gathered) else asked
    gathered = way.add(gathered, x)
    return (x.new_zeros(0), *way.clips(gathered, num_bits)) if last else (gathered, x.max(), x.min())


def is_histogram(gathered: Tensor) -> bool:
    """Whether the buffer holds a histogram; its dtype tells, so that a checkpoint needs no further entry."""
    return gathered.dtype == torch.int64


def fits(gathered: Tensor) -> bool:
    """Whether this version of the library can go on with a buffer."""
    kept = gathered.numel() == _LENGTH if is_histogram(gathered) else gathered.is_floating_point()
    return kept and gathered.dim() == 1


def _parts(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Histogram and extremes as views of the buffer."""
    return gathered[: 2 * BINS].view(BINS, 2), gathered[2 * BINS :].view(torch.float32).view(2, _EXTREMES)
