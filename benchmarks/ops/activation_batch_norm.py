"""Rows of BatchNorm with what follows it, against torch's ops one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from amct_ext import ops
from benchmarks.ops.row import ACTIVATIONS, Calls, Row, Shape, add, compiled, copy

EPS = 1e-5


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.batch_norm_statistics_(x, None, None, 0.1, EPS)


def separate(x: Tensor, weight: Tensor, bias: Tensor, clips: tuple[Any, ...]) -> Tensor:
    """Torch's ops, and the quantiser by itself."""
    z = functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return ops.ulq_fake_quantize(functional.relu6(z), *clips)[0]


def written_out(x: Tensor, weight: Tensor, bias: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """What a compiler can fuse."""
    z = functional.relu6(functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS))
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(z / scale + offset), -128, 127) - offset) * scale


def _forward(shape: Shape, dtype: torch.dtype) -> Calls:
    x, weight, bias = torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    high, low, none = torch.tensor(2.0), torch.tensor(-0.5), torch.tensor(math.nan)

    def ours() -> Tensor:
        mean, invstd = statistics(x)
        return ops.batch_norm_ulq(x, mean, invstd, weight, bias, "none", 0.0, 6.0, high, low, none, none)[0]

    return Calls(
        ours=ours,
        floor=copy(x),
        limit=2.0,
        eager=partial(separate, x, weight, bias, (high, low, none, none)),
        inductor=compiled(written_out, x, weight, bias, high, low),
    )


def _backward(shape: Shape, dtype: torch.dtype) -> Calls:
    x, weight, bias = torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    high, low, none = torch.tensor(2.0), torch.tensor(-0.5), torch.tensor(math.nan)
    grad, (mean, invstd) = torch.randn(shape), statistics(x)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, high, low)]

    def gradients_of(function: Callable[..., Tensor], *arguments: object) -> Callable[[], object]:
        y = function(*arguments)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    return Calls(
        ours=lambda: ops.batch_norm_ulq_backward(grad, x, mean, invstd, weight, bias, "none", 0.0, 6.0, high, low),
        floor=add(grad, x),
        floor_name="add(out=)",
        limit=2.0,
        eager=gradients_of(separate, *leaves[:3], (*leaves[3:], none, none)),
    )


ROWS = [
    Row(name, shape, torch.float32, build)
    for name, build in (("BatchNorm, ReLU6, ulq forward", _forward), ("BatchNorm, ReLU6, ulq backward", _backward))
    for shape in ACTIVATIONS
]
