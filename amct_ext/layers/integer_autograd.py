"""A layer's product on 8-bit codes, and its gradients: those of the float path, bit for bit, any number of times."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.stash import recompute_fake_quantized


class QuantizedActivation(NamedTuple):
    """An activation as codes, and what its readers need to carry gradients back."""

    proxy: Tensor  # in the autograd graph stands for the quantised activation; its values mean nothing
    x: Tensor
    clip_max: Tensor
    clip_min: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor
    num_bits: int


def padding_of(layer: Any) -> tuple[int, int] | None:
    """(height, width) of a convolution's padding; None where its two sides differ."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    height, width = layer.padding
    return height, width


def integer_product(
    layer: Any, made: QuantizedActivation, x: Tensor, packed: Tensor, sums: Tensor, scale: Tensor
) -> Tensor:
    """The layer's output from codes; ``x`` decides its memory layout."""
    if isinstance(layer, nn.Linear):
        return ops.integer_linear(made.codes, made.scale, made.offset, packed, sums, scale, layer.bias)
    return ops.integer_conv2d(
        made.codes,
        made.scale,
        made.offset,
        packed,
        sums,
        scale,
        layer.bias,
        *geometry_of(layer),
        has_channels_last(layer, x),
    )


def integer_accumulators(layer: Any, made: QuantizedActivation, packed: Tensor, sums: Tensor) -> Tensor:
    """The int32 sums behind that output."""
    if isinstance(layer, nn.Linear):
        return ops.integer_linear_accumulators(made.codes, made.offset, packed, sums)
    return ops.integer_conv2d_accumulators(made.codes, made.offset, packed, sums, *geometry_of(layer))


def geometry_of(layer: Any) -> tuple[Any, Any, Any, Any]:
    """kernel_size, stride, padding and dilation of a convolution, as the ops take them."""
    return layer.kernel_size, layer.stride, padding_of(layer) or (0, 0), layer.dilation


def has_channels_last(layer: Any, x: Tensor) -> bool:
    """Whether the float convolution lays out its result so."""
    last = torch.channels_last
    return any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, layer.weight))


class FakeQuantProxy(torch.autograd.Function):
    """Stands for the fake-quantised activation in the graph without being computed; its gradient is that of the op."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, high: Tensor, low: Tensor, num_bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, high, low)
        ctx.num_bits = num_bits
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, high, low = ctx.saved_tensors
        return *ops.ulq_fake_quantize_backward(grad, x, high, low, ctx.num_bits), None, None, None


class IntegerProduct(torch.autograd.Function):
    """The product on codes; backward rounds the float input again, with the bits of the float path."""

    @staticmethod
    def forward(
        ctx: Any,
        proxy: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        made: QuantizedActivation,
        layer: Any,
        packed: Tensor,
        sums: Tensor,
        scale: Tensor,
    ) -> Tensor:
        y = integer_product(layer, made, made.x, packed, sums, scale)
        x = made.x  # without its history; the proxy's node holds the same memory
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, made.clip_max, made.clip_min, weight)
        ctx.proxy = proxy  # an edge of the graph for gradients of gradients; there is nothing to save of it
        ctx.num_bits, ctx.shape, ctx.bias = made.num_bits, x.shape, None if bias is None else list(bias.shape)
        ctx.conv = None
        if isinstance(layer, nn.Conv2d):
            ctx.conv = (layer.stride, padding_of(layer), layer.dilation)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, high, low, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        quantised = None
        if wanted[1]:
            quantised = recompute_fake_quantized(x, high, low, ctx.num_bits)
            if torch.is_grad_enabled():
                quantised = _ProxyWithValues.apply(ctx.proxy, quantised)
        backward = _linear_backward if ctx.conv is None else _conv_backward
        return *backward(ctx, grad, quantised, weight, wanted), None, None, None, None, None


class _ProxyWithValues(torch.autograd.Function):
    """A proxy with its values: what the proxy stands for, with its place in the graph."""

    @staticmethod
    def forward(ctx: Any, proxy: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _conv_backward(ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, wanted: Any) -> tuple[Tensor | None, ...]:
    stride, padding, dilation = ctx.conv
    if x is None:  # only its shape counts
        x = grad.new_empty(()).expand(ctx.shape)
    grads: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias, stride, padding, dilation, False, (0, 0), 1, wanted
    )
    return grads


def _linear_backward(
    ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, wanted: Any
) -> tuple[Tensor | None, ...]:
    rows = grad.reshape(-1, grad.shape[-1])
    d_x = rows.mm(weight).view(ctx.shape) if wanted[0] else None
    d_weight = None if x is None else rows.t().mm(x.reshape(-1, x.shape[-1]))
    return d_x, d_weight, rows.sum(0) if wanted[2] else None
