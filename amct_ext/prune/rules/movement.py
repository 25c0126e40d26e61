"""Ops that move elements without changing them: the ids of the channels go through the op itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap, along, compressed
from amct_ext.prune.coupling import joined_indices
from amct_ext.prune.rules.types import CannotFollow, Context, Maps, Rule

# From the ids and map of input 0 to those of each output; raises CannotFollow.
Move = Callable[[Node, ChannelMap, Value, Context], list[ChannelMap]]


def moving(move: Move) -> Rule:
    """The rule for ops whose input 0 is moved; no other input may carry channels."""

    def rule(node: Node, context: Context) -> Mapping[int, Maps]:
        value = node.inputs[0]
        if any(context.of(other) for other in node.inputs[1:]):
            raise CannotFollow(f"{node.name} ({node.op}) takes channels at a second input")
        outputs: dict[int, list[ChannelMap]] = {}
        for channel_map in context.of(value):
            assert value is not None
            try:
                moved = move(node, channel_map, value, context)
            except CannotFollow as reason:
                context.coupling.freeze(channel_map.ids, str(reason))
                continue
            for number, item in enumerate(moved):
                if bool(item.ids.any()):
                    outputs.setdefault(number, []).append(item)
        return {number: tuple(maps) for number, maps in outputs.items()}

    return rule


def _reshape(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    shape = node.outputs[0].shape
    ids = compressed(channel_map.full(value.shape).reshape(shape))
    varying = [axis for axis, size in enumerate(ids.shape) if size > 1]
    if not varying:  # one channel: it lies where as many elements are in front of it
        before = math.prod(value.shape[: channel_map.axis])
        places = [axis for axis in range(len(shape)) if math.prod(shape[:axis]) == before]
        if not places:
            raise CannotFollow(f"{node.name} mixes one channel with other elements")
        exact = [axis for axis in places if shape[axis] == value.shape[channel_map.axis]]
        return [ChannelMap(ids, exact[0] if exact else places[-1])]
    moved = ChannelMap(ids, varying[-1])
    if len(varying) > 1:
        context.coupling.balance(moved.rows(), node.name)
    return [moved]


def _as_strided(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    one, two = ([size for size in shape if size != 1] for shape in (value.shape, node.outputs[0].shape))
    if one != two or node.args.get("storage_offset"):
        raise CannotFollow(f"{node.name} (as_strided) may reorder the channels")
    return _reshape(node, channel_map, value, context)


def _permute(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dims = len(value.shape)
    if node.op == "permute":
        order = [axis % dims for axis in node.args["dims"]]
    else:
        order = list(range(dims))
        one, two = (node.args.get("dim0", 0), node.args.get("dim1", 1)) if dims > 1 else (0, 0)
        order[one], order[two] = order[two], order[one]
    return [ChannelMap(channel_map.ids.permute(order), order.index(channel_map.axis))]


def _expand(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    moved = channel_map.shifted(len(node.outputs[0].shape) - len(value.shape))
    if node.outputs[0].shape[moved.axis] != value.shape[channel_map.axis]:
        raise CannotFollow(f"{node.name} spreads one channel over several")
    return [moved]


def _repeat(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    repeats = node.args["repeats"]
    moved = channel_map.shifted(len(repeats) - len(value.shape))
    ids = moved.full([1] * (len(repeats) - len(value.shape)) + list(value.shape)).repeat(repeats)
    return [ChannelMap(compressed(ids), moved.axis)]


def _slice(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim, length = node.args["dim"] % len(value.shape), node.outputs[0].shape
    whole = value.shape[dim]
    start, step = node.args["start"] or 0, node.args["step"]
    start = min(max(start + whole if start < 0 else start, 0), whole)
    if dim not in channel_map.varying or length[dim] == whole:
        return [channel_map]
    if dim == channel_map.axis and step != 1:
        raise CannotFollow(f"{node.name} takes every {step}th channel")
    ids = channel_map.ids.narrow(dim, start, min(whole - start, step * length[dim]))
    if step != 1:
        ids = ids.index_select(dim, torch.arange(0, ids.shape[dim], step))
    elif dim == channel_map.axis and whole % length[dim] == 0 and start % length[dim] == 0:
        _balance_parts(node, channel_map, whole // length[dim], context)
    return [ChannelMap(compressed(ids), channel_map.axis)]


def _split(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim = node.args["dim"] % len(value.shape)
    if dim not in channel_map.varying:
        return [channel_map] * len(node.outputs)
    sizes = [output.shape[dim] for output in node.outputs]
    if dim == channel_map.axis and len(set(sizes)) == 1:
        _balance_parts(node, channel_map, len(sizes), context)
    return [ChannelMap(compressed(part), channel_map.axis) for part in channel_map.ids.split(sizes, dim)]


def _balance_parts(node: Node, channel_map: ChannelMap, parts: int, context: Context) -> None:
    rows = channel_map.rows()
    context.coupling.balance(rows.reshape(len(rows) * parts, -1), node.name)


def _select(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim = node.args["dim"] % len(value.shape)
    if dim == channel_map.axis:
        raise CannotFollow(f"{node.name} ({node.op}) takes single channels")
    axis = channel_map.axis - (dim < channel_map.axis)
    indices = range(len(node.outputs)) if node.op == "unbind" else [node.args["index"]]
    varies = dim in channel_map.varying
    parts = [channel_map.ids.select(dim, index if varies else 0) for index in indices]
    return [ChannelMap(compressed(part), axis) for part in parts]


def _flip(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dims = [axis % len(value.shape) for axis in node.args["dims"]]
    return [ChannelMap(channel_map.ids.flip(dims), channel_map.axis)]


def _roll(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dims = node.args["dims"]
    if not dims:
        raise CannotFollow(f"{node.name} (roll) moves the channels along with other axes")
    if channel_map.axis in {axis % len(value.shape) for axis in dims}:
        raise CannotFollow(f"{node.name} (roll) shifts the channels by a fixed number")
    return [ChannelMap(channel_map.ids.roll(node.args["shifts"], dims), channel_map.axis)]


def _pad(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    amounts = list(node.args["pad"])
    place = 2 * (len(value.shape) - 1 - channel_map.axis)
    along_channels = amounts[place : place + 2]
    if not any(along_channels):
        return [channel_map] if set(channel_map.varying) <= {channel_map.axis} else [_padded(node, channel_map, value)]
    if min(along_channels) < 0 or node.args.get("value") not in (None, 0, 0.0):
        raise CannotFollow(f"{node.name} pads along the channels")
    return [_padded(node, channel_map, value)]


def _padded(node: Node, channel_map: ChannelMap, value: Value) -> ChannelMap:
    return ChannelMap(compressed(F.pad(channel_map.full(value.shape), node.args["pad"])), channel_map.axis)


def _pixel_shuffle(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    axis = len(value.shape) - 3
    if channel_map.axis != axis:
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    factor = next(node.args[name] for name in ("upscale_factor", "downscale_factor") if name in node.args)
    op = F.pixel_shuffle if node.op == "pixel_shuffle" else F.pixel_unshuffle
    # Small images do: which channel an element belongs to repeats over the positions.
    small = (factor, factor) if node.op == "pixel_unshuffle" else (1, 1)
    vector = _vector(node, channel_map, value.shape[axis], context)
    ids = op(vector.double().reshape(1, -1, 1, 1).expand(1, -1, *small), factor).long()
    ids = joined_indices(ids, 1, ids.shape[1], context.coupling, node.name)
    return [along(ids, axis, len(value.shape))]


def _channel_shuffle(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    if channel_map.axis != 1:
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    vector = _vector(node, channel_map, value.shape[1], context).reshape(node.args["groups"], -1)
    context.coupling.balance(vector, node.name)
    return [along(vector.T.flatten(), 1, len(value.shape))]


def _vector(node: Node, channel_map: ChannelMap, size: int, context: Context) -> Tensor:
    return joined_indices(channel_map.ids, channel_map.axis, size, context.coupling, node.name)


reshape, as_strided, permute = moving(_reshape), moving(_as_strided), moving(_permute)
expand, repeat = moving(_expand), moving(_repeat)
slice_, split, select, flip, roll = moving(_slice), moving(_split), moving(_select), moving(_flip), moving(_roll)
pad, pixel_shuffle, channel_shuffle = moving(_pad), moving(_pixel_shuffle), moving(_channel_shuffle)


def copy_of_shape(node: Node, context: Context) -> Mapping[int, Maps]:
    """Ops that take the shape of input 0 and nothing else: the same channels."""
    return dict.fromkeys(range(len(node.outputs)), context.of(node.args.get("self", node.inputs[0])))
