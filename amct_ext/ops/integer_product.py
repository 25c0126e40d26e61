"""Products of 8-bit codes: 32-bit sums, one rounding to float32 at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._common import reference
from amct_ext.ops._integer import centred, check_geometry, check_product, unpacked
from amct_ext.ops.integer_codes import reference_codes


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
        codes,
        x_scale,
        x_offset,
        packed,
        sums,
        w_scale,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        channels_last,
        addend,
        lowest,
        highest,
    )


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
        codes,
        x_scale,
        x_offset,
        packed,
        sums,
        w_scale,
        bias,
        kernel_size,
        stride,
        padding,
        dilation,
        lowest,
        highest,
        clip_max,
        clip_min,
        prev_clip_max,
        prev_clip_min,
        num_bits,
        fixed_min,
    )


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


def check_addend(op: str, addend: Tensor, y: Tensor) -> None:
    torch._check_type(addend.dtype == torch.float32, lambda: f"{op}: addend must be float32, not {addend.dtype}")
    torch._check_value(
        addend.shape == y.shape,
        lambda: f"{op}: addend must have the shape of the result, {list(y.shape)}, not {list(addend.shape)}",
    )


@reference("integer_conv2d")
def _reference_conv2d(
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
    op = "integer_conv2d"
    check_geometry(op, codes, kernel_size, stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    check_product(op, codes, {"x_scale": x_scale, "x_offset": x_offset}, packed, sums, w_scale, bias, taps)
    weight = unpacked(packed, sums.numel(), codes.shape[1]).unflatten(2, tuple(kernel_size))
    total = torch.nn.functional.conv2d(
        centred(codes, x_offset), weight, None, tuple(stride), tuple(padding), tuple(dilation)
    )
    scale = x_scale.reshape(()).to(torch.float64) * w_scale.reshape(-1).to(torch.float64)
    y = total * scale.view(1, -1, 1, 1)
    if bias is not None:
        y = y + bias.to(torch.float64).view(1, -1, 1, 1)
    y = y.to(torch.float32)
    if addend is not None:
        check_addend(op, addend, y)
        y = y + addend
    if lowest is not None:
        y = torch.where(y < lowest, torch.full_like(y, lowest), y)
    if highest is not None:
        y = torch.where(y > highest, torch.full_like(y, highest), y)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@reference("integer_conv2d_codes")
def _reference_conv2d_codes(
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
    geometry = (kernel_size, stride, padding, dilation)
    y = _reference_conv2d(
        codes, x_scale, x_offset, packed, sums, w_scale, bias, *geometry, False, None, lowest, highest
    )
    return reference_codes(y, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min)


@reference("integer_linear")
def _reference_linear(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    op = "integer_linear"
    torch._check_value(codes.dim() >= 1, lambda: f"{op}: codes must have at least one dimension")
    check_product(op, codes, {"x_scale": x_scale, "x_offset": x_offset}, packed, sums, w_scale, bias, 1)
    weight = unpacked(packed, sums.numel(), codes.shape[-1]).squeeze(2)
    total = torch.nn.functional.linear(centred(codes, x_offset), weight)
    y = total * (x_scale.reshape(()).to(torch.float64) * w_scale.reshape(-1).to(torch.float64))
    if bias is not None:
        y = y + bias.to(torch.float64)
    return y.to(torch.float32)
