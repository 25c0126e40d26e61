"""What the references of products of codes share: checks, and codes as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._common import check_floating, check_scalar
from amct_ext.ops.integer_codes import COLUMNS


def unpacked(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The codes as (outputs, inputs, taps), float64."""
    rows = packed.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    return rows[:outputs, :inputs].to(torch.float64)


def check_product(
    op: str,
    codes: Tensor,
    scalars: dict[str, Tensor],
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    taps: int,
) -> None:
    """Refuse what the product of codes cannot take; its op's own scalars by name."""
    torch._check_type(codes.dtype == torch.uint8, lambda: f"{op}: codes must be uint8, not {codes.dtype}")
    torch._check_type(packed.dtype == torch.int8, lambda: f"{op}: packed must be int8, not {packed.dtype}")
    torch._check_type(sums.dtype == torch.int32, lambda: f"{op}: sums must be int32, not {sums.dtype}")
    for name, value in scalars.items():
        check_floating(op, name, value)
        check_scalar(op, name, value)
    outputs, inputs = sums.numel(), codes.shape[1 if op.startswith("integer_conv2d") else -1]
    expected = [-(-outputs // COLUMNS), taps, -(-inputs // 4), COLUMNS, 4]
    torch._check_value(
        list(packed.shape) == expected, lambda: f"{op}: packed must have shape {expected}, not {list(packed.shape)}"
    )
    if w_scale is not None:
        shape_of_scale = list(w_scale.shape)
        check_floating(op, "w_scale", w_scale)
        torch._check_value(
            w_scale.numel() in (1, outputs),
            lambda: f"{op}: w_scale must hold 1 or {outputs} values, not shape {shape_of_scale}",
        )
    if bias is not None:
        shape = list(bias.shape)
        check_floating(op, "bias", bias)
        torch._check_value(bias.numel() == outputs, lambda: f"{op}: bias must hold {outputs} values, not shape {shape}")


def check_geometry(
    op: str,
    codes: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Refuse what no convolution of codes has."""
    torch._check_value(codes.dim() == 4, lambda: f"{op}: codes must have four dimensions, not {codes.dim()}")
    torch._check_value(
        all(len(pair) == 2 for pair in (kernel_size, stride, padding, dilation)),
        lambda: f"{op}: kernel_size, stride, padding and dilation must hold two values each",
    )
    torch._check_value(
        min(*kernel_size, *stride, *dilation) > 0 and min(padding) >= 0,
        lambda: f"{op}: kernel_size, stride and dilation must be positive, padding not negative",
    )
    for size, kernel, pad, step in zip(codes.shape[2:], kernel_size, padding, dilation, strict=True):
        torch._check_value(
            size + 2 * pad - step * (kernel - 1) - 1 >= 0,
            lambda: f"{op}: the filter is larger than the padded input",
        )


def centred(codes: Tensor, x_offset: Tensor) -> Tensor:
    """Codes less the code of zero, float64."""
    offset = torch.where(x_offset.isnan(), torch.full_like(x_offset, -128), x_offset)
    return codes.to(torch.float64) - 128 - offset.reshape(()).to(torch.float64)
