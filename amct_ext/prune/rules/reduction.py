"""Ops that reduce or work along some axes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from amct_ext.graph.values import Node
from amct_ext.prune.channel_map import ChannelMap, squeeze_constant_axes
from amct_ext.prune.rules.types import CannotFollow, Context, Maps, dims_of


def statistic(node: Node, context: Context) -> Mapping[int, Maps]:
    """Sums, means, variances, norms: over the channels they are those of the channels that are left."""
    return _reduced(node, context, over_channels=True)


def along_dims(node: Node, context: Context) -> Mapping[int, Maps]:
    """Ops whose result depends on which index a channel has: softmax, sorting, arg max, cumulative sums."""
    return _reduced(node, context, over_channels=False)


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
