"""Inputs that every op test runs over: dtypes, odd sizes, memory layouts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ULQ_CLIPS = ((1.7, -0.9), (0.0, -1.0), (2.0, 0.0), (30.0, -20.0), (1e-9, 0.0))  # upper, lower
SHAPES = ((0,), (1,), (7,), (17,), (65537,), (3, 5, 7), (8, 6, 3, 3), (5, 1, 1, 1), (2, 0, 3))


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values in other memory layouts, and a slice with holes."""
    yield x
    if x.dim() > 1:
        yield x.transpose(0, -1)
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
    if x.shape[-1] > 1:
        yield x[..., ::2]


def inputs(dtype: torch.dtype, device: torch.device, scale: float = 2.0) -> Iterator[Tensor]:
    """Normal data of every shape in every layout."""
    for shape in SHAPES:
        yield from layouts((torch.randn(shape) * scale).to(device=device, dtype=dtype))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values, dtype and shape; NaN equals NaN, and the signs of zeros agree."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    nan = a.isnan()
    return bool(
        torch.equal(nan, b.isnan())
        and torch.equal(a[~nan], b[~nan])
        and torch.equal(torch.signbit(a[~nan]), torch.signbit(b[~nan]))
    )


def layout(x: Tensor) -> tuple[int, ...]:
    """Strides of the axes that have more than one element (none for an empty tensor)."""
    if x.numel() == 0:
        return ()
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)


def axes_of(x: Tensor) -> list[int | None]:
    return [None, *range(x.dim())]


def scalars(*values: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """0-dim tensors."""
    return [torch.tensor(v, device=device, dtype=dtype) for v in values]


def special_rows(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights of 40 rows of every length with special values, a mask and a scale per row.

    Kernels go by registers: a value that needs care may lie in a whole one, in the last one, or in a short row.
    """
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor([-0.0, 0.0, tiny, -tiny, tiny / 4, -tiny / 4, math.inf, -math.inf, math.nan], dtype=dtype)
    for length in (1, 3, 9, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200):
        w = torch.randn(40, length, dtype=torch.float64).to(dtype)
        for row in range(1, 40):
            w[row, torch.randint(0, length, (1 + row // 8,))] = special[torch.randint(0, 9, (1 + row // 8,))]
        w[30:] = special[torch.randint(0, 6, (10, length))]
        mask = torch.rand(w.shape) > 0.3
        yield w.to(device), mask.to(device), torch.rand(40).add(0.01).to(device)


def output_axis(item: dict[str, Any]) -> int | None:
    """The channel axis of a weight in AMCT's data, None where it has one scale."""
    if not item["channel_wise"]:
        return None
    return 1 if "Transpose" in item["module_type"] else 0
