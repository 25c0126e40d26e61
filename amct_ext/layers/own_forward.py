"""Compressed layers whose class has a forward of its own: the product in it is quantised where it happens.

The user's forward runs as it is. A mode meets the one product whose weight is the layer's, or computed from it (after
standardisation, a cast, a sum with a low-rank term): its input and its weight are quantised as they arrive there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from amct_ext.config.plan import LayerPlan
from amct_ext.layers import conv_linear
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.forward_context import frozen_state
from amct_ext.layers.product_call import Product, ProductCall, ProductMode, TensorLike


class _ReachedError(Exception):
    """Ends a forward at its product."""

    def __init__(self, call: ProductCall) -> None:
        super().__init__()
        self.call = call


class OwnForward(CompressedLayer):
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
        return self.weight if self.refs.product.plain else product_of(self, self.refs.product).weight

    def _add_children(self, plan: LayerPlan, batch_num: int, fixed_min: bool) -> None:
        # No compensation of rounding: the weight that it would change is not always the one that is multiplied.
        CompressedLayer._add_children(self, plan, batch_num, fixed_min)

    @property
    def _columns(self) -> bool:
        return self.refs.product is not None and self.refs.product.columns

    def _to_rows(self, weight: Tensor) -> Tensor:
        return weight.t() if self._columns else super()._to_rows(weight)

    def _from_rows(self, rows: Tensor) -> Tensor:
        return rows.t() if self._columns else super()._from_rows(rows)


class OwnConv1d(OwnForward, conv_linear.CompressedConv1d):
    pass


class OwnConv2d(OwnForward, conv_linear.CompressedConv2d):
    pass


class OwnConv3d(OwnForward, conv_linear.CompressedConv3d):
    pass


class OwnConvTranspose1d(OwnForward, conv_linear.CompressedConvTranspose1d):
    pass


class OwnConvTranspose2d(OwnForward, conv_linear.CompressedConvTranspose2d):
    pass


class OwnLinear(OwnForward, conv_linear.CompressedLinear):  # type: ignore[misc]  # as CompressedLinear
    pass


class OwnConvolution(OwnForward):
    """A convolution in a module that is no convolution of torch's."""


class OwnProduct(OwnForward):
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
        with frozen_state(), torch.no_grad(), ProductMode(weight, _stop):
            own.forward(layer, *args, **kwargs)
    except _ReachedError as reached:
        return reached.call
    raise RuntimeError(f"the forward of {own.__name__} no longer multiplies by its weight")


def _stop(call: ProductCall) -> Tensor:
    raise _ReachedError(call)
