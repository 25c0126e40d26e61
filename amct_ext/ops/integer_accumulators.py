"""The sums of products of 8-bit codes: what a device has in its accumulators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._checks import check_dtype, check_floating, check_value, require
from amct_ext.ops._registration import reference
from amct_ext.ops.integer_codes import memory_format, packed_shape, unpacked

__all__ = ["integer_conv2d_accumulators", "integer_linear_accumulators"]


def integer_conv2d_accumulators(
    codes: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """The 32-bit sums of `integer_conv2d`, before scales and bias.

    Args: as `integer_conv2d`.

    Returns: int32 (images, outputs, height, width) in channels_last memory: sums of (code - offset) times weight code,
        exact up to 65793 weights per output channel.

    Gradients: none.

    Errors: TypeError (dtypes), ValueError (shapes).

    Source: as `integer_conv2d`.

        >>> from amct_ext.ops import pack_weight, ulq_quantize
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> codes, _, offset, *_ = ulq_quantize(torch.ones(1, 1, 2, 2), one, 0 * one, none, none)
        >>> packed, sums = pack_weight(torch.ones(1, 1, 2, 2), torch.tensor([1 / 127]))
        >>> integer_conv2d_accumulators(codes, offset, packed, sums, (2, 2)).flatten().tolist()
        [129540]
    """
    return torch.ops.amct_ext.integer_conv2d_accumulators(
        codes, x_offset, packed, sums, kernel_size, stride, padding, dilation
    )


def integer_linear_accumulators(codes: Tensor, x_offset: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    """The 32-bit sums of `integer_linear`, before scales and bias.

    Args: as `integer_linear`.

    Returns: int32 (..., outputs), as `integer_conv2d_accumulators`.

    Gradients: none.

    Errors: TypeError (dtypes), ValueError (shapes).

    Source: as `integer_conv2d`.

        >>> from amct_ext.ops import pack_weight, ulq_quantize
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> codes, _, offset, *_ = ulq_quantize(torch.ones(1, 2), one, 0 * one, none, none)
        >>> packed, sums = pack_weight(torch.ones(3, 2), torch.tensor([1 / 127]))
        >>> integer_linear_accumulators(codes, offset, packed, sums).tolist()
        [[64770, 64770, 64770]]
    """
    return torch.ops.amct_ext.integer_linear_accumulators(codes, x_offset, packed, sums)


def _check_product(
    op: str,
    inputs: int,
    taps: int,
    codes: Tensor,
    packed: Tensor,
    sums: Tensor,
    x_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Refuse what the product of codes cannot take. None: no such argument."""
    check_dtype(op, "codes", codes, torch.uint8)
    check_dtype(op, "packed", packed, torch.int8)
    check_dtype(op, "sums", sums, torch.int32)
    for name, value in (("x_scale", x_scale), ("x_offset", x_offset)):
        if value is not None:
            check_value(op, name, value)
    outputs = sums.numel()
    expected = packed_shape(outputs, inputs, taps)
    require(
        list(packed.shape) == expected,
        ValueError,
        lambda: f"{op}: packed must have shape {expected}, not {list(packed.shape)}",
    )
    if w_scale is not None:
        shape_of_scale = list(w_scale.shape)
        check_floating(op, "w_scale", w_scale)
        require(
            w_scale.numel() in (1, outputs),
            ValueError,
            lambda: f"{op}: w_scale must hold 1 or {outputs} values, not shape {shape_of_scale}",
        )
    if bias is not None:
        shape = list(bias.shape)
        check_floating(op, "bias", bias)
        require(
            bias.numel() == outputs, ValueError, lambda: f"{op}: bias must hold {outputs} values, not shape {shape}"
        )


def check_conv2d(
    op: str,
    codes: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    x_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
    **_: object,
) -> None:
    require(codes.dim() == 4, ValueError, lambda: f"{op}: codes must have four dimensions, not {codes.dim()}")
    require(
        all(len(pair) == 2 for pair in (kernel_size, stride, padding, dilation)),
        ValueError,
        lambda: f"{op}: kernel_size, stride, padding and dilation must hold two values each",
    )
    require(
        min(*kernel_size, *stride, *dilation) > 0 and min(padding) >= 0,
        ValueError,
        lambda: f"{op}: kernel_size, stride and dilation must be positive, padding not negative",
    )
    for size, kernel, pad, step in zip(codes.shape[2:], kernel_size, padding, dilation, strict=True):
        require(
            size + 2 * pad - step * (kernel - 1) - 1 >= 0,
            ValueError,
            lambda: f"{op}: the filter is larger than the padded input",
        )
    taps = kernel_size[0] * kernel_size[1]
    _check_product(op, codes.shape[1], taps, codes, packed, sums, x_scale, x_offset, w_scale, bias)


def check_linear(
    op: str,
    codes: Tensor,
    packed: Tensor,
    sums: Tensor,
    x_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    require(codes.dim() >= 1, ValueError, lambda: f"{op}: codes must have at least one dimension")
    _check_product(op, codes.shape[-1], 1, codes, packed, sums, x_scale, x_offset, w_scale, bias)


def empty_conv2d(
    codes: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype = torch.int32,
    channels_last: bool = True,
    **_: object,
) -> Tensor:
    sizes = zip(codes.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    height, width = ((size + 2 * pad - step * (k - 1) - 1) // each + 1 for size, k, each, pad, step in sizes)
    shape = (codes.shape[0], sums.numel(), height, width)
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=memory_format(channels_last))


def empty_linear(codes: Tensor, sums: Tensor, dtype: torch.dtype = torch.int32, **_: object) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], sums.numel()), dtype=dtype)


def _centered(codes: Tensor, x_offset: Tensor) -> Tensor:
    """Codes less the code of zero, float64."""
    offset = torch.where(x_offset.isnan(), torch.full_like(x_offset, -128), x_offset)
    return codes.to(torch.float64) - 128 - offset.reshape(()).to(torch.float64)


def conv2d_sums(
    codes: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Integers in float64, (images, outputs, height, width)."""
    weight = torch.unflatten(unpacked(packed, sums.numel(), codes.shape[1]), 2, tuple(kernel_size))
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    return torch.nn.functional.conv2d(_centered(codes, x_offset), weight, None, *geometry)


def linear_sums(codes: Tensor, x_offset: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    """Integers in float64, (..., outputs)."""
    weight = unpacked(packed, sums.numel(), codes.shape[-1]).squeeze(2)
    return torch.nn.functional.linear(_centered(codes, x_offset), weight)


@reference("integer_conv2d_accumulators", check=check_conv2d, empty=empty_conv2d)
def integer_conv2d_accumulators_reference(
    codes: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    total = conv2d_sums(codes, x_offset, packed, sums, kernel_size, stride, padding, dilation)
    return total.to(torch.int32).contiguous(memory_format=torch.channels_last)


@reference("integer_linear_accumulators", check=check_linear, empty=empty_linear)
def integer_linear_accumulators_reference(codes: Tensor, x_offset: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    return linear_sums(codes, x_offset, packed, sums).to(torch.int32)
