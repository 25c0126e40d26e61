"""Elementwise functions of one or more tensors, with broadcasting: combined channels become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap
from amct_ext.prune.coupling import AxisUse
from amct_ext.prune.rules.types import Context, Maps

_FILLED = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


def elementwise(node: Node, context: Context) -> Mapping[int, Maps]:
    """Pointwise functions; every output of the broadcast shape has the channels."""
    shape = node.outputs[0].shape
    maps = broadcast_join(node, node.inputs, shape, context)
    return {number: maps for number, value in enumerate(node.outputs) if value.shape == shape}


def broadcast_join(node: Node, values: Sequence[Value | None], shape: tuple[int, ...], context: Context) -> Maps:
    """Broadcast values to a shape and join their channels; returns the channels of the result."""
    operands = [value for value in values if value is not None]
    # Values that depend on the input first: their ids belong to layers.
    operands.sort(key=lambda value: not value.depends_on_input())
    placed: list[tuple[Value, ChannelMap]] = []
    for value in operands:
        for channel_map in context.of(value):
            moved = channel_map.with_leading_axes(len(shape) - len(value.shape))
            if value.shape[channel_map.axis] == shape[moved.axis]:
                placed.append((value, moved))
            else:  # one channel for all: it stays, and does not bind the others
                context.coupling.freeze(channel_map.ids, f"{node.name} broadcasts one channel to several")
    result: list[ChannelMap] = []
    for axis in dict.fromkeys(channel_map.axis for _, channel_map in placed):
        here = [(value, channel_map) for value, channel_map in placed if channel_map.axis == axis]
        fixed = _operand_without_channels(axis, operands, [value for value, _ in here], len(shape))
        if fixed is not None:
            reason = f"{node.name} combines the channels with {describe(fixed)}, whose channels stay"
            context.coupling.freeze_all(tuple(channel_map for _, channel_map in here), reason)
            continue
        joined = here[0][1]
        for _, other in here[1:]:
            context.coupling.join(joined.ids, other.ids, node.name)
            joined = _more_varying(joined, other)
        if node.op == "add" and sum(value.depends_on_input() for value, _ in here) > 1:
            _record_consumer(node, "Add", joined, shape, context)
        result.append(joined)
    return tuple(result)


def concatenate(node: Node, context: Context) -> Mapping[int, Maps]:
    """Channels one after another, or side by side where tensors are joined along another axis."""
    shape = node.outputs[0].shape
    dim = node.args.get("dim", 0) % len(shape)
    values = [value for value in node.inputs if value is not None and len(value.shape) == len(shape)]
    result: list[ChannelMap] = []
    for axis in dict.fromkeys(channel_map.axis for value in values for channel_map in context.of(value)):
        here = [(value, [item for item in context.of(value) if item.axis == axis]) for value in values]
        if any(len(maps) > 1 for _, maps in here):
            context.coupling.freeze_all(
                tuple(item for _, maps in here for item in maps), f"{node.name} joins channels in several ways"
            )
            continue
        sizes = torch.broadcast_shapes(
            *[[size if at != dim else 1 for at, size in enumerate(maps[0].ids.shape)] for _, maps in here if maps]
        )
        if axis != dim and all(not maps or maps[0].ids.shape[dim] == 1 for _, maps in here):
            joined = _joined_maps(node, here, context)
        else:
            ids = torch.cat(
                [
                    (maps[0].ids if maps else torch.zeros([1] * len(shape), dtype=torch.int64)).expand(
                        [value.shape[at] if at == dim else size for at, size in enumerate(sizes)]
                    )
                    for value, maps in here
                ],
                dim,
            )
            joined = ChannelMap(ids, axis)
            _record_consumer(node, "Concat", joined, shape, context)
        if joined is not None:
            result.append(joined)
    return {0: tuple(result)}


def stack(node: Node, context: Context) -> Mapping[int, Maps]:
    """Channel i of all stacked tensors becomes one channel."""
    dim = node.args.get("dim", 0) % len(node.outputs[0].shape)
    values = [value for value in node.inputs if value is not None]
    result: list[ChannelMap] = []
    for axis in dict.fromkeys(channel_map.axis for value in values for channel_map in context.of(value)):
        here = [(value, [item for item in context.of(value) if item.axis == axis]) for value in values]
        joined = _joined_maps(node, here, context)
        if joined is not None:
            result.append(ChannelMap(joined.ids.unsqueeze(dim), axis + (axis >= dim)))
    return {0: tuple(result)}


def _joined_maps(node: Node, here: Sequence[tuple[Value, list[ChannelMap]]], context: Context) -> ChannelMap | None:
    """One map of tensors with the same channels along the same axis, None where one of them has channels that stay."""
    maps = [item for _, listed in here for item in listed]
    if any(len(listed) != 1 for _, listed in here):
        context.coupling.freeze_all(tuple(maps), f"{node.name} puts the channels beside others that stay")
        return None
    joined = maps[0]
    for other in maps[1:]:
        context.coupling.join(joined.ids, other.ids, node.name)
        joined = _more_varying(joined, other)
    return joined


def _operand_without_channels(axis: int, operands: Sequence[Value], mapped: Sequence[Value], dims: int) -> Value | None:
    """An operand that has a size of its own along an axis, and no channels there."""
    for value in operands:
        own = axis - (dims - len(value.shape))
        if own < 0 or value.shape[own] == 1 or any(value is other for other in mapped):
            continue
        if not _is_broadcast(value, own):
            return value
    return None


def _is_broadcast(value: Value, axis: int) -> bool:
    """Whether a value was made from size 1 along an axis, or filled: it will be made as large as the others there."""
    node = value.producer
    if node is None or node.module is not None or value.shape[axis] == 1:
        return node is not None and value.shape[axis] == 1
    if node.op in _FILLED:
        return True
    sources = [source for source in node.inputs if source is not None]
    if node.op == "expand":
        own = axis - (len(value.shape) - len(sources[0].shape))
        return own < 0 or sources[0].shape[own] == 1
    if not node.pointwise and node.op not in ("_to_copy", "clone"):
        return False
    axes = [(source, axis - (len(value.shape) - len(source.shape))) for source in sources]
    return all(own < 0 or source.shape[own] == 1 or _is_broadcast(source, own) for source, own in axes)


def _more_varying(one: ChannelMap, two: ChannelMap) -> ChannelMap:
    """Of two joined maps the one that varies along more axes, the first if equal."""
    if set(two.varying_axes) <= set(one.varying_axes):
        return one
    if set(one.varying_axes) <= set(two.varying_axes):
        return two
    shape = torch.broadcast_shapes(one.ids.shape, two.ids.shape)
    return ChannelMap(one.ids.expand(shape), one.axis)


def _record_consumer(
    node: Node, operator: str, channel_map: ChannelMap, shape: tuple[int, ...], context: Context
) -> None:
    if set(channel_map.varying_axes) <= {channel_map.axis}:
        ids = channel_map.ids.flatten().expand(shape[channel_map.axis])
        context.coupling.add_consumer(AxisUse(node.name, operator, ids))


def describe(value: Value) -> str:
    """What a value is, for messages; a reshaped parameter is still that parameter."""
    source = value
    while source.producer is not None and source.producer.module is None and len(source.producer.inputs) == 1:
        (before,) = source.producer.inputs
        if before is None:
            break
        source = before
    if source.kind in ("parameter", "buffer"):
        return f"{source.kind} {source.name}"
    if value.producer is not None:
        return f"the output of {value.producer.name}"
    return "a model input" if value.kind == "input" else "a constant"
