"""What each layer of a traced model can take: quantisation, channel pruning, 2:4 sparsity, INT4 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from amct_ext.common.layer_kinds import (
    BATCHED_DIMS,
    FILTER_PRUNABLE,
    QUANTIZABLE,
    RNNS,
    SPARSE_PRUNABLE,
    TRANSPOSED_CONVS,
    computed_parameter,
    is_depthwise,
    keeps_forward,
    layer_type,
)
from amct_ext.config.plan import LayerTraits
from amct_ext.graph.values import Node

Calls = Mapping[str, Sequence[Node]]


def layer_traits(
    calls: Calls, model: nn.Module, left_alone: Mapping[str, str], readers: Mapping[str, Sequence[Node]]
) -> dict[str, LayerTraits]:
    """Traits of every layer whose class can be quantised or pruned, in named_modules order.

    `left_alone`: layers that are not to be compressed -> why; `readers`: parameters that ops read outside of layers.
    """
    modules = dict(model.named_modules())
    owners = _owners(modules)
    read_by = {id(model.get_parameter(name)): nodes[0].name for name, nodes in readers.items()}
    result = {}
    for name, module in modules.items():
        kind = str(layer_type(module))
        if kind not in QUANTIZABLE:
            continue
        # A recurrent layer has several weights.
        weights = [value for key, value in module._parameters.items() if key.startswith("weight")]
        # A weight that only an op reads (out_proj of MultiheadAttention) is no layer's that runs.
        reader = next((read_by[id(value)] for value in weights if id(value) in read_by), "")
        usable = why_not_usable(calls, name, module, reader) or left_alone.get(name, "")
        others = list(dict.fromkeys(o for value in weights for o in owners.get(id(value), []) if o != name))
        shared = ", ".join(other or "the model itself" for other in others)
        # Layers that multiply by one weight may share a 2:4 mask too; a table that is looked up (Embedding) has none.
        foreign = any(layer_type(modules[other]) not in QUANTIZABLE for other in others)
        reason = usable or (shared and f"its weight is shared with {shared}") or _why_not_quantizable(kind, module)
        why_dense = usable or (reason if foreign else "")
        if reader and not why_dense:  # which would take the dense weight in training, the masked one from a file
            why_dense = f"its weight is also read by {reader}, outside of the layer"
        result[name] = LayerTraits(
            type=kind,
            quantizable=not reason,
            filter_prunable=kind in FILTER_PRUNABLE and not usable and not is_depthwise(module),
            sparse_prunable=kind in SPARSE_PRUNABLE and not why_dense,
            int4_weights=_int4_weights(kind, module),
            why_not_quantizable=reason,
            why_not_sparse=why_dense,
        )
    return result


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Identity of each parameter -> the modules that hold it. Computed weights are new objects and never found here."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def why_not_usable(all_calls: Calls, name: str, module: nn.Module, reader: str = "") -> str:
    """Why no compression of any kind can touch a layer, '' where it can. `reader`: an op that reads its weight."""
    kind = str(layer_type(module))
    calls = all_calls.get(name, [])
    if not keeps_forward(module):
        return f"its class {type(module).__name__} has a forward of its own, so it is no plain {kind}"
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
    dims = BATCHED_DIMS.get(kind)
    if dims is not None and len(source.shape) < dims:
        return f"its input has {len(source.shape)} dimensions (un-batched or packed); {dims} are needed"
    return ""


def _why_not_quantizable(kind: str, module: Any) -> str:
    """Limits of the quantised layers themselves, '' where there is none."""
    if kind in RNNS:
        limits: list[tuple[str, Callable[[Any], bool], str]] = [
            ("num_layers", lambda v: v == 1, "1"),
            ("bidirectional", lambda v: not v, "False"),
            ("dropout", lambda v: v == 0, "0"),
            ("proj_size", lambda v: v == 0, "0"),
        ]
        for attribute, accepts, wanted in limits:
            value = getattr(module, attribute)
            if not accepts(value):
                return f"{attribute} is {value}, only {wanted} can be quantised"
        return ""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode is {module.padding_mode!r}; the device quantises 'zeros' only"
    if kind == "Conv3d" and module.dilation[0] != 1:
        return f"dilation is {module.dilation[0]} in depth, only 1 can be quantised"
    return ""


def _int4_weights(kind: str, module: Any) -> bool:
    """INT4 weights are packed in pairs along the input channels: these must be even in number and in one group."""
    if kind in RNNS:
        return module.input_size % 2 == 0 and module.hidden_size % 2 == 0
    if kind == "Linear":
        return module.in_features % 2 == 0
    if module.groups > 1:
        return False
    # With one group Cin is weight axis 1 of a convolution and axis 0 of a transposed one.
    return module.weight.shape[0 if kind in TRANSPOSED_CONVS else 1] % 2 == 0
