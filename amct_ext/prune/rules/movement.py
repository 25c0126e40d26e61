"""Ops that move elements without changing them are applied to the ids themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap, from_vector, squeeze_constant_axes
from amct_ext.prune.coupling import collapse_to_axis, merge_along
from amct_ext.prune.rules.types import CannotFollow, Context, Maps, Rule

# From the ids and map of input 0 to those of each output; raises CannotFollow.
Move = Callable[[Node, ChannelMap, Value, Context], list[ChannelMap]]


def moves_elements(move: Move) -> Rule:
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
    ids = squeeze_constant_axes(channel_map.expanded(value.shape).reshape(shape))
    varying = [axis for axis, size in enumerate(ids.shape) if size > 1]
    if not varying:  # a single channel: keep the axis with the same number of elements before it
        before = math.prod(value.shape[: channel_map.axis])
        candidates = [axis for axis in range(len(shape)) if math.prod(shape[:axis]) == before]
        if not candidates:
            raise CannotFollow(f"{node.name} mixes one channel with other elements")
        exact = [axis for axis in candidates if shape[axis] == value.shape[channel_map.axis]]
        return [ChannelMap(ids, exact[0] if exact else candidates[-1])]
    merged, split = _block_of(channel_map.axis, value.shape, shape)
    # Axes behind the channels that are merged with them: each of their indices must lose the same channels, or the
    # survivors would change their order.
    behind = [axis for axis in merged if axis > channel_map.axis]
    if merge_along(channel_map.ids, behind, context.coupling, node.name).shape != channel_map.ids.shape:
        ids = squeeze_constant_axes(channel_map.expanded(value.shape).reshape(shape))
    parts = [axis for axis in split if axis in varying]
    if not parts:
        raise CannotFollow(f"{node.name} mixes the channels with other elements")
    axis = parts[-1]  # heads and groups stay, their size shrinks
    merge_along(ids, [other for other in split if other > axis], context.coupling, node.name)
    moved = ChannelMap(ids, axis)
    context.coupling.require_equal_removal(moved.rows(), node.name)
    return [moved]


def _block_of(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The axes that a reshape merges, `axis` among them, and those that it splits the result into."""
    start, first = 0, 0
    while True:
        stop, last = start + 1, first + 1
        while math.prod(before[start:stop]) != math.prod(after[first:last]):
            if math.prod(before[start:stop]) < math.prod(after[first:last]):
                stop += 1
            else:
                last += 1
        if axis < stop:
            return list(range(start, stop)), list(range(first, last))
        start, first = stop, last


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
    moved = channel_map.with_leading_axes(len(node.outputs[0].shape) - len(value.shape))
    if node.outputs[0].shape[moved.axis] != value.shape[channel_map.axis]:
        raise CannotFollow(f"{node.name} broadcasts one channel to several")
    return [moved]


def _repeat(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    repeats = node.args["repeats"]
    moved = channel_map.with_leading_axes(len(repeats) - len(value.shape))
    ids = moved.expanded([1] * (len(repeats) - len(value.shape)) + list(value.shape)).repeat(repeats)
    return [ChannelMap(squeeze_constant_axes(ids), moved.axis)]


def _slice(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim, length = node.args["dim"] % len(value.shape), node.outputs[0].shape
    size = value.shape[dim]
    start, step = node.args["start"] or 0, node.args["step"]
    start = min(max(start + size if start < 0 else start, 0), size)
    if dim not in channel_map.varying_axes or length[dim] == size:
        return [channel_map]
    if not length[dim]:
        return []
    if dim == channel_map.axis and step != 1:
        raise CannotFollow(f"{node.name} takes every {step}th channel")
    ids = channel_map.ids.narrow(dim, start, min(size - start, step * length[dim]))
    if step != 1:
        ids = ids.index_select(dim, torch.arange(0, ids.shape[dim], step))
    elif dim == channel_map.axis and size % length[dim] == 0 and start % length[dim] == 0:
        _require_equal_parts(node, channel_map, size // length[dim], context)
    return [ChannelMap(squeeze_constant_axes(ids), channel_map.axis)]


def _split(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim = node.args["dim"] % len(value.shape)
    if dim not in channel_map.varying_axes:
        return [channel_map] * len(node.outputs)
    sizes = [output.shape[dim] for output in node.outputs]
    if dim == channel_map.axis and len(set(sizes)) == 1:
        _require_equal_parts(node, channel_map, len(sizes), context)
    return [ChannelMap(squeeze_constant_axes(part), channel_map.axis) for part in channel_map.ids.split(sizes, dim)]


def _require_equal_parts(node: Node, channel_map: ChannelMap, parts: int, context: Context) -> None:
    rows = channel_map.rows()
    context.coupling.require_equal_removal(rows.reshape(len(rows) * parts, -1), node.name)


def _select(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    dim = node.args["dim"] % len(value.shape)
    if dim == channel_map.axis:
        raise CannotFollow(f"{node.name} ({node.op}) takes single channels")
    axis = channel_map.axis - (dim < channel_map.axis)
    indices = range(len(node.outputs)) if node.op == "unbind" else [node.args["index"]]
    varies = dim in channel_map.varying_axes
    parts = [channel_map.ids.select(dim, index if varies else 0) for index in indices]
    return [ChannelMap(squeeze_constant_axes(part), axis) for part in parts]


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
    first = 2 * (len(value.shape) - 1 - channel_map.axis)
    along_channels = amounts[first : first + 2]
    if not any(along_channels):
        return (
            [channel_map]
            if set(channel_map.varying_axes) <= {channel_map.axis}
            else [_padded(node, channel_map, value)]
        )
    if min(along_channels) < 0 or node.args.get("value") not in (None, 0, 0.0):
        raise CannotFollow(f"{node.name} pads along the channels")
    return [_padded(node, channel_map, value)]


def _padded(node: Node, channel_map: ChannelMap, value: Value) -> ChannelMap:
    return ChannelMap(
        squeeze_constant_axes(F.pad(channel_map.expanded(value.shape), node.args["pad"])), channel_map.axis
    )


def _pixel_shuffle(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    axis = len(value.shape) - 3
    if channel_map.axis != axis:
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    factor = next(node.args[name] for name in ("upscale_factor", "downscale_factor") if name in node.args)
    op = F.pixel_shuffle if node.op == "pixel_shuffle" else F.pixel_unshuffle
    # Run the op on the smallest image: the pattern repeats over positions.
    small = (factor, factor) if node.op == "pixel_unshuffle" else (1, 1)
    vector = _vector(node, channel_map, value.shape[axis], context)
    ids = op(vector.double().reshape(1, -1, 1, 1).expand(1, -1, *small), factor).long()
    ids = collapse_to_axis(ids, 1, ids.shape[1], context.coupling, node.name)
    return [from_vector(ids, axis, len(value.shape))]


def _channel_shuffle(node: Node, channel_map: ChannelMap, value: Value, context: Context) -> list[ChannelMap]:
    if channel_map.axis != 1:
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    vector = _vector(node, channel_map, value.shape[1], context).reshape(node.args["groups"], -1)
    merge_along(vector, [0], context.coupling, node.name)  # see _reshape
    return [from_vector(vector.T.flatten(), 1, len(value.shape))]


def _vector(node: Node, channel_map: ChannelMap, size: int, context: Context) -> Tensor:
    return collapse_to_axis(channel_map.ids, channel_map.axis, size, context.coupling, node.name)


reshape, as_strided, permute = moves_elements(_reshape), moves_elements(_as_strided), moves_elements(_permute)
expand, repeat = moves_elements(_expand), moves_elements(_repeat)
slice_, split, select, flip, roll = (
    moves_elements(_slice),
    moves_elements(_split),
    moves_elements(_select),
    moves_elements(_flip),
    moves_elements(_roll),
)
pad, pixel_shuffle, channel_shuffle = (
    moves_elements(_pad),
    moves_elements(_pixel_shuffle),
    moves_elements(_channel_shuffle),
)


def glu(node: Node, context: Context) -> Mapping[int, Maps]:
    """glu: one half times the sigmoid of the other."""
    value = node.inputs[0]
    assert value is not None
    dim = node.args["dim"] % len(value.shape)
    result = []
    for channel_map in context.of(value):
        item = channel_map
        if dim in channel_map.varying_axes:
            first, second = channel_map.ids.chunk(2, dim)
            context.coupling.join(first, second, node.name)
            item = ChannelMap(squeeze_constant_axes(first), channel_map.axis)
        result.append(item)
    return {0: tuple(result)}


def partial_write(node: Node, context: Context) -> Mapping[int, Maps]:
    """A tensor after a write to a part of it: the write has joined the channels that were there."""
    before, written = node.inputs
    if not context.of(before):
        context.coupling.freeze_all(context.of(written), "they are written to a part of a tensor whose channels stay")
    return {0: context.of(before)}


def no_channels(node: Node, context: Context) -> Mapping[int, Maps]:
    """Ops that take only dtype and device from input 0."""
    return {}


def same_channels(node: Node, context: Context) -> Mapping[int, Maps]:
    """Ops that take the shape of input 0 and nothing else: the same channels."""
    return dict.fromkeys(range(len(node.outputs)), context.of(node.args.get("self", node.inputs[0])))
