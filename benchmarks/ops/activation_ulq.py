"""Rows of ULQ: fake quantisation between learned clips, and its gradients."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.row import Calls, Shape, activations, add, compiled, copy, rows
from benchmarks.timing import Call

HIGH, LOW = 2.0, -1.5


def clips(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Upper and lower clip, and NaN for the previous ones."""
    return torch.tensor(HIGH, dtype=dtype), torch.tensor(LOW, dtype=dtype), torch.tensor(math.nan, dtype=dtype)


def eager(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """One tensor operation after the other, with the check that AMCT makes."""
    if not torch.isfinite(x).all():
        raise RuntimeError("not finite")
    return written_out(x, high, low)


def written_out(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """The same without the check: what a compiler can fuse."""
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    return (torch.clamp(torch.round(x / scale + offset), -128, 127) - offset) * scale


def eager_backward(g: Tensor, x: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = (high - low) / 255
    offset = torch.round(-128 - low / scale)
    above, below = x > scale * (127 - offset), x < scale * (-128 - offset)
    z = torch.where(above, high, torch.where(below, low, x)) / scale
    error = (torch.round(z) - z) / 255
    dx = torch.where(above | below, torch.zeros_like(g), g)
    return dx, ((error + above.to(g.dtype)) * g).sum(), ((below.to(g.dtype) - error) * g).sum()


def _learnable_backward(leaf: Tensor, g: Tensor) -> Call:
    scale = torch.tensor([3.5 / 255], requires_grad=True)
    zero = torch.tensor([0.0], requires_grad=True)
    y = torch._fake_quantize_learnable_per_tensor_affine(leaf, scale, zero, -128, 127, 1.0)
    return lambda: torch.autograd.grad(y, (leaf, scale, zero), g, retain_graph=True)


def _forward(shape: Shape, dtype: torch.dtype) -> Calls:
    x = torch.randn(shape).to(dtype)
    high, low, none = clips()
    near = (high.to(dtype), low.to(dtype))
    calls = Calls(
        ours=partial(ops.ulq_fake_quantize, x, high, low, none, none),
        floor=copy(x),
        eager=partial(eager, x, *near),
        inductor=compiled(written_out, x, *near) if shape == activations(dtype)[0] else None,
        fresh=partial(torch.clone, x),
    )
    if dtype == torch.float32:
        scale, zero = torch.tensor([3.5 / 255]), torch.tensor([0.0])
        calls.limit = 1.10
        calls.torch_op = partial(torch._fake_quantize_learnable_per_tensor_affine, x, scale, zero, -128, 127, 1.0)
    return calls


def _backward(shape: Shape, dtype: torch.dtype) -> Calls:
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    high, low, _ = clips()
    near = (high.to(dtype), low.to(dtype))
    calls = Calls(
        ours=partial(ops.ulq_fake_quantize_backward, g, x, high, low),
        floor=add(x, g),
        floor_name="add(out=)",
        eager=partial(eager_backward, g, x, *near),
        inductor=compiled(eager_backward, g, x, *near) if shape == activations(dtype)[0] else None,
    )
    if dtype == torch.float32:
        calls.limit = 1.30
        calls.torch_op = _learnable_backward(x.clone().requires_grad_(), g)
    return calls


ROWS = [*rows("ulq forward", activations, _forward), *rows("ulq backward", activations, _backward)]
