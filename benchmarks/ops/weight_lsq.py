"""Rows of LSQ: weights with learned scales, and the gradient of the scales."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.row import Calls, Shape, add, compiled, copy, rows, weights


def eager(w: Tensor, scale: Tensor) -> Tensor:
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    return torch.clamp(torch.round(w / shaped), -128, 127) * shaped


def eager_backward(g: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    z = w / shaped
    slope = torch.where(z < -128, -128.0, torch.where(z > 127, 127.0, torch.round(z) - z))
    return (slope * g).flatten(1).sum(1) / math.sqrt(w[0].numel() * 127)


def _forward(shape: Shape, dtype: torch.dtype) -> Calls:
    w, scale = torch.randn(shape).to(dtype), torch.full(shape[:1], 0.03)
    near = scale.to(dtype)
    return Calls(
        ours=partial(ops.lsq_fake_quantize, w, scale, 8, 0),
        floor=copy(w),
        limit=1.10 if dtype == torch.float32 else None,
        eager=partial(eager, w, near),
        inductor=compiled(eager, w, near),
        fresh=partial(torch.clone, w),
    )


def _backward(shape: Shape, dtype: torch.dtype) -> Calls:
    w, g, scale = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.full(shape[:1], 0.03)
    near = scale.to(dtype)
    return Calls(
        ours=partial(ops.lsq_fake_quantize_backward, g, w, scale, 8, 0),
        floor=add(w, g),
        floor_name="add(out=)",
        limit=1.30 if dtype == torch.float32 else None,
        eager=partial(eager_backward, g, w, near),
        inductor=compiled(eager_backward, g, w, near),
    )


ROWS = [*rows("lsq forward", weights, _forward), *rows("lsq backward", weights, _backward)]
