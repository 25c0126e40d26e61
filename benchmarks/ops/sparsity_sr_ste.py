"""Rows of SR-STE: the gradient of masked weights with their decay."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.row import WEIGHTS, Calls, Row, Shape, add, compiled


def eager(grad: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    return grad + 2e-4 * torch.where(mask, 0.0, w)


def _backward(shape: Shape, dtype: torch.dtype) -> Calls:
    w, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = ops.mask_2to4(w)
    return Calls(
        ours=partial(ops.sr_ste_backward, grad, w, mask),
        floor=add(w, grad),
        floor_name="add(out=)",
        eager=partial(eager, grad, w, mask),
        inductor=compiled(eager, grad, w, mask),
    )


ROWS = [Row("sr-ste backward", shape, torch.float32, _backward) for shape in WEIGHTS]
