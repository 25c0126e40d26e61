"""oneDNN's products on packed weights, with a residual addition and an activation function behind them.

These are the operators that torch's Inductor calls for frozen models. They are not public, so a torch in which they
take other arguments counts as one without them (`is_available`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from amct_ext.layers.products.integer_ops import ConvGeometry

_NUM_ARGUMENTS = {
    "_convolution_pointwise": 10,
    "_convolution_pointwise.binary": 13,
    "_reorder_convolution_weight": 6,
    "_linear_pointwise": 6,
    "_reorder_linear_weight": 2,
}


class OneDnnActivation(NamedTuple):
    """An activation function in oneDNN's terms."""

    name: str
    scalars: Sequence[float] = ()


IDENTITY, RELU = OneDnnActivation("none"), OneDnnActivation("relu")
HARDSWISH, SILU = OneDnnActivation("hardswish"), OneDnnActivation("swish")


def bounds(low: float, high: float | None) -> OneDnnActivation | None:
    """The clamp to these bounds; None where oneDNN has none such."""
    if high is None:
        return RELU if low == 0 else None
    if not low <= high:
        return None
    return OneDnnActivation("hardtanh", (low, high))


def is_available() -> bool:
    """Whether this torch has oneDNN and its operators, and they are not switched off."""
    return torch._C._get_mkldnn_enabled() and torch._C._has_mkldnn and _has_operators()


@functools.cache
def _has_operators() -> bool:
    for name, count in _NUM_ARGUMENTS.items():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.mkldnn, packet, None), overload or "default", None)
        if op is None or len(op._schema.arguments) != count:
            return False
    return True


def pack_conv_weight(weight: Tensor, geometry: ConvGeometry, groups: int, input_size: Sequence[int]) -> Tensor:
    """``weight`` in the layout that oneDNN wants for inputs of this size; inputs of other sizes get right results."""
    _, stride, padding, dilation = geometry
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(input_size)
    )
    return packed


def conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    groups: int,
    addend: Tensor | None,
    activation: OneDnnActivation,
) -> Tensor:
    """activation(convolution + addend), channels last where ``x`` is."""
    _, stride, padding, dilation = geometry
    name, scalars = activation
    settings = (padding, stride, dilation, groups)
    if addend is None:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *settings, name, scalars, "")
        return y
    unary = None if name == "none" else name
    y = torch.ops.mkldnn._convolution_pointwise.binary(
        x, addend, packed, bias, *settings, "add", 1.0, unary, scalars, ""
    )
    return y


def pack_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """``weight`` in the layout that oneDNN wants for inputs of so many rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x times the packed weight, plus bias."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
