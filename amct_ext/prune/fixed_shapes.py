"""Layers and parameters whose shape must not change, and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from amct_ext.common.layer_kinds import LayerFamily, computed_parameter, kind_of
from amct_ext.graph.trace import Graph
from amct_ext.graph.traits import fixed_shape_reason
from amct_ext.graph.values import Node


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters and buffers that several modules hold: each of their names -> all of them."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():  # a module with two names is one that is cut
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return {name: ", ".join(same) for same in names.values() if len(same) > 1 for name in same}


def fixed_shape_reasons(graph: Graph, model: nn.Module) -> dict[str, str]:
    """Layers whose shapes must not change, with the reason."""
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name or "the model itself")
    result: dict[str, str] = {}
    all_calls = graph.all_calls()
    for parameter_name, readers in graph.parameter_readers(and_training=True).items():
        name = parameter_name.rpartition(".")[0]
        if name in all_calls:  # else ops compute with it, and their rules say what becomes of it
            result[name] = f"{readers[0].name} also reads its parameter {parameter_name}"
    for name, calls in all_calls.items():
        for reason in _layer_reasons(name, calls, modules[name], graph, owners):
            result.setdefault(name, reason)
    return result


def _layer_reasons(
    name: str, calls: list[Node], module: nn.Module, graph: Graph, owners: dict[int, list[str]]
) -> Iterator[str]:
    kind = kind_of(module)
    if kind is not None and kind.family is LayerFamily.BATCH_NORM:
        computed = computed_parameter(module)
        if computed:
            yield f"its {computed} is computed (parametrisation or weight norm)"
    else:
        reason = fixed_shape_reason(calls, name, module)
        if reason:
            yield reason
    for parameter in module._parameters.values():
        others = [other for other in owners.get(id(parameter), []) if other != name]
        if others:
            yield f"it shares a parameter with {', '.join(others)}"
