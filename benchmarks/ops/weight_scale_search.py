"""Rows of the scale search: 32 scales a weight; the baseline tries them one by one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.ops.weight_scale_search import FACTORS
from benchmarks.ops import weight_arq
from benchmarks.ops.row import Calls, Shape, compiled, copy, rows, weights


def eager(w: Tensor) -> Tensor:
    by_range = weight_arq.eager(w)[1].view(-1, *[1] * (w.dim() - 1))
    best, scale = torch.full_like(by_range, torch.inf), by_range
    axes = tuple(range(1, w.dim()))
    for factor in FACTORS:
        tried = by_range * factor
        error = (torch.clamp(torch.round(w / tried), -8, 7) * tried - w).square().sum(axes, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    return scale


def _search(shape: Shape, dtype: torch.dtype) -> Calls:
    w = torch.randn(shape).to(dtype)
    return Calls(
        ours=partial(ops.search_weight_scale, w, 4, 0),
        floor=copy(w),
        eager=partial(eager, w),
        inductor=compiled(eager, w),
    )


ROWS = list(rows("scale search", weights, _search))
