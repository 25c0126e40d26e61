"""Products: channels that are summed over are joined with those of the other factor; the others remain."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap, from_vector
from amct_ext.prune.coupling import collapse_to_axis, merge_along
from amct_ext.prune.rules.elementwise import describe
from amct_ext.prune.rules.types import CannotFollow, Context, Maps


def matrix_product(node: Node, context: Context) -> Mapping[int, Maps]:
    """mm, bmm, addmm, baddbmm: (batch), rows x inner times (batch), inner x columns."""
    values = [value for value in node.inputs if value is not None]
    one, two = values[-2:]
    result = contraction(node, one, two, context)
    if len(values) == 3:  # a term that is added
        shape = node.outputs[0].shape
        term = values[0]
        for item in result:
            _join_term(node, term, item, shape, context)
        _freeze_unmatched(node, term, result, shape, context)
    return {0: result}


def contraction(node: Node, one: Value, two: Value, context: Context) -> Maps:
    """The channels of a product of matrices; those of the inner axis are joined or stay."""
    rows, inner, other_inner, columns = len(one.shape) - 2, len(one.shape) - 1, len(two.shape) - 2, len(two.shape) - 1
    left, right = list(context.of(one)), list(context.of(two))
    left_inner = [item for item in left if item.axis == inner]
    right_inner = [item for item in right if item.axis == other_inner]
    if left_inner and right_inner:
        a = merge_along(left_inner[0].ids, [rows], context.coupling, node.name)
        b = merge_along(right_inner[0].ids, [columns], context.coupling, node.name)
        context.coupling.join(a, b.transpose(-1, -2), node.name)
        if a.numel() == one.shape[-1]:
            context.layers.mark_read(node, two, a.flatten())
    else:
        for listed, other in ((left_inner, two), (right_inner, one)):
            reason = f"{node.name} multiplies the channels by {describe(other)}, whose channels stay"
            context.coupling.freeze_all(tuple(listed), reason)
    result = []
    for listed, summed in ((left, inner), (right, other_inner)):
        for item in listed:
            if item.axis == summed:
                continue
            if summed in item.varying_axes:
                context.coupling.freeze(item.ids, f"{node.name} sums over channels that it does not keep apart")
                continue
            result.append(item)
    batch = [item for item in result if item.axis < rows]
    for item in batch:
        context.coupling.freeze(item.ids, f"{node.name} has the channels along its batch axis")
    result = [item for item in result if item.axis >= rows]
    for item in result:
        if item in right and item.axis == columns and len(two.shape) == 2:
            context.layers.mark_produced(node, two, item.ids.flatten().expand(two.shape[-1]))
    return tuple(result)


def convolution(node: Node, context: Context) -> Mapping[int, Maps]:
    """A convolution, transposed or not, with any number of groups."""
    value, weight, bias = (node.args.get(name) for name in ("input", "weight", "bias"))
    assert isinstance(value, Value) and isinstance(weight, Value)
    groups, transposed = int(node.args["groups"]), bool(node.args["transposed"])
    dims = len(value.shape)
    maps = context.of(value)
    if len(value.shape) != len(weight.shape) or any(item.axis != 1 for item in maps):
        raise CannotFollow(f"{node.name} works along another axis than that of the channels")
    arriving = collapse_to_axis(maps[0].ids, 1, value.shape[1], context.coupling, node.name) if maps else None
    channels = value.shape[1]
    by_axis = {item.axis: item for item in context.of(weight)}
    if groups > 1 and groups == channels and not transposed:
        leaving = _depthwise(node, weight, by_axis, arriving, channels, context)
    else:
        if groups == 1:
            inner = by_axis[0 if transposed else 1].ids.flatten() if (0 if transposed else 1) in by_axis else None
        else:
            inner = context.layers.input_ids(weight, channels)
        _join_inner(node, weight, arriving, inner, groups, context)
        outer = by_axis.get(1 if transposed else 0)
        leaving = None if outer is None or (transposed and groups > 1) else outer.ids.flatten()
        if leaving is not None:
            leaving = leaving.expand(node.outputs[0].shape[1])
            if groups > 1:
                context.coupling.require_equal_removal(leaving.reshape(groups, -1), node.name)
            context.layers.mark_produced(node, weight, leaving)
    if leaving is None:
        if isinstance(bias, Value):
            context.coupling.freeze_all(context.of(bias), f"{node.name} adds it to channels that stay")
        return {}
    result = from_vector(leaving, 1, dims)
    if isinstance(bias, Value):
        for item in context.of(bias):
            context.coupling.join(leaving, item.ids.flatten(), node.name)
    return {0: (result,)}


def embedding(node: Node, context: Context) -> Mapping[int, Maps]:
    """A table that is looked up: its columns are channels, its rows stay."""
    table, dims = node.args.get("weight"), len(node.outputs[0].shape)
    result = []
    for item in context.of(table):
        if item.axis == 1:
            result.append(from_vector(item.ids.flatten(), dims - 1, dims))
        else:
            context.coupling.freeze(item.ids, f"{node.name} looks them up by number")
    return {0: tuple(result)}


def _depthwise(
    node: Node,
    weight: Value,
    by_axis: Mapping[int, ChannelMap],
    arriving: Tensor | None,
    channels: int,
    context: Context,
) -> Tensor | None:
    """Output channels follow from the input's."""
    filters = by_axis.get(0)
    if filters is None or arriving is None:
        for ids in (arriving, None if filters is None else filters.ids):
            if ids is not None:
                context.coupling.freeze(ids, f"{node.name} filters channels that stay, or by weights that stay")
        return None
    multiplier = weight.shape[0] // channels
    leaving = arriving.repeat_interleave(multiplier)
    context.coupling.join(leaving, filters.ids.flatten(), node.name)
    context.layers.mark_read(node, weight, arriving)
    return leaving


def _join_inner(
    node: Node, weight: Value, arriving: Tensor | None, inner: Tensor | None, groups: int, context: Context
) -> None:
    if arriving is None or inner is None:
        for ids in (arriving, inner):
            if ids is not None:
                context.coupling.freeze(ids, f"{node.name} multiplies the channels by others that stay")
        return
    context.coupling.join(arriving, inner, node.name)
    if groups > 1:
        context.coupling.require_equal_removal(arriving.reshape(groups, -1), node.name)
    context.layers.mark_read(node, weight, arriving, groups if groups > 1 else None)


def _join_term(node: Node, term: Value, item: ChannelMap, shape: tuple[int, ...], context: Context) -> None:
    own = item.axis - (len(shape) - len(term.shape))
    if own < 0 or term.shape[own] == 1:
        return
    listed = [other for other in context.of(term) if other.axis == own]
    if not listed:
        context.coupling.freeze(
            item.ids, f"{node.name} combines the channels with {describe(term)}, whose channels stay"
        )
        return
    context.coupling.join(item.ids, listed[0].with_leading_axes(len(shape) - len(term.shape)).ids, node.name)


def _freeze_unmatched(node: Node, term: Value, result: Maps, shape: tuple[int, ...], context: Context) -> None:
    for other in context.of(term):
        if all(item.axis != other.axis + len(shape) - len(term.shape) for item in result):
            context.coupling.freeze(other.ids, f"{node.name} adds it to channels that stay")
