"""Rows of ULQ's backward behind a ReLU with a second reader, against its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops.activation_ulq import clips, eager_backward
from benchmarks.ops.row import ACTIVATIONS, Calls, Row, Shape, add, compiled


def _written_out(grad: Tensor, y: Tensor, addend: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy, d_high, d_low = eager_backward(grad, y, high, low)
    return torch.where(y <= 0, torch.zeros_like(y), addend + dy), d_high, d_low


def _build(shape: Shape, dtype: torch.dtype) -> Calls:
    grad, addend, y = torch.randn(shape), torch.randn(shape), torch.randn(shape).relu()
    high, low, _ = clips()

    def ours() -> None:
        ops.ulq_clip_gradients(grad, y, high, low)
        ops.ulq_relu_backward(grad, y, addend, high, low)

    def separate() -> None:
        dy, _, _ = ops.ulq_fake_quantize_backward(grad, y, high, low)
        torch.ops.aten.threshold_backward(dy.add_(addend), y, 0)

    return Calls(
        ours=ours,
        floor=add(grad, y),
        floor_name="add(out=)",
        limit=2.5,
        eager=separate,
        inductor=compiled(_written_out, grad, y, addend, high, low),
    )


ROWS = [Row("ulq and ReLU backward, two readers", shape, torch.float32, _build) for shape in ACTIVATIONS]
