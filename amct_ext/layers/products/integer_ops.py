"""Calls of the integer ops with the settings of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.activation.types import QuantizedActivation
from amct_ext.layers.compressed import CompressedLayer


class ConvGeometry(NamedTuple):
    """(height, width) each, as the integer ops take them."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def output_size(self, input_size: Sequence[int]) -> list[int]:
        """(height, width) of the output; below 1 where the kernel does not fit."""
        sizes = zip(input_size, *self, strict=True)
        return [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in sizes]


class PackedWeight(NamedTuple):
    """A weight as `ops.pack_weight` returns it, with its scale."""

    packed: Tensor
    sums: Tensor  # int32, one per output channel
    scale: Tensor


def conv_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """(height, width) of a convolution's padding; None where its two sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    assert not isinstance(conv.padding, str)
    height, width = conv.padding
    return height, width


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """The geometry of a convolution whose padding is symmetric."""
    return ConvGeometry(conv.kernel_size, conv.stride, conv_padding(conv) or (0, 0), conv.dilation)


def output_is_channels_last(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the float convolution returns its output for ``x`` in channels-last layout."""
    last = torch.channels_last
    return any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, conv.weight))


def integer_product(layer: CompressedLayer, act: QuantizedActivation, x: Tensor, weight: PackedWeight) -> Tensor:
    """The layer's float32 output from codes; ``x`` decides its memory layout."""
    if isinstance(layer, nn.Conv2d):
        return ops.integer_conv2d(
            act.codes,
            act.scale,
            act.offset,
            *weight,
            layer.bias,
            *conv_geometry(layer),
            output_is_channels_last(layer, x),
        )
    return ops.integer_linear(act.codes, act.scale, act.offset, *weight, layer.bias)


def integer_accumulators(layer: CompressedLayer, act: QuantizedActivation, weight: PackedWeight) -> Tensor:
    """The int32 accumulators behind that output."""
    if isinstance(layer, nn.Conv2d):
        geometry = conv_geometry(layer)
        return ops.integer_conv2d_accumulators(act.codes, act.offset, weight.packed, weight.sums, *geometry)
    return ops.integer_linear_accumulators(act.codes, act.offset, weight.packed, weight.sums)
