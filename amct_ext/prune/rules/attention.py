"""Scaled dot-product attention, and the parameters to scale so that its softmax stays when heads shrink."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.rules.scaling import origin_of
from amct_ext.prune.rules.types import Context, Maps


def attention(node: Node, context: Context) -> Mapping[int, Maps]:
    """Scaled dot-product attention (..., heads, tokens, size): queries and keys are joined, values pass."""
    query, key, value = (node.args.get(name) for name in ("query", "key", "value"))
    assert isinstance(query, Value) and isinstance(key, Value) and isinstance(value, Value)
    last = len(query.shape) - 1
    pairs = [[item for item in context.of(part) if item.axis == last] for part in (query, key)]
    if all(pairs):
        rows = pairs[0][0].rows()
        context.coupling.join(pairs[0][0].ids, _for_each_query(pairs[1][0], query, key).ids, node.name)
        if node.args.get("scale") is None:  # then it is the root of the size of a head, which changes
            own = not bool(torch.isin(pairs[1][0].ids, rows).any())  # else keys are made of the same numbers
            origin = origin_of(query, node, rows, context.of, context.layers.can_scale_output) if own else None
            if origin is not None:
                context.coupling.default_scaled_queries.append((origin.parameters, rows))
            else:
                reason = f"{node.name} divides by the root of their number, and its queries are no layer's output alone"
                context.coupling.freeze(rows, reason)
    else:
        for item in (*pairs[0], *pairs[1]):
            context.coupling.freeze(item.ids, f"{node.name} multiplies the channels by others that stay")
    kept = []
    for item in context.of(value):
        if item.axis != last or last - 1 in item.varying_axes:
            context.coupling.freeze(item.ids, f"{node.name} has the channels along another axis than the last")
        else:
            kept.append(_for_each_query(item, query, value))
    return {0: tuple(kept)}


def _for_each_query(item: ChannelMap, query: Value, value: Value) -> ChannelMap:
    """A map of keys or values with the heads of the queries, several of which may share one of theirs."""
    heads = len(query.shape) - 3
    if heads not in item.varying_axes or query.shape[heads] == value.shape[heads]:
        return item
    shared = query.shape[heads] // value.shape[heads]
    return ChannelMap(item.ids.repeat_interleave(shared, heads), item.axis)
