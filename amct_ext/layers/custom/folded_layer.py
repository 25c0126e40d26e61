"""Float layers with a custom forward for export: the weight and bias of torch's layer, the user's forward around them.

The weight is the one that is multiplied (standardised, say), in the layout of torch's layer, so BatchNorm folding and
export treat it like any Conv2d or Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.common.ranks import full_tensor
from amct_ext.layers.custom.custom_forward import product_of
from amct_ext.layers.product_call import Product, ProductCall, ProductMode


class FoldedLayer(nn.Module):
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
        if call.weight_is_in_out:
            return F.linear(call.x, self.weight, self.bias)
        return call.with_bias(self.bias).compute(call.x, self.weight)


class FoldedConv1d(FoldedLayer, nn.Conv1d):
    pass


class FoldedConv2d(FoldedLayer, nn.Conv2d):
    pass


class FoldedConv3d(FoldedLayer, nn.Conv3d):
    pass


class FoldedConvTranspose1d(FoldedLayer, nn.ConvTranspose1d):
    pass


class FoldedConvTranspose2d(FoldedLayer, nn.ConvTranspose2d):
    pass


class FoldedConvTranspose3d(FoldedLayer, nn.ConvTranspose3d):
    pass


class FoldedLinear(FoldedLayer, nn.Linear):  # type: ignore[misc]  # torch types its bias as never None
    pass


_CONVOLUTIONS: dict[str, Callable[..., FoldedLayer]] = {
    "Conv1d": FoldedConv1d,
    "Conv2d": FoldedConv2d,
    "Conv3d": FoldedConv3d,
    "ConvTranspose1d": FoldedConvTranspose1d,
    "ConvTranspose2d": FoldedConvTranspose2d,
    "ConvTranspose3d": FoldedConvTranspose3d,
}


@torch.no_grad()
def folded_layer(layer: nn.Module, product: Product) -> nn.Module:
    """The plain layer around a float one with a forward of its own, which becomes part of it."""
    call = product_of(layer, product)
    weight = full_tensor(call.weight.detach())
    if call.weight_is_in_out:
        weight = weight.t()
    bias = None if call.bias is None else nn.Parameter(full_tensor(call.bias.detach()).clone(), requires_grad=False)
    new: FoldedLayer
    if product.kind == "Linear":
        new = FoldedLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        groups, transposed = call.argument(6, "groups", 1), product.kind.startswith("ConvTranspose")
        width = (weight.shape[0], weight.shape[1] * groups)
        channels = width if transposed else width[::-1]
        kernel, cls = tuple(weight.shape[2:]), _CONVOLUTIONS[product.kind]
        new = cls(*channels, kernel, groups=groups, bias=False, device="meta")
    new.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    new.bias, new.inner = bias, layer
    return new.train(layer.training)
