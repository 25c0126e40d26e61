"""Rows of the repair of learned scales, where no scale needs one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops import weight_lsq
from benchmarks.ops.row import Calls, Shape, compiled, copy, rows, weights


def eager(w: Tensor, scale: Tensor) -> Tensor:
    left = weight_lsq.eager(w, scale).flatten(1).square().sum(1)
    return 100 * left < w.flatten(1).square().sum(1)


def _repair(shape: Shape, dtype: torch.dtype) -> Calls:
    w, scale = torch.randn(shape).to(dtype), torch.full(shape[:1], 0.03)
    near = scale.to(dtype)
    return Calls(
        ours=partial(ops.repair_weight_scale_, w, scale, 8, 0),
        floor=copy(w),
        eager=partial(eager, w, near),
        inductor=compiled(eager, w, near),
    )


ROWS = list(rows("scale repair", weights, _repair))
