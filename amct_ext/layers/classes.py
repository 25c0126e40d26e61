"""Which compressed class a float layer gets, why it gets none, and the way back."""

from __future__ import annotations

from torch import nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.layers import conv_linear
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.layers.custom import custom_forward
from amct_ext.layers.derive import derived_class, take_attributes
from amct_ext.layers.product_call import Product
from amct_ext.layers.recurrent import rnn

# By name of the kind in common/layer_kinds.py; the kinds that are quantizable are here.
_COMPRESSED: dict[str, type[CompressedLayer]] = {
    "Conv1d": conv_linear.CompressedConv1d,
    "Conv2d": conv_linear.CompressedConv2d,
    "Conv3d": conv_linear.CompressedConv3d,
    "Linear": conv_linear.CompressedLinear,
    "ConvTranspose1d": conv_linear.CompressedConvTranspose1d,
    "ConvTranspose2d": conv_linear.CompressedConvTranspose2d,
    "ConvTranspose3d": conv_linear.CompressedConvTranspose3d,
    "LSTM": rnn.CompressedLSTM,
    "GRU": rnn.CompressedGRU,
}
# The same for layers with a forward of their own, and for modules that are none of torch's layers.
_CUSTOM: dict[str, type[CompressedLayer]] = {
    "Conv1d": custom_forward.CustomForwardConv1d,
    "Conv2d": custom_forward.CustomForwardConv2d,
    "Conv3d": custom_forward.CustomForwardConv3d,
    "Linear": custom_forward.CustomForwardLinear,
    "ConvTranspose1d": custom_forward.CustomForwardConvTranspose1d,
    "ConvTranspose2d": custom_forward.CustomForwardConvTranspose2d,
    "ConvTranspose3d": custom_forward.CustomForwardConvTranspose3d,
}
# What a compressed layer sets itself, and what it takes from the user's class where that has it.
_INSTANCE_NAMES = {"layer_name", "refs", "product_choice"}
_INHERITED = {"forward", "train", "__init_subclass__", "__module__", "__doc__", "__annotations__"}
_COPYING = {"__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__"}


def compressed_class(layer: nn.Module, product: Product | None = None) -> tuple[type[CompressedLayer] | None, str]:
    """The compressed class for a float layer and '', or None and the reason.

    A subclass that keeps its parent's forward counts as the parent and gets a class derived from both. ``product``: the
    one in the forward of a class that has a forward of its own.
    """
    parent, own = standard_class(layer), type(layer)
    base: type[CompressedLayer]
    if product is not None and parent is None:
        linear = product.kind == "Linear"
        base = custom_forward.ModuleWithLinear if linear else custom_forward.ModuleWithConv
        parent = nn.Module

    elif product is not None and parent is not None:
        if parent.__name__ not in _CUSTOM:
            return None, f"a {parent.__name__} with a forward of its own ({own.__name__}) has no compressed form"
        base = _CUSTOM[parent.__name__]
    elif parent is None or own.forward is not parent.forward:
        return None, f"{own.__name__} has no compressed form"
    else:
        base = _COMPRESSED[parent.__name__]
    clash = _own_names(layer, parent) & _reserved(base)
    if clash:
        return None, f"it has a member '{min(clash)}', a name that a compressed layer needs for itself"
    if own is parent:
        return base, ""
    try:
        return derived_class(base, own), ""
    except Exception as error:
        return None, f"no class can be derived from its class {own.__name__}: {error}"


def standard_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class of torch that a layer is an instance of, where that has a compressed form; else None."""
    kind = kind_of(layer)
    return None if kind is None or kind.name not in _COMPRESSED else kind.cls


def to_float(layer: CompressedLayer) -> nn.Module:
    """The float layer again, of its own class, 2:4 mask folded into the weight (do not use ``layer`` afterwards)."""
    plain: nn.Module = object.__new__(custom_forward.float_class(layer))
    take_attributes(plain, layer)
    for name in (*layer.added_children, *_INSTANCE_NAMES):
        plain._modules.pop(name, None)
        vars(plain).pop(name, None)
    if layer.sparsity is not None:
        masked = nn.Parameter(layer.masked_weight(), requires_grad=layer.weight.requires_grad)
        plain._parameters = {**plain._parameters, "weight": masked}
    return plain


def _own_names(layer: nn.Module, parent: type[nn.Module]) -> set[str]:
    """The names of members that a layer has beyond those of its standard class."""
    names = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    for base in type(layer).__mro__:
        if base not in parent.__mro__:
            names.update(vars(base))
    return names


def _reserved(base: type[CompressedLayer]) -> set[str]:
    """The names that a compressed class defines or sets on its instances."""
    names = {name for kind in base.__mro__ if issubclass(kind, CompressedLayer) for name in vars(kind)}
    return (names | {*base.added_children} | _INSTANCE_NAMES | _COPYING) - _INHERITED
