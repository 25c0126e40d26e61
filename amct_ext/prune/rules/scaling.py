"""The parameters that scale some channels and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from amct_ext.graph.operators import GROUP_NORM, LAYER_NORMS
from amct_ext.graph.values import Node, Value
from amct_ext.prune.rules.types import Maps

_MOVES = frozenset(
    ("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "select", "unbind", "split",
     "split_with_sizes", "slice", "squeeze", "unsqueeze", "expand", "clone", "_to_copy")
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Parameters that scale channels on their axis 0, by name, and the values between these and where they are read."""

    parameters: tuple[str, ...]
    values: tuple[Value, ...]


def origin_of(
    value: Value,
    reader: Node,
    rows: Tensor,
    maps: Callable[[object], Maps],
    scalable: Callable[[Node], bool],
) -> Origin | None:
    """What the channels `rows` of a value that `reader` takes are multiples of: of a layer, norm or factor, or None.

    maps: the channels in a value. scalable: whether the output of a layer's call may be multiplied by way of its weight
    and bias.
    """
    passed: list[Value] = []
    while True:
        passed.append(value)
        if any(not _is_apart(node, rows, maps) for node in value.consumers if node is not reader):
            return None
        node = value.producer
        if node is None:
            return None
        if node.module is not None:
            names = (f"{node.name}.weight", f"{node.name}.bias")
            return Origin(names, tuple(passed)) if scalable(node) else None
        if node.op in ("mm", "addmm"):
            parameters = _linear_parameters(node)
            return Origin(parameters, tuple(passed)) if parameters else None
        norm, scaled = node.op in (*LAYER_NORMS, GROUP_NORM), scalar(node)
        if norm or (node.op == "mul" and scaled is None):
            found = [node.args.get(name) for name in (("weight", "bias") if norm else ("self", "other"))]
            multipliers = [item for item in found if isinstance(item, Value) and item.kind == "parameter"]
            alone = multipliers and all(len(item.consumers) == 1 and len(item.shape) == 1 for item in multipliers)
            return Origin(tuple(item.name for item in multipliers), tuple(passed)) if alone else None
        source = scaled[0] if scaled is not None else node.inputs[0] if node.op in _MOVES else None
        if source is None:
            return None
        value, reader = source, node


def _linear_parameters(node: Node) -> tuple[str, ...]:
    """Weight and bias of a product that a function of the model's computes; () for other products."""
    *terms, weight = (value for value in node.inputs[:-2] + node.inputs[-1:] if value is not None)
    turned = weight.producer
    if turned is None or turned.op != "t" or turned.inputs[0] is None:
        return ()
    found = [turned.inputs[0], *terms]
    alone = all(value.kind == "parameter" and len(value.consumers) == 1 for value in found)
    return tuple(value.name for value in found) if alone else ()


def scalar(node: Node) -> tuple[Value, float] | None:
    """What a multiplication or division works on, and the number it multiplies or divides by; None for others."""
    if node.op not in ("mul", "div"):
        return None
    one, two = node.args.get("self"), node.args.get("other")
    if node.op == "mul" and number_of(one) is not None:
        one, two = two, one
    number = number_of(two)
    return (one, number) if isinstance(one, Value) and number is not None else None


def number_of(given: object) -> float | None:
    """The number that an argument is, or that a tensor without dimensions holds whatever the input is."""
    if isinstance(given, Value):
        return given.number
    return float(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else None


def _is_apart(node: Node, rows: Tensor, maps: Callable[[object], Maps]) -> bool:
    """Whether a node takes other channels of a tensor than these."""
    if node.module is not None or node.op not in _MOVES:
        return False
    found = [maps(value) for value in node.outputs]
    return all(found) and not any(bool(torch.isin(rows, item.ids).any()) for listed in found for item in listed)
