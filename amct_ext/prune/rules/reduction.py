"""Ops that reduce or work along some axes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from amct_ext.graph.operators import MATRIX_PRODUCTS
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap, squeeze_constant_axes
from amct_ext.prune.rules.types import CannotFollow, Context, Maps, dims_of

_MOVES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "clone", "transpose", "permute", "unsqueeze")


def statistic(node: Node, context: Context) -> Mapping[int, Maps]:
    """Sums, means, variances, norms: over the channels they are those of the channels that are left."""
    return _reduced(node, context, over_channels=True)


def along_dims(node: Node, context: Context) -> Mapping[int, Maps]:
    """Ops whose result depends on which index a channel has: softmax, sorting, arg max, cumulative sums."""
    return _reduced(node, context, over_channels=False)


def softmax(node: Node, context: Context) -> Mapping[int, Maps]:
    """In attention between channels it is that of the channels that are left."""
    value = node.inputs[0]
    if value is None or not _are_scores(value):
        return along_dims(node, context)
    touched = dims_of(node, len(value.shape))
    result = list(_reduced(node, context, over_channels=True)[0])
    return {0: (*result, *(item for item in context.of(value) if item.axis in touched))}


def _are_scores(value: Value) -> bool:
    """Whether a value is a product of two activations, but for a factor or term."""
    while value.producer is not None and value.producer.module is None:
        made = value.producer
        given = [source for source in made.inputs if source is not None and source.depends_on_input()]
        if made.op in MATRIX_PRODUCTS:
            return len(given) > 1
        if len(given) != 1 or not (made.pointwise or made.op in _MOVES):
            return False
        value = given[0]
    return False


def _reduced(node: Node, context: Context, over_channels: bool) -> Mapping[int, Maps]:
    value = node.inputs[0]
    if value is None:
        return {}
    dims = len(value.shape)
    touched = dims_of(node, dims)
    removed = dims - len(node.outputs[0].shape)
    result: list[ChannelMap] = []
    for channel_map in context.of(value):
        if channel_map.axis in touched:
            if not over_channels:
                reason = f"{node.name} ({node.op}) works along the channels"
                context.coupling.freeze(channel_map.ids, reason)
            continue
        ids = channel_map.ids
        for axis in touched & set(channel_map.varying_axes):
            first = ids.narrow(axis, 0, 1)
            context.coupling.join(first, ids, node.name)
            ids = first if removed or over_channels else ids
        moved = ChannelMap(ids, channel_map.axis)
        if removed:
            kept = [axis for axis in range(dims) if axis not in touched]

            for axis in sorted(touched, reverse=True):
                ids = ids.select(axis, 0)
            moved = ChannelMap(squeeze_constant_axes(ids), kept.index(channel_map.axis))
        result.append(moved)
    return {number: tuple(result) for number in range(len(node.outputs))}


def spatial(node: Node, context: Context) -> Mapping[int, Maps]:
    """Pooling, resizing, padding over the trailing axes, as many as the digit in the op's name says."""
    match, value = re.search(r"([123])d", node.op), node.inputs[0]
    if value is None:
        return {}
    maps = context.of(value)
    for channel_map in maps:
        if match is None or max((*channel_map.varying_axes, channel_map.axis)) >= len(value.shape) - int(
            match.group(1)
        ):
            raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    return dict.fromkeys(range(len(node.outputs)), maps)
