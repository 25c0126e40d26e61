"""Layers with a forward of their own, back in float and with a plain layer's weight and bias: what is exported.

The weight is the one that the product sees (standardised, say), in the layout of torch's layer; so all that knows a
Conv2d or a Linear can fold a BatchNorm into it or quantise it. The user's forward goes on around the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.common.ranks import whole
from amct_ext.layers.own_forward import product_of
from amct_ext.layers.product_call import Product, ProductCall, ProductMode


class PlainProduct(nn.Module):
    """The base of these layers. ``inner``: the user's layer, whose own weight no longer counts."""

    inner: nn.Module
    weight: Tensor
    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the user's layer."""
        own = self.inner.weight
        assert isinstance(own, Tensor)
        with ProductMode(own, self._product):
            return self.inner(*args, **kwargs)

    def _product(self, call: ProductCall) -> Tensor:
        if call.columns:
            return F.linear(call.x, self.weight, self.bias)
        return call.with_bias(self.bias).compute(call.x, self.weight)


class PlainConv1d(PlainProduct, nn.Conv1d):
    pass


class PlainConv2d(PlainProduct, nn.Conv2d):
    pass


class PlainConv3d(PlainProduct, nn.Conv3d):
    pass


class PlainConvTranspose1d(PlainProduct, nn.ConvTranspose1d):
    pass


class PlainConvTranspose2d(PlainProduct, nn.ConvTranspose2d):
    pass


class PlainLinear(PlainProduct, nn.Linear):  # type: ignore[misc]  # torch types its bias as never None
    pass


_CONVOLUTIONS: dict[str, Callable[..., PlainProduct]] = {
    "Conv1d": PlainConv1d,
    "Conv2d": PlainConv2d,
    "Conv3d": PlainConv3d,
    "ConvTranspose1d": PlainConvTranspose1d,
    "ConvTranspose2d": PlainConvTranspose2d,
}


@torch.no_grad()
def plain_product(layer: nn.Module, product: Product) -> nn.Module:
    """The plain layer around a float one with a forward of its own, which becomes part of it."""
    call = product_of(layer, product)
    weight = whole(call.weight.detach())
    if call.columns:
        weight = weight.t()
    bias = None if call.bias is None else nn.Parameter(whole(call.bias.detach()).clone(), requires_grad=False)
    new: PlainProduct
    if product.kind == "Linear":
        new = PlainLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        groups, transposed = call.argument(6, "groups", 1), product.kind.startswith("ConvTranspose")
        width = (weight.shape[0], weight.shape[1] * groups)
        channels = width if transposed else width[::-1]
        kernel, cls = tuple(weight.shape[2:]), _CONVOLUTIONS[product.kind]
        new = cls(*channels, kernel, groups=groups, bias=False, device="meta")
    new.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    new.bias, new.inner = bias, layer
    return new.train(layer.training)
