"""Compressed layers whose class has a custom forward: the product in it is quantised where it happens.

The user's forward runs as it is. A function mode intercepts the one product whose weight is the layer's, or derived
from it (after standardisation, a cast, a sum with a low-rank term), and quantises its input and its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from amct_ext.config.plan import LayerPlan
from amct_ext.layers import conv_linear
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_context import no_state_updates
from amct_ext.layers.product_call import Product, ProductCall, ProductMode, TensorLike


class _StopAtProductError(Exception):
    """Ends a forward at its product."""

    def __init__(self, call: ProductCall) -> None:
        super().__init__()
        self.call = call


class CustomForward(CompressedLayer):
    """A layer that quantises the product inside of the forward of its float class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the float class."""
        with ProductMode(self.weight, self.product):
            return float_class(self).forward(self, *args, **kwargs)

    def product(self, call: ProductCall) -> Tensor:
        """A product by the layer's weight, quantised."""
        return self._forward(call.x, call)

    def compute_with_weight(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """The product as the forward has it, with another weight."""
        call: ProductCall = args[0]
        return call.compute(x, weight)

    def source_weight(self, *args: Any) -> Tensor:
        """The weight as the product sees it: that of the call in ``args``, else computed anew (without gradients)."""
        if args:
            call: ProductCall = args[0]
            return call.weight
        assert self.refs.product is not None
        return self.weight if self.refs.product.weight_is_parameter else product_of(self, self.refs.product).weight

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        # No GPTQ: the multiplied weight may be derived from the parameter.
        CompressedLayer._add_children(self, plan, batch_num, fixed_min)

    @property
    def _weight_is_in_out(self) -> bool:
        return self.refs.product is not None and self.refs.product.weight_is_in_out

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self._weight_is_in_out else super()._to_rows(weight)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t() if self._weight_is_in_out else super()._from_rows(rows)


class CustomForwardConv1d(CustomForward, conv_linear.CompressedConv1d):
    pass


class CustomForwardConv2d(CustomForward, conv_linear.CompressedConv2d):
    pass


class CustomForwardConv3d(CustomForward, conv_linear.CompressedConv3d):
    pass


class CustomForwardConvTranspose1d(CustomForward, conv_linear.CompressedConvTranspose1d):
    pass


class CustomForwardConvTranspose2d(CustomForward, conv_linear.CompressedConvTranspose2d):
    pass


class CustomForwardConvTranspose3d(CustomForward, conv_linear.CompressedConvTranspose3d):
    pass


class CustomForwardLinear(CustomForward, conv_linear.CompressedLinear):  # type: ignore[misc]  # as CompressedLinear
    pass


class ModuleWithConv(CustomForward):
    """A convolution in a module that is no convolution of torch's."""


class ModuleWithLinear(CustomForward):
    """A matrix product in a module that is no Linear of torch's."""

    channel_axis_out = -1


def float_class(layer: CompressedLayer) -> type[nn.Module]:
    """The class that a compressed layer was derived from."""
    own: type[Any] = next(base for base in type(layer).__mro__ if not issubclass(base, CompressedLayer))
    return own


def product_of(layer: nn.Module, product: Product) -> ProductCall:
    """The call that a module's forward makes, as of now: weight and bias as they are multiplied and added.

    The forward runs up to its product, on zeros; no state of compressed layers changes.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)

    def zeros(like: object) -> object:
        if not isinstance(like, TensorLike):
            return like
        return torch.zeros(like.shape, dtype=like.dtype, device=weight.device)

    args, kwargs = pytree.tree_map(zeros, (product.args, dict(product.kwargs)))
    own = float_class(layer) if isinstance(layer, CompressedLayer) else type(layer)
    try:
        with no_state_updates(), torch.no_grad(), ProductMode(weight, _raise_stop):
            own.forward(layer, *args, **kwargs)
    except _StopAtProductError as reached:
        return reached.call
    raise RuntimeError(f"the forward of {own.__name__} no longer multiplies by its weight")


def _raise_stop(call: ProductCall) -> Tensor:
    raise _StopAtProductError(call)
