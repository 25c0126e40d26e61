"""Products of 8-bit codes: 32-bit sums, one rounding to float32 at the end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from amct_ext.ops._checks import check_dtype, require
from amct_ext.ops._registration import reference
from amct_ext.ops.integer_accumulators import (
    check_conv2d,
    check_linear,
    conv2d_sums,
    empty_conv2d,
    empty_linear,
    linear_sums,
)
from amct_ext.ops.integer_codes import memory_format, ulq_quantize_reference

__all__ = ["integer_conv2d", "integer_conv2d_codes", "integer_linear"]


def integer_conv2d(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    channels_last: bool = False,
    addend: Tensor | None = None,
    lowest: float | None = None,
    highest: float | None = None,
) -> Tensor:
    """2-D convolution of codes: exact integer sums, times the scales, plus the bias, rounded to float32 once.

    What often follows a convolution can be had in the same pass: a normalisation by fixed statistics as part of
    w_scale and bias, which may be float64, the addition of another tensor, an activation function that limits values.

    Args:
        codes, x_scale, x_offset: as `ulq_quantize` returns them; codes (images, channels, height, width).
        packed, sums: of `pack_weight`.
        w_scale: the scale given to `pack_weight`; one value or one per output channel.
        bias: one value per output channel, or None.
        kernel_size, stride, padding, dilation: (height, width) each; padding is with the code of zero.
        channels_last: memory layout of the result.
        addend: float32 with the shape of the result, added to what was rounded.
        lowest, highest: bounds of the sum; NaN stays NaN.

    Returns: float32. Without an addend equal to the convolution of the fake-quantised tensors in exact arithmetic,
        rounded once, provided that the sums fit 32 bits (up to 65793 weights per output channel).

    Gradients: none.

    Errors: TypeError (dtypes), ValueError (shapes).

    Source: INT8 inference as devices do it (Jacob et al. 2018), scales per channel.

        >>> from amct_ext.ops import pack_weight, ulq_quantize
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> codes, scale, offset, *_ = ulq_quantize(torch.ones(1, 1, 2, 2), one, 0 * one, none, none)
        >>> packed, sums = pack_weight(torch.ones(1, 1, 2, 2), torch.tensor([1 / 127]))
        >>> w_scale = torch.tensor([1 / 127])
        >>> integer_conv2d(codes, scale, offset, packed, sums, w_scale, None, (2, 2)).flatten().tolist()
        [4.0]
    """
    return torch.ops.amct_ext.integer_conv2d(
        codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation,
        channels_last, addend, lowest, highest,
    )  # fmt: skip


def integer_conv2d_codes(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ulq_quantize` of `integer_conv2d`, whose floats are never written.

    Args: up to highest as `integer_conv2d`, the clips and what follows as `ulq_quantize`.

    Returns: as `ulq_quantize`, bit for bit what the two ops give.

    Gradients: none.

    Errors: TypeError (dtypes), ValueError (shapes, num_bits).

    Source: as `integer_conv2d`, the quantisation between two layers (requantisation).

        >>> from amct_ext.ops import pack_weight, ulq_quantize
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> clips = (one, 0 * one, none, none)
        >>> codes, scale, offset, *_ = ulq_quantize(torch.ones(1, 1, 2, 2), *clips)
        >>> packed, sums = pack_weight(torch.ones(1, 1, 1, 1), torch.tensor([1 / 64]))
        >>> product = (codes, scale, offset, packed, sums, torch.tensor([1 / 64]), None)
        >>> geometry = ((1, 1), (1, 1), (0, 0), (1, 1))
        >>> integer_conv2d_codes(*product, *geometry, 0.0, None, *clips)[0].flatten().tolist()
        [255, 255, 255, 255]
    """
    return torch.ops.amct_ext.integer_conv2d_codes(
        codes, x_scale, x_offset, packed, sums, w_scale, bias, kernel_size, stride, padding, dilation, lowest,
        highest, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min,
    )  # fmt: skip


def integer_linear(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer on codes: exact integer sums, times the scales, plus the bias, rounded to float32 once.

    Args: as `integer_conv2d`; codes (..., inputs).

    Returns: float32 (..., outputs).

    Gradients: none.

    Errors: TypeError (dtypes), ValueError (shapes).

    Source: as `integer_conv2d`.

        >>> from amct_ext.ops import pack_weight, ulq_quantize
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> codes, scale, offset, *_ = ulq_quantize(torch.ones(1, 2), one, 0 * one, none, none)
        >>> w_scale = torch.tensor([1 / 127])
        >>> packed, sums = pack_weight(torch.ones(3, 2), w_scale)
        >>> integer_linear(codes, scale, offset, packed, sums, w_scale, torch.ones(3)).tolist()
        [[3.0, 3.0, 3.0]]
    """
    return torch.ops.amct_ext.integer_linear(codes, x_scale, x_offset, packed, sums, w_scale, bias)


def _check_addend(op: str, addend: Tensor, y: Tensor) -> None:
    check_dtype(op, "addend", addend, torch.float32)
    require(
        addend.shape == y.shape,
        ValueError,
        lambda: f"{op}: addend must have the shape of the result, {list(y.shape)}, not {list(addend.shape)}",
    )


def _empty_conv2d(
    codes: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    channels_last: bool,
    addend: Tensor | None,
    **_: object,
) -> Tensor:
    y = empty_conv2d(codes, sums, kernel_size, stride, padding, dilation, torch.float32, channels_last)
    if addend is not None:
        _check_addend("integer_conv2d", addend, y)
    return y


@reference("integer_conv2d", check=check_conv2d, empty=_empty_conv2d)
def integer_conv2d_reference(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    channels_last: bool = False,
    addend: Tensor | None = None,
    lowest: float | None = None,
    highest: float | None = None,
) -> Tensor:
    total = conv2d_sums(codes, x_offset, packed, sums, kernel_size, stride, padding, dilation)
    scale = x_scale.reshape(()).to(torch.float64) * w_scale.reshape(-1).to(torch.float64)
    y = total * scale.view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.to(torch.float64).view(1, -1, 1, 1)
    y = y.to(torch.float32)
    if addend is not None:
        _check_addend("integer_conv2d", addend, y)
        y = y + addend
    if lowest is not None:
        y = torch.where(y < lowest, torch.full_like(y, lowest), y)
    if highest is not None:
        y = torch.where(y > highest, torch.full_like(y, highest), y)
    return y.contiguous(memory_format=memory_format(channels_last))


def _empty_conv2d_codes(**arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return ulq_quantize_reference.fake(x=integer_conv2d_reference.fake(**arguments), **arguments)


@reference("integer_conv2d_codes", empty=_empty_conv2d_codes)
def integer_conv2d_codes_reference(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    product = (codes, x_scale, x_offset, packed, sums, w_scale, bias)
    geometry = (kernel_size, stride, padding, dilation)
    y = integer_conv2d_reference(*product, *geometry, lowest=lowest, highest=highest)
    return ulq_quantize_reference(y, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min)


@reference("integer_linear", check=check_linear, empty=partial(empty_linear, dtype=torch.float32))
def integer_linear_reference(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    total = linear_sums(codes, x_offset, packed, sums)
    y = total * (x_scale.reshape(()).to(torch.float64) * w_scale.reshape(-1).to(torch.float64))
    if bias is not None:
        y = y + bias.to(torch.float64)
    return y.to(torch.float32)
