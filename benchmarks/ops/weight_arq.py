"""Rows of ARQ: weights with the scale of their own range."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.row import EPS, Calls, Shape, cache_bytes, compiled, copy, rows, weights


def eager(w: Tensor) -> tuple[Tensor, Tensor]:
    rows = w.flatten(1)
    high, low = rows.amax(1), rows.amin(1)
    limit = torch.where(high.abs() < low.abs(), 128.0, 127.0).to(w.dtype)
    scale = torch.maximum(high.abs(), low.abs()) / limit
    scale = torch.where(scale < EPS, torch.ones_like(scale), scale)
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    return torch.clamp(torch.round(w / shaped), -128, 127) * shaped, scale


def _arq(shape: Shape, dtype: torch.dtype) -> Calls:
    w = torch.randn(shape).to(dtype)
    calls = Calls(
        ours=partial(ops.arq_fake_quantize, w, 8, 0),
        floor=copy(w),
        eager=partial(eager, w),
        inductor=compiled(eager, w),
        fresh=partial(torch.clone, w),
    )
    if dtype == torch.float32:
        scale, zero = torch.full(shape[:1], 0.03), torch.zeros(shape[0], dtype=torch.int32)
        calls.limit = 1.0 if 2 * w.nbytes < cache_bytes() else 1.15
        calls.torch_op = partial(torch.fake_quantize_per_channel_affine, w, scale, zero, 0, -128, 127)
    return calls


ROWS = list(rows("arq", weights, _arq))
