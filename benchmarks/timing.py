"""What the op benchmarks share: sizes, rivals written in plain torch, the floor, and how a row is recorded."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ACTIVATIONS = ((32, 64, 56, 56), (8, 256, 56, 56))
WEIGHTS = ((512, 512, 3, 3), (4096, 1024))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HIGH, LOW = 2.0, -1.5
EPS = torch.finfo(torch.float32).eps
Call = Callable[[], object]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_ms(call: Call, seconds: float = 0.4, least: int = 3, most: int = 200) -> float:
    """Median time of a call after two warm-up calls."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def in_turns(calls: Sequence[Call], seconds: float, least: int = 3, in_a_row: int = 4) -> list[list[float]]:
    """Milliseconds of every call in every round. Calls take turns, so a neighbour's load shows in all of them; a round
    is the median of a few calls in a row after one that brings back the caches, and the first round warms up."""

    def once(call: Call) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    rounds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    while len(rounds[0]) <= least or time.perf_counter() < end:
        for times, call in zip(rounds, calls, strict=True):
            call()
            times.append(statistics.median(once(call) for _ in range(in_a_row)))
    return [times[1:] for times in rounds]


def times_slower(times: Sequence[float], than: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, than, strict=True))


def clips(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(HIGH, dtype=dtype), torch.tensor(LOW, dtype=dtype), torch.tensor(math.nan, dtype=dtype)


def eager_ulq(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """ULQ forward, one tensor operation after the other, with the check that AMCT makes."""
    if not torch.isfinite(x).all():
        raise RuntimeError("not finite")
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale + offset), -128, 127) - offset) * scale


def written_out_ulq(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The same without the check: what a compiler can fuse."""
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale + offset), -128, 127) - offset) * scale


def eager_ulq_backward(g: Tensor, x: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    above, below = x > scale * (127 - offset), x < scale * (-128 - offset)
    z = torch.where(above, high, torch.where(below, low, x)) / scale
    error = (torch.round(z) - z) / 255
    dx = torch.where(above | below, torch.zeros_like(g), g)
    return dx, ((error + above.to(g.dtype)) * g).sum(), ((below.to(g.dtype) - error) * g).sum()


def eager_arq(w: Tensor) -> tuple[Tensor, Tensor]:
    rows = w.flatten(1)
    high, low = rows.amax(1), rows.amin(1)
    limit = torch.where(high.abs() < low.abs(), 128.0, 127.0).to(w.dtype)
    scale = torch.maximum(high.abs(), low.abs()) / limit
    scale = torch.where(scale < EPS, torch.ones_like(scale), scale)
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    return torch.clamp(torch.round(w / shaped), -128, 127) * shaped, scale


def eager_lsq(w: Tensor, scale: Tensor) -> Tensor:
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    return torch.clamp(torch.round(w / shaped), -128, 127) * shaped


def eager_lsq_backward(g: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    shaped = scale.view(-1, *[1] * (w.dim() - 1))
    z = w / shaped
    slope = torch.where(z < -128, -128.0, torch.where(z > 127, 127.0, torch.round(z) - z))
    return (slope * g).flatten(1).sum(1) / math.sqrt(w[0].numel() * 127)


def eager_mask(w: Tensor) -> Tensor:
    groups = w.abs().movedim(1, -1).unflatten(-1, (-1, 4))
    drop = groups.topk(2, largest=False).indices
    return torch.ones_like(groups).scatter_(-1, drop, 0).flatten(-2).movedim(-1, 1)


def written_out_mask(w: Tensor) -> Tensor:
    """The selection by comparisons: what a compiler can fuse (topk is not)."""
    a, b, c, d = w.abs().movedim(1, -1).unflatten(-1, (-1, 4)).unbind(-1)
    keep = torch.stack(
        [
            (b > a).int() + (c > a) + (d > a) < 2,
            (a >= b).int() + (c > b) + (d > b) < 2,
            (a >= c).int() + (b >= c) + (d > c) < 2,
            (a >= d).int() + (b >= d) + (c >= d) < 2,
        ],
        -1,
    )
    return keep.flatten(-2).movedim(-1, 1).to(w.dtype)


def eager_search(x: Tensor) -> Tensor:
    """The 61 candidates as the reference toolkit evaluates them."""
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
