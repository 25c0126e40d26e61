"""Row of the shift search."""

from __future__ import annotations

from functools import partial

import torch

from amct_ext import ops
from benchmarks.ops.row import ACTIVATIONS, Calls, Row, Shape, copy


def _shift(shape: Shape, dtype: torch.dtype) -> Calls:
    x = torch.randn(shape).to(dtype)
    errors, scale = torch.zeros(shape[1], 16, dtype=torch.float64), torch.full((shape[1],), 1e-4)
    return Calls(ours=partial(ops.shift_error_, x, scale, errors), floor=copy(x))


ROWS = [Row("shift search", ACTIVATIONS[0], torch.float32, _shift)]
