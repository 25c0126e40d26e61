"""What each layer of a traced model can take: quantisation, channel pruning, 2:4 sparsity, INT4 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from amct_ext.common.layer_kinds import (
    QUANTIZABLE,
    LayerFamily,
    LayerKind,
    computed_parameter,
    is_depthwise,
    keeps_forward,
    kind_named,
    kind_of,
    layer_type,
)
from amct_ext.config.traits import LayerTraits
from amct_ext.graph.values import Node
from amct_ext.layers.attention import InProjection
from amct_ext.layers.product_call import Product

Calls = Mapping[str, Sequence[Node]]

_CUSTOM_FORWARD = "its class has a forward of its own"
_WITH_BEST = "profile: BEST quantises it"


def layer_traits(
    calls: Calls,
    model: nn.Module,
    excluded: Mapping[str, str],
    readers: Mapping[str, Sequence[Node]],
    products: Mapping[str, Product | str] = MappingProxyType({}),
    beyond_amct: bool = False,
) -> dict[str, LayerTraits]:
    """Traits of every layer whose class can be quantised or pruned, in named_modules order.

    `excluded`: layers that are not to be compressed -> why; `readers`: parameters that ops read outside of layers;
    `products`: modules with a forward of their own -> the product in it, or why there is none to quantise.
    `beyond_amct`: whether to quantise also what AMCT leaves float.
    """
    modules = dict(model.named_modules())
    owners = parameter_owners(modules)
    read_by = {id(model.get_parameter(name)): nodes[0].name for name, nodes in readers.items()}
    result = {}
    for name, module in modules.items():
        kind, product = kind_of(module), products.get(name)
        if kind is None and isinstance(product, Product):
            kind = kind_named(product.kind)
        if kind is None or not (kind.quantizable or kind.filter_prunable):
            continue
        # A recurrent layer has several weights.
        named = [(key, value) for key, value in module._parameters.items() if value is not None]
        weights = [value for key, value in named if key.startswith("weight")]
        # A weight that only an op reads (out_proj of MultiheadAttention): the layer itself is not called.
        reader = next((read_by[id(value)] for value in weights if id(value) in read_by), "")
        usable = excluded.get(name, "")
        if kind_of(module) is not None:
            usable = unusable_reason(calls, name, module, reader) or usable
        unsuited = usable
        if product is not None:
            unsuited = product if isinstance(product, str) else excluded.get(name, "")
        elif name not in excluded and _could_run_repeatedly(kind, calls.get(name, []), module):
            unsuited = "" if beyond_amct else f"{usable} ({_WITH_BEST})"
        holds = isinstance(module, InProjection)  # whose weight is registered at the attention around it, too
        own = {name, name.rpartition(".")[0]} if holds else {name}
        others = list(dict.fromkeys(o for value in weights for o in owners.get(id(value), []) if o not in own))
        shared = ", ".join(other or "the model itself" for other in others)
        # Layers that multiply by one weight may share a 2:4 mask too; a table that is looked up (Embedding) has none.
        foreign = any(layer_type(modules[other]) not in QUANTIZABLE for other in others)
        shared_with = shared and f"its weight is shared with {shared}"
        limits = "" if isinstance(product, Product) else not_quantizable_reason(kind, module)
        if not limits and kind.beyond_amct and not beyond_amct:
            limits = f"AMCT leaves a {kind.name} float ({_WITH_BEST})"
        reason = unsuited or shared_with or limits
        custom, in_out = isinstance(product, Product), isinstance(product, Product) and product.weight_is_in_out

        dense_reason = usable or (reason if foreign else "") or (_CUSTOM_FORWARD if custom else "")

        if reader and not dense_reason:  # that op would see the dense weight in training, the masked one after a reload
            dense_reason = f"its weight is also read by {reader}, outside of the layer"
        # The attention around an InProjection divides its channels into heads.
        fixed_outputs = kind_of(module) is None or holds

        result[name] = LayerTraits(
            type=kind.name,
            quantizable=not reason,
            filter_prunable=not fixed_outputs
            and name not in excluded
            and _filter_prunable(kind, module, usable, reader, calls.get(name, [])),
            sparse_prunable=kind.sparse_prunable and not dense_reason,
            int4_weights=_int4_weights(kind, module, weights, in_out),
            not_quantizable_reason=reason,
            not_sparse_reason=dense_reason,
        )
    return result


def _could_run_repeatedly(kind: LayerKind, calls: Sequence[Node], module: nn.Module) -> bool:
    """Whether only several calls in one forward keep a layer from being quantised."""
    return len(calls) > 1 and kind.family is not LayerFamily.RNN and not fixed_shape_reason(calls, kind.name, module)


def _filter_prunable(kind: LayerKind, module: nn.Module, usable: str, reader: str, calls: Sequence[Node]) -> bool:
    """Whether a layer may lose output channels: one that runs, any number of times, or whose weight an op reads."""
    if not kind.filter_prunable or is_depthwise(module):
        return False
    if kind.family is LayerFamily.TRANSPOSED_CONV and getattr(module, "groups", 1) > 1:
        return False  # its weight holds the outputs of one group only
    if not usable or len(calls) > 1:
        return not usable or not fixed_shape_reason(calls, kind.name, module)
    return bool(reader) and not calls and not computed_parameter(module)


def parameter_owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Identity of each parameter -> the modules that hold it. Computed weights are new objects and never found here."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def unusable_reason(all_calls: Calls, name: str, module: nn.Module, reader: str = "") -> str:
    """Why no compression of any kind can touch a layer, '' where it can. `reader`: an op that reads its weight."""
    kind = kind_of(module)
    assert kind is not None
    calls = all_calls.get(name, [])
    if not keeps_forward(module):
        return f"its class {type(module).__name__} has a forward of its own, so it is no plain {kind.name}"
    computed = computed_parameter(module)
    if computed:
        return f"its {computed} is computed (property, parametrisation or weight norm), not a parameter of its own"
    if not calls and reader:
        return f"it is not called: {reader} reads its weight"
    if not calls:
        return "it was not called during the forward on input_data"
    if len(calls) > 1:
        return f"it is called {len(calls)} times in one forward"
    source = calls[0].inputs[0] if calls[0].inputs else None
    if source is None:
        return "it was called without a tensor"
    if kind.batched_dims is not None and len(source.shape) < kind.batched_dims:
        found = len(source.shape)
        return f"its input has {found} dimensions (un-batched or packed); {kind.batched_dims} are needed"
    return ""


def fixed_shape_reason(calls: Sequence[Node], name: str, module: nn.Module) -> str:
    """Why a layer's channels cannot be removed in one of its calls, '' where they can."""
    reasons = (unusable_reason({name: [call]}, name, module) for call in calls)
    return next((reason for reason in reasons if reason), "")


def not_quantizable_reason(kind: LayerKind, module: nn.Module) -> str:
    """Limits of the quantised layers themselves, '' where there is none."""
    if not kind.quantizable:
        return f"there is no quantised {kind.name}"
    if kind.family is LayerFamily.RNN:
        for attribute, wanted in (("num_layers", 1), ("bidirectional", False), ("dropout", 0), ("proj_size", 0)):
            value = getattr(module, attribute)
            if (value or wanted) != wanted:
                return f"{attribute} is {value}, only {wanted} can be quantised"
        return ""
    padding, dilation = getattr(module, "padding_mode", "zeros"), getattr(module, "dilation", (1,))
    if padding != "zeros":
        return f"padding_mode is {padding!r}; the device quantises 'zeros' only"
    if kind.cls is nn.Conv3d and dilation[0] != 1:
        return f"dilation is {dilation[0]} in depth, only 1 can be quantised"
    return ""


def _int4_weights(kind: LayerKind, module: nn.Module, weights: Sequence[nn.Parameter], weight_is_in_out: bool) -> bool:
    """INT4 weights are packed in pairs along the input channels: these must be even in number and in one group."""
    axis = kind.weight_axes[1 if weight_is_in_out else 0]
    one_group = getattr(module, "groups", 1) == 1
    return one_group and all(weight.shape[axis] % 2 == 0 for weight in weights if weight.dim() > axis)


def onnx_operator(node: Node, module: nn.Module) -> str:
    """The ONNX operator that a call of a layer becomes, as records name it."""
    kind = kind_named(node.op)
    assert kind is not None
    source = node.inputs[0] if node.inputs else None
    flat = source is not None and len(source.shape) == 2 and getattr(module, "bias", None) is not None
    return kind.onnx[0] if flat else kind.onnx[-1]
