"""The sums of integer products themselves: what a device has in its accumulators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._common import reference
from amct_ext.ops._integer import centred, check_geometry, check_product, unpacked


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


@reference("integer_conv2d_accumulators")
def _reference_conv2d(
    codes: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    op = "integer_conv2d_accumulators"
    check_geometry(op, codes, kernel_size, stride, padding, dilation)
    taps = kernel_size[0] * kernel_size[1]
    check_product(op, codes, {"x_offset": x_offset}, packed, sums, None, None, taps)
    weight = unpacked(packed, sums.numel(), codes.shape[1]).unflatten(2, tuple(kernel_size))
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    total = torch.nn.functional.conv2d(centred(codes, x_offset), weight, None, *geometry)
    return total.to(torch.int32).contiguous(memory_format=torch.channels_last)


@reference("integer_linear_accumulators")
def _reference_linear(codes: Tensor, x_offset: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    op = "integer_linear_accumulators"
    torch._check_value(codes.dim() >= 1, lambda: f"{op}: codes must have at least one dimension")
    check_product(op, codes, {"x_offset": x_offset}, packed, sums, None, None, 1)
    weight = unpacked(packed, sums.numel(), codes.shape[-1]).squeeze(2)
    return torch.nn.functional.linear(centred(codes, x_offset), weight).to(torch.int32)
