"""Autograd of the integer forward: the gradients of the float path, bit for bit, of any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.activation.stash import recompute_fake_quantized
from amct_ext.layers.activation.types import QuantizedActivation
from amct_ext.layers.chains.chain_tensor import as_chain
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.products.integer_ops import PackedWeight, conv_padding, integer_product

Grads = tuple[Tensor | None, ...]


class FakeQuantProxy(torch.autograd.Function):
    """A node with the gradient of fake quantisation and no values: nothing but the graph reads its output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor, used_max: Tensor, used_min: Tensor, num_bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, used_max, used_min)
        ctx.num_bits = num_bits
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, used_max, used_min = ctx.saved_tensors
        return *ops.ulq_fake_quantize_backward(grad, x, used_max, used_min, ctx.num_bits), None, None, None


class IntegerProduct(torch.autograd.Function):
    """The product on codes. Backward fake-quantises the float input again, with the bits of the float path."""

    @staticmethod
    def forward(
        ctx: Any,
        proxy: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: QuantizedActivation,
        layer: CompressedLayer,
        packed: PackedWeight,
    ) -> Tensor:
        y = integer_product(layer, act, act.x, packed)
        x = act.x  # detached; the proxy's node saves the same memory
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, act.clip_max, act.clip_min, weight)
        ctx.proxy = proxy  # an edge of the graph for gradients of gradients; it has no values to save
        ctx.num_bits, ctx.shape, ctx.bias = act.num_bits, x.shape, None if bias is None else list(bias.shape)
        ctx.conv = None
        if isinstance(layer, nn.Conv2d):
            ctx.conv = (layer.stride, conv_padding(layer), layer.dilation)
        return as_chain(y, layer.refs.can_fuse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, used_max, used_min, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        quantized = None
        if needed[1]:
            quantized = recompute_fake_quantized(x, used_max, used_min, ctx.num_bits)
            if torch.is_grad_enabled():
                quantized = proxy_with_values(ctx.proxy, quantized)
        backward = _linear_backward if ctx.conv is None else _conv_backward
        return *backward(ctx, grad, quantized, weight, needed), None, None, None


class _ProxyWithValues(torch.autograd.Function):
    """The values that a proxy stands for, with the proxy's place in the graph."""

    @staticmethod
    def forward(ctx: Any, proxy: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# Torch publishes no type for apply.
fake_quant_proxy: Callable[..., Tensor] = FakeQuantProxy.apply
apply_integer_product: Callable[..., Tensor] = IntegerProduct.apply
proxy_with_values: Callable[..., Tensor] = _ProxyWithValues.apply


def _conv_backward(ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]) -> Grads:
    stride, padding, dilation = ctx.conv
    if x is None:  # only its shape is read
        x = grad.new_empty(()).expand(ctx.shape)
    grads: Grads = torch.ops.aten.convolution_backward(
        grad, x, weight, ctx.bias, stride, padding, dilation, False, (0, 0), 1, needed
    )
    return grads


def _linear_backward(ctx: Any, grad: Tensor, x: Tensor | None, weight: Tensor, needed: Sequence[bool]) -> Grads:
    rows = grad.reshape(-1, grad.shape[-1])
    d_x = rows.mm(weight).view(ctx.shape) if needed[0] else None
    d_weight = None if x is None else rows.t().mm(x.reshape(-1, x.shape[-1]))
    return d_x, d_weight, rows.sum(0) if needed[2] else None
