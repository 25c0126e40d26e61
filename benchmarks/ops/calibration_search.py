"""Rows of the range search."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.row import ACTIVATIONS, Calls, Row, Shape, copy


def eager(x: Tensor) -> Tensor:
    """The 61 candidates as AMCT evaluates them."""
    values = x.flatten()
    rank = values.numel() - int(0.999999 * values.numel())
    largest, smallest = values.topk(rank).values[-1], values.topk(rank, largest=False).values[-1]
    bound = torch.maximum(largest.clamp_min(0), -smallest.clamp_max(0))
    losses, scales = [], []
    for ratio in torch.arange(0.7, 1.3, 0.01):
        end = ratio * bound
        scale = end / 127
        losses.append((torch.round(torch.clamp(values, -end, end) / scale) * scale - values).square().mean())
        scales.append(scale)
    return torch.stack(scales)[torch.stack(losses).argmin()]


def _search(x: Tensor) -> Calls:
    return Calls(ours=partial(ops.search_clip_range, x), floor=copy(x), limit=20.0, eager=partial(eager, x))


def _normal(shape: Shape, dtype: torch.dtype) -> Calls:
    return _search(torch.randn(shape).to(dtype))


def _relu(shape: Shape, dtype: torch.dtype) -> Calls:
    return _search(torch.randn(shape).to(dtype).relu())


ROWS = [
    Row("range search (normal)", ACTIVATIONS[0], torch.float32, _normal),
    Row("range search (relu)", ACTIVATIONS[0], torch.float32, _relu),
]
