"""What every op gives for tensors without values: the errors, shapes, types and strides of its kernels.

Tracers (torch.compile, torch.export, meta tensors) ask these rules once a call, so they compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops import activation_ulq as ulq
from amct_ext.ops import calibration_histogram as histogram_ops
from amct_ext.ops import calibration_search as search
from amct_ext.ops import calibration_shift as shift
from amct_ext.ops import integer_codes as code_ops
from amct_ext.ops import sparsity_mask as masks
from amct_ext.ops import sparsity_weight as sparse
from amct_ext.ops import weight_arq as weights
from amct_ext.ops import weight_lsq as lsq
from amct_ext.ops._common import abstract, accumulate_type, check_axis, check_bits, check_floating
from amct_ext.ops._integer import check_geometry, check_product
from amct_ext.ops.integer_product import check_addend

Quantised = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _scalar(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device=like.device)


def _scales(w: Tensor, channel_axis: int | None) -> Tensor:
    return w.new_empty(1 if channel_axis is None else w.shape[channel_axis], dtype=accumulate_type(w))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# -- activations


def _used(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scale, offset, clips, invalid."""
    scale, offset, clip_max, clip_min = (_scalar(x, dtype) for _ in range(4))
    return scale, offset, clip_max, clip_min, _scalar(x, torch.bool)


@abstract("ulq_fake_quantize")
def _ulq(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> Quantised:
    ulq.check_activation("ulq_fake_quantize", x, (clip_max, clip_min, prev_clip_max, prev_clip_min), num_bits)
    return torch.empty_like(x), *_used(x, clip_max.dtype)


@abstract("ulq_fake_quantize_")
def _ulq_with_state(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    scale: Tensor,
    offset: Tensor,
    invalid: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "ulq_fake_quantize_"
    ulq.check_activation(op, x, (clip_max, clip_min, prev_clip_max, prev_clip_min), num_bits)
    ulq.check_state(op, scale, offset, invalid)
    return torch.empty_like(x), _scalar(x, clip_max.dtype), _scalar(x, clip_max.dtype)


@abstract("ulq_fake_quantize_backward")
def _ulq_backward(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    ulq.check_backward("ulq_fake_quantize_backward", grad, x, clip_max, clip_min, num_bits)
    dx = torch.empty_like(x, dtype=grad.dtype)
    return dx, _scalar(x, clip_max.dtype), _scalar(x, clip_min.dtype)


@abstract("search_clip_range")
def _search(x: Tensor, num_bits: int = 8, with_offset: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    search.check_search("search_clip_range", x, num_bits)
    scale, offset, clip_max, clip_min = (_scalar(x, accumulate_type(x)) for _ in range(4))
    return scale, offset, clip_max, clip_min


@abstract("range_histogram_")
def _histogram(x: Tensor, histogram: Tensor, extremes: Tensor) -> None:
    check_floating("range_histogram_", "x", x)
    histogram_ops.check_histogram("range_histogram_", histogram, extremes)


@abstract("search_clip_range_histogram")
def _search_histogram(
    histogram: Tensor, extremes: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    histogram_ops.check_histogram("search_clip_range_histogram", histogram, extremes)
    check_bits("search_clip_range_histogram", num_bits)
    scale, offset, clip_max, clip_min = (_scalar(histogram, torch.float32) for _ in range(4))
    return scale, offset, clip_max, clip_min, _scalar(histogram, torch.float64)


# -- weights


@abstract("arq_fake_quantize")
def _arq(w: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    weights.check_weight("arq_fake_quantize", w, num_bits, channel_axis)
    return torch.empty_like(w), _scales(w, channel_axis)


@abstract("lsq_fake_quantize")
def _lsq(
    w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None, grad_factor: float | None = None
) -> Tensor:
    lsq.check_scaled("lsq_fake_quantize", w, scale, num_bits, channel_axis)
    return torch.empty_like(w)


@abstract("lsq_fake_quantize_backward")
def _lsq_backward(
    grad: Tensor,
    w: Tensor,
    scale: Tensor,
    num_bits: int = 8,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
) -> Tensor:
    lsq.check_scaled("lsq_fake_quantize_backward", w, scale, num_bits, channel_axis, grad)
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


@abstract("quantize_weight")
def _quantize(w: Tensor, scale: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> Tensor:
    lsq.check_scaled("quantize_weight", w, scale, num_bits, channel_axis, most=8)
    return torch.empty_like(w, dtype=torch.int8)


@abstract("arq_fake_quantize_many")
def _many(
    given: Sequence[Tensor], num_bits: int = 8, channel_axes: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    weights.check_many("arq_fake_quantize_many", given, channel_axes)
    pairs = [_arq(w, num_bits, None if axis < 0 else axis) for w, axis in zip(given, channel_axes, strict=True)]
    return [y for y, _ in pairs], [scale for _, scale in pairs]


# -- sparsity and pruning


@abstract("apply_mask")
def _apply(w: Tensor, mask: Tensor) -> Tensor:
    sparse.check_mask("apply_mask", w, mask)
    return torch.empty_like(w)


@abstract("sparsify_2to4")
def _sparsify(w: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), _mask(w, axis)


@abstract("sparse_arq_fake_quantize")
def _sparse_arq(w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    sparse.check_mask("sparse_arq_fake_quantize", w, mask)
    weights.check_weight("sparse_arq_fake_quantize", w, num_bits, channel_axis)
    return torch.empty_like(w), _scales(w, channel_axis)


@abstract("sparse_arq_fake_quantize_2to4")
def _sparse_arq_2to4(
    w: Tensor, axis: int = 1, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return *_arq(w, num_bits, channel_axis), _mask(w, axis)


@abstract("mask_2to4")
def _mask(w: Tensor, axis: int = 1) -> Tensor:
    masks.check_groups("mask_2to4", w, axis)
    return torch.empty_like(w, dtype=torch.bool)


@abstract("refresh_mask_")
def _refresh(w: Tensor, mask: Tensor, step: Tensor, update_freq: int, axis: int = 1) -> None:
    masks.check_refresh("refresh_mask_", w, mask, step, update_freq)
    masks.check_groups("mask_2to4", w, axis)


@abstract("pack_mask")
def _pack_mask(mask: Tensor) -> Tensor:
    torch._check_type(mask.dtype == torch.bool, lambda: f"pack_mask: mask must be bool, not {mask.dtype}")
    return mask.new_empty((mask.numel() + 63) // 64, dtype=torch.int64)


@abstract("unpack_mask")
def _unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    masks.check_words("unpack_mask", words, shape)
    return words.new_empty(shape, dtype=torch.bool)


@abstract("filter_norms")
def _norms(w: Tensor, axis: int = 0) -> Tensor:
    check_floating("filter_norms", "w", w)
    check_axis("filter_norms", "axis", w, axis)
    return w.new_empty(w.shape[axis], dtype=accumulate_type(w))


# -- shift search


@abstract("shift_error_")
def _shift_error(x: Tensor, deq_scale: Tensor, errors: Tensor, channel_axis: int = 1) -> None:
    shift.check_errors("shift_error_", x, deq_scale, errors, channel_axis)


@abstract("best_shift")
def _best_shift(errors: Tensor) -> Tensor:
    shift.check_rows("best_shift", errors)
    return errors.new_empty(errors.shape[0], dtype=torch.int32)


# -- products of codes


@abstract("ulq_quantize")
def _codes(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> Quantised:
    ulq.check_activation("ulq_quantize", x, (clip_max, clip_min, prev_clip_max, prev_clip_min), num_bits, 8)
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=_layout(x.dim() == 4))
    return codes, *_used(x, clip_max.dtype)


@abstract("pack_weight")
def _pack_weight(w: Tensor, scale: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    code_ops.check_packing("pack_weight", w, scale, num_bits)
    columns, taps = code_ops.COLUMNS, 1
    for size in w.shape[2:]:
        taps *= size
    blocks, quads = -(-w.shape[0] // columns), -(-w.shape[1] // 4)
    packed = w.new_empty((blocks, taps, quads, columns, 4), dtype=torch.int8)
    return packed, w.new_empty(w.shape[0], dtype=torch.int32)


def _product_conv2d(
    op: str,
    codes: Tensor,
    scalars: dict[str, Tensor],
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[Sequence[int], ...],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    kernel_size, stride, padding, dilation = geometry
    check_geometry(op, codes, kernel_size, stride, padding, dilation)
    check_product(op, codes, scalars, packed, sums, w_scale, bias, kernel_size[0] * kernel_size[1])
    sizes = zip(codes.shape[2:], *geometry, strict=True)
    height, width = ((size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in sizes)
    shape = (codes.shape[0], sums.numel(), height, width)
    return torch.empty(shape, dtype=dtype, device=codes.device, memory_format=_layout(channels_last))


@abstract("integer_conv2d")
def _conv2d(
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
    scalars, geometry = {"x_scale": x_scale, "x_offset": x_offset}, (kernel_size, stride, padding, dilation)
    op = "integer_conv2d"
    y = _product_conv2d(op, codes, scalars, packed, sums, w_scale, bias, geometry, torch.float32, channels_last)
    if addend is not None:
        check_addend(op, addend, y)
    return y


@abstract("integer_conv2d_codes")
def _conv2d_codes(
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
) -> Quantised:
    geometry = (kernel_size, stride, padding, dilation)
    y = _conv2d(codes, x_scale, x_offset, packed, sums, w_scale, bias, *geometry)
    return _codes(y, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min)


def _product_linear(
    op: str,
    codes: Tensor,
    scalars: dict[str, Tensor],
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    torch._check_value(codes.dim() >= 1, lambda: f"{op}: codes must have at least one dimension")
    check_product(op, codes, scalars, packed, sums, w_scale, bias, 1)
    return codes.new_empty((*codes.shape[:-1], sums.numel()), dtype=dtype)


@abstract("integer_linear")
def _linear(
    codes: Tensor,
    x_scale: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    scalars = {"x_scale": x_scale, "x_offset": x_offset}
    return _product_linear("integer_linear", codes, scalars, packed, sums, w_scale, bias, torch.float32)


@abstract("integer_conv2d_accumulators")
def _conv2d_accumulators(
    codes: Tensor,
    x_offset: Tensor,
    packed: Tensor,
    sums: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    scalars, geometry = {"x_offset": x_offset}, (kernel_size, stride, padding, dilation)
    return _product_conv2d(
        "integer_conv2d_accumulators", codes, scalars, packed, sums, None, None, geometry, torch.int32, True
    )


@abstract("integer_linear_accumulators")
def _linear_accumulators(codes: Tensor, x_offset: Tensor, packed: Tensor, sums: Tensor) -> Tensor:
    scalars = {"x_offset": x_offset}
    return _product_linear("integer_linear_accumulators", codes, scalars, packed, sums, None, None, torch.int32)
