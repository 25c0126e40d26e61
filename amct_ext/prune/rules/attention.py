"""Scaled dot-product attention, and where the factor goes that keeps its softmax when heads get smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.rules.operators import GROUP_NORM, LAYER_NORMS
from amct_ext.prune.rules.types import Context, Maps

_MOVES = frozenset(
    ("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "select", "unbind", "split",
     "split_with_sizes", "slice", "squeeze", "unsqueeze", "clone", "_to_copy")
)  # fmt: skip


def attention(node: Node, context: Context) -> Mapping[int, Maps]:
    """Scaled dot-product attention (..., heads, tokens, size): values keep their channels, queries meet keys."""
    query, key, value = (node.args.get(name) for name in ("query", "key", "value"))
    assert isinstance(query, Value) and isinstance(key, Value) and isinstance(value, Value)
    last = len(query.shape) - 1
    pairs = [[item for item in context.of(part) if item.axis == last] for part in (query, key)]
    if all(pairs):
        rows = pairs[0][0].rows()
        context.coupling.join(pairs[0][0].ids, _for_each_query(pairs[1][0], query, key).ids, node.name)
        if node.args.get("scale") is None:  # then it is the root of the size of a head, which changes
            own = not bool(torch.isin(pairs[1][0].ids, rows).any())  # else keys are made of the same numbers
            scaled = _scaled_by(query, node, rows, context) if own else ()
            context.coupling.attended.append((scaled, rows))
            if not scaled:
                reason = f"{node.name} divides by the root of their number, and its queries are no layer's output alone"
                context.coupling.freeze(rows, reason)
    else:
        for item in (*pairs[0], *pairs[1]):
            context.coupling.freeze(item.ids, f"{node.name} multiplies the channels by others that stay")
    kept = []
    for item in context.of(value):
        if item.axis != last or last - 1 in item.varying:
            context.coupling.freeze(item.ids, f"{node.name} has the channels along another axis than the last")
        else:
            kept.append(_for_each_query(item, query, value))
    return {0: tuple(kept)}


def _scaled_by(query: Value, reader: Node, rows: Tensor, context: Context) -> tuple[str, ...]:
    """Parameters that the queries are multiples of, and nothing else is: of a layer or norm; () for none."""
    value = query
    while True:
        if any(not _is_apart(node, rows, context) for node in value.consumers if node is not reader):
            return ()
        node = value.producer
        if node is None:
            return ()
        if node.module is not None:
            return (f"{node.name}.weight", f"{node.name}.bias") if context.owners.scalable(node) else ()
        norm = node.op in (*LAYER_NORMS, GROUP_NORM)
        if norm or node.op == "mul":
            names = ("weight", "bias") if norm else ("self", "other")
            found = [node.args.get(name) for name in names]
            factors = [item for item in found if isinstance(item, Value) and item.kind == "parameter"]
            alone = all(len(item.consumers) == 1 and len(item.shape) == 1 for item in factors)
            return tuple(item.name for item in factors) if alone else ()
        if node.op not in _MOVES or node.inputs[0] is None:
            return ()
        value, reader = node.inputs[0], node


def _is_apart(node: Node, rows: Tensor, context: Context) -> bool:
    """Whether a node takes other channels of a tensor than these."""
    if node.module is not None or node.op not in _MOVES:
        return False
    maps = [context.of(value) for value in node.outputs]
    return all(maps) and not any(bool(torch.isin(rows, item.ids).any()) for listed in maps for item in listed)


def _for_each_query(item: ChannelMap, query: Value, value: Value) -> ChannelMap:
    """A map of keys or values with the heads of the queries, several of which may share one of theirs."""
    heads = len(query.shape) - 3
    if heads not in item.varying or query.shape[heads] == value.shape[heads]:
        return item
    shared = query.shape[heads] // value.shape[heads]
    return ChannelMap(item.ids.repeat_interleave(shared, heads), item.axis)
