"""Rules for ops on one tensor that move, cut or reduce its axes."""

from __future__ import annotations

import math
import re

from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import Layout
from amct_ext.prune.rule_types import CannotFollow, on_first_input


@on_first_input
def reshape(node: Node, value: Value, layout: Layout) -> Layout:
    """view, reshape, squeeze, unsqueeze: the channel axis may move, or take in axes that follow it."""
    size, before = value.shape[layout.axis], math.prod(value.shape[: layout.axis])
    shape = node.outputs[0].shape
    for axis, length in enumerate(shape):
        if math.prod(shape[:axis]) != before or length == 1:
            continue
        # The channel axis begins here; what follows it up to some axis is folded in.
        behind = value.shape[layout.axis + 1 :]
        following = [math.prod(behind[:count]) for count in range(len(behind) + 1)]
        if length % size == 0 and length // size in following:
            return layout.at(axis).repeated(length // size)
        break
    raise CannotFollow(f"{node.name} reshapes {list(value.shape)} to {list(shape)}, which cuts or mixes the channels")


@on_first_input
def permute(node: Node, value: Value, layout: Layout) -> Layout:
    """permute, transpose, t: the channel axis moves."""
    dims = len(value.shape)
    if node.op == "permute":
        order = [axis % dims for axis in node.args["dims"]]
    else:
        order = list(range(dims))
        one, two = (node.args.get("dim0", 0), node.args.get("dim1", 1)) if dims > 1 else (0, 0)
        order[one], order[two] = order[two], order[one]
    return layout.at(order.index(layout.axis))


@on_first_input
def along_dims(node: Node, value: Value, layout: Layout) -> Layout:
    """Ops that work along given dimensions and leave the others alone: slices, reductions, softmax, flips."""
    dims = len(value.shape)
    given = node.args.get("dims") if "dims" in node.args else node.args.get("dim")
    if given is None and "axis" in node.args:
        given = node.args["axis"]
    listed = list(range(dims)) if given is None or given == [] else given if isinstance(given, list) else [given]
    touched = {axis % dims for axis in listed}
    if node.op == "slice" and node.outputs[0].shape == value.shape:
        return layout
    if layout.axis in touched:
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    removed = len(value.shape) - len(node.outputs[0].shape)
    return layout.at(layout.axis - sum(axis < layout.axis for axis in touched) if removed else layout.axis)


@on_first_input
def spatial(node: Node, value: Value, layout: Layout) -> Layout:
    """Pooling, resizing, padding by number of trailing axes: the digit in the op's name."""
    match = re.search(r"([123])d", node.op)
    if match is None or layout.axis >= len(value.shape) - int(match.group(1)):
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    return layout


@on_first_input
def pad(node: Node, value: Value, layout: Layout) -> Layout:
    """Constant padding along other axes than that of the channels."""
    amounts = list(node.args["pad"])
    place = 2 * (len(value.shape) - 1 - layout.axis)
    if any(amounts[place : place + 2]):
        raise CannotFollow(f"{node.name} pads along the channels")
    return layout


@on_first_input
def expand(node: Node, value: Value, layout: Layout) -> Layout:
    """Broadcasting along other axes than that of the channels."""
    axis = layout.axis + len(node.outputs[0].shape) - len(value.shape)
    if node.outputs[0].shape[axis] != value.shape[layout.axis]:
        raise CannotFollow(f"{node.name} spreads one channel over several")
    return layout.at(axis)


@on_first_input
def layer_norm(node: Node, value: Value, layout: Layout) -> Layout:
    """Normalisation over other axes than that of the channels."""
    if layout.axis >= len(value.shape) - len(node.args["normalized_shape"]):
        raise CannotFollow(f"{node.name} normalises over the channels, so removing some would change the others")
    return layout
