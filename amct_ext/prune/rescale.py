"""Numbers in a forward that depend on the number of channels, such as the root of the size of a head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.graph.operators import MATRIX_PRODUCTS
from amct_ext.graph.values import Node, Value
from amct_ext.prune.coupling import ParameterAxis
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.rules.scaling import Origin, origin_of, scalar
from amct_ext.prune.rules.types import Maps

_EXPONENTS = (0.25, 0.5, 1.0)  # of the share of channels that are left: torch divides queries and keys by a fourth root
_SAME = 1e-4  # relative
_PASSED = ("view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "_to_copy")


@dataclass
class Rescaling:
    """Multipliers of parameters by which the pruned model computes with the numbers of the unpruned one.

    multipliers: along axis 0 of parameters, by name. values: what is multiplied by them. missing: the first node that
    works with another number, and whose channels no parameter scales.
    """

    multipliers: dict[str, Tensor] = field(default_factory=dict)
    values: set[Value] = field(default_factory=set)
    missing: Node | None = None


def changed_multipliers(discovery: Discovery, removed_mask: Tensor) -> dict[str, Tensor]:
    """Multipliers along axis 0 of parameters that make queries: attention then divides by a smaller root.

    A head that keeps k of d channels has its query multiplied by sqrt(k / d), so that the softmax sees what it saw.
    """
    result: dict[str, Tensor] = {}
    for parameters, rows in discovery.default_scaled_queries:
        share = (~removed_mask[rows]).sum(1, keepdim=True).double() / rows.shape[1]
        for name in parameters if bool((share < 1).any()) else ():
            result[name] = _along_parameter(name, rows, share.sqrt(), discovery)
    return result


def rescaling(model: nn.Module, discovery: Discovery, removed_mask: Tensor, nodes: Sequence[Node]) -> Rescaling:
    """Multipliers that cancel numbers which differ between the pruned model's forward (`nodes`) and the unpruned one's.

    Only numbers that changed as powers of the share of channels that are left count.
    """
    result = Rescaling()
    for old, new in zip(discovery.graph.nodes, nodes, strict=False):
        if old.op != new.op:
            break  # data-dependent control flow
        before, after = scalar(old), scalar(new)
        if before is None or after is None or not before[0].depends_on_input() or not before[1] or not after[1]:
            continue
        change = after[1] / before[1] if old.op == "mul" else before[1] / after[1]
        if abs(change - 1) <= _SAME:
            continue
        fitting = [
            (rows, origin)
            for rows, origin in _origins(model, discovery, before[0], old)
            if _fits(change, rows, removed_mask)
        ]
        origins = [(rows, origin) for rows, origin in fitting if origin is not None]
        if not origins:
            result.missing = result.missing or (old if fitting else None)
            continue
        rows, origin = origins[0]
        for name in origin.parameters:
            factor = _along_parameter(name, rows, torch.tensor(1 / change, dtype=torch.float64), discovery)
            result.multipliers[name] = result.multipliers.get(name, 1) * factor
        result.values.update(origin.values)
    return result


def _origins(
    model: nn.Module, discovery: Discovery, value: Value, reader: Node
) -> Iterator[tuple[Tensor, Origin | None]]:
    """The channels whose number decides on a factor of a value, each with what they are multiples of.

    They are the value's own, or those that the product it comes from sums over.
    """

    def maps(of: object) -> Maps:
        return discovery.maps.get(of, ()) if isinstance(of, Value) else ()

    def scalable(node: Node) -> bool:
        kind = kind_of(model.get_submodule(node.name))
        asked = kind is not None and kind.filter_prunable and kind.weight_axes[1] == 0
        return asked and len(discovery.graph.calls.get(node.name, [])) == 1

    for item in maps(value):
        yield item.rows(), origin_of(value, reader, item.rows(), maps, scalable)
    passed: list[Value] = []
    while value.producer is not None and all(node is reader for node in value.consumers):
        passed.append(value)
        node = value.producer
        if node.op in MATRIX_PRODUCTS[:2]:
            for number, factor in enumerate(node.inputs):
                inner = -1 if number == 0 else -2
                for item in maps(factor):
                    if factor is not None and item.axis == len(factor.shape) + inner:
                        origin = origin_of(factor, node, item.rows(), maps, scalable)
                        yield item.rows(), origin and Origin(origin.parameters, (*origin.values, *passed))
            return
        if node.op not in _PASSED or node.inputs[0] is None:
            return
        value, reader = node.inputs[0], node


def _fits(change: float, rows: Tensor, removed_mask: Tensor) -> bool:
    """Whether a number changed as it does that is a power of how many channels each row has."""
    left = (~removed_mask[rows]).sum(1).unique()
    if len(left) != 1 or int(left) in (0, rows.shape[1]):
        return False
    power = abs(math.log(change) / math.log(int(left) / rows.shape[1])) if change > 0 else 0.0
    return any(abs(power - wanted) <= 1e-3 for wanted in _EXPONENTS)


def _along_parameter(name: str, rows: Tensor, multipliers: Tensor, discovery: Discovery) -> Tensor:
    """Multipliers of channels, (rows, 1) or one for all, along axis 0 of a parameter."""
    each = torch.ones(len(discovery.channel_of), dtype=torch.float64)
    each[rows] = multipliers.to(each).expand(rows.shape)
    weight = ParameterAxis(f"{name.rpartition('.')[0]}.weight", 0)  # a layer's bias has the ids of its weight
    ids = discovery.axis_ids[ParameterAxis(name, 0) if ParameterAxis(name, 0) in discovery.axis_ids else weight]
    if not bool(torch.isin(ids, rows).any()):  # a norm's own parameter: the same channels by other ids
        each[discovery.channel_of[rows]] = multipliers.to(each).expand(rows.shape)
        ids = discovery.channel_of[ids]
    return each[ids]
