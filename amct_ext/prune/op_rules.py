"""How channels pass through ops: for each op that channel removal can follow, the layouts of its outputs.

A rule takes the node and the layouts of its inputs (None: channels that are not ours to remove) and returns the layout
of the outputs, or None. A rule that cannot follow raises CannotFollow with the reason; the groups that came in freeze.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import Layout, Member, Segment

Layouts = Sequence[Layout | None]
Rule = Callable[[Node, Layouts], Layout | None]


class CannotFollow(Exception):  # noqa: N818 - a signal between rule and caller, no error
    """The channels cannot be followed through this node; str() says why."""


def op_rule(node: Node) -> Rule | None:
    """The rule for an op, None where it is not known."""
    if node.op in _RULES:
        return _RULES[node.op]
    if node.pointwise or node.op in _ELEMENTWISE:
        return elementwise
    if _SPATIAL.match(node.op):
        return _spatial
    return None


# Elementwise ops that torch (some versions, or for the in-place form) does not tag as such, and ops that only take the
# shape of their input.
_ELEMENTWISE = {
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "hardsigmoid",
    "hardtanh",
    "hardswish",
    "log_sigmoid_forward",
    "_prelu_kernel",
    "_to_copy",
    "native_dropout",
    "bernoulli",
    "fill",
    "zero",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
}
_SPATIAL = re.compile(
    r"(_?adaptive_)?(max|avg)_pool[123]d(_with_indices)?$|upsample_\w+[123]d$|_upsample_\w+[123]d(_aa)?$"
    r"|(reflection|replication)_pad[123]d$|grid_sampler_[23]d$"
)


def elementwise(node: Node, layouts: Layouts) -> Layout | None:
    """Pointwise functions of one or more tensors, with broadcasting: channels that meet are coupled."""
    dims = len(node.outputs[0].shape)
    shape = node.outputs[0].shape
    tracked: list[Layout] = []
    for value, layout in zip(node.inputs, layouts, strict=True):
        if value is not None and layout is not None:
            placed = layout.at(layout.axis + dims - len(value.shape))
            if placed.size == shape[placed.axis]:
                tracked.append(placed)
            else:  # one channel for all: it cannot go, and does not bind the others
                placed.freeze(f"{node.name} spreads one channel over several")
    if not tracked:
        return None
    first = tracked[0]
    for value, layout in zip(node.inputs, layouts, strict=True):
        if value is None or layout is not None:
            continue
        axis = first.axis - (dims - len(value.shape))
        if axis >= 0 and value.shape[axis] != 1:
            raise CannotFollow(f"{node.name} combines the channels with {origin(value)}, whose channels stay")
    for other in tracked[1:]:
        _couple(node, first, other)
    if node.op == "add" and len(tracked) > 1:
        for begin, segment in first.begins():
            if segment.group is not None:
                segment.group.read_by(Member(node.name, "Add", begin, segment.repeat))
    return first


def _couple(node: Node, first: Layout, other: Layout) -> None:
    if first.axis != other.axis:
        raise CannotFollow(f"{node.name} combines tensors whose channels lie along different axes")
    pairs = list(zip(first.segments, other.segments, strict=False))
    if len(first.segments) != len(other.segments) or not all(one.same_places(two) for one, two in pairs):
        raise CannotFollow(f"{node.name} combines tensors whose channels are cut differently")
    for one, two in pairs:
        if one.group is not None and two.group is not None:
            one.group.absorb(two.group, node.name)
        elif one.group is not None or two.group is not None:
            Layout(0, (one, two)).freeze(f"{node.name} combines the channels with others that stay")


def _concatenate(node: Node, layouts: Layouts) -> Layout | None:
    dims = len(node.outputs[0].shape)
    axis = node.args.get("dim", 0) % dims
    present = [layout for layout in layouts if layout is not None]
    if not present:
        return None
    if all(layout.axis != axis for layout in present):
        return elementwise(node, layouts)  # side by side along another axis: channel i meets channel i
    if any(layout.axis != axis for layout in present):
        raise CannotFollow(f"{node.name} joins tensors whose channels lie along different axes")
    segments: list[Segment] = []
    for value, layout in zip(node.inputs, layouts, strict=True):
        if value is not None:
            segments.extend(layout.segments if layout is not None else (Segment(None, value.shape[axis]),))
    joined = Layout(axis, tuple(segments))
    for begin, segment in joined.begins():
        if segment.group is not None:
            segment.group.read_by(Member(node.name, "Concat", begin, segment.repeat))
    return joined


def _stack(node: Node, layouts: Layouts) -> Layout | None:
    new_axis = node.args.get("dim", 0) % len(node.outputs[0].shape)
    shifted = [None if layout is None else layout.at(layout.axis + (layout.axis >= new_axis)) for layout in layouts]
    first = next((layout for layout in shifted if layout is not None), None)
    for layout in shifted:
        if first is not None and layout is None:
            raise CannotFollow(f"{node.name} stacks the channels on others that stay")
        if first is not None and layout is not None and layout is not first:
            _couple(node, first, layout)
    return first


def _only(node: Node, layouts: Layouts) -> tuple[Value, Layout] | None:
    """Input 0 with its layout; other inputs must not carry channels."""
    value, layout = node.inputs[0], layouts[0]
    if any(other is not None for other in layouts[1:]):
        raise CannotFollow(f"{node.name} ({node.op}) takes channels at a second input")
    return None if value is None or layout is None else (value, layout)


def _reshape(node: Node, layouts: Layouts) -> Layout | None:
    """view, reshape, squeeze, unsqueeze: the channel axis may move, or take in axes that follow it."""
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
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


def _permute(node: Node, layouts: Layouts) -> Layout | None:
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
    dims = len(value.shape)
    if node.op == "permute":
        order = [axis % dims for axis in node.args["dims"]]
    else:
        order = list(range(dims))
        one, two = (node.args.get("dim0", 0), node.args.get("dim1", 1)) if dims > 1 else (0, 0)
        order[one], order[two] = order[two], order[one]
    return layout.at(order.index(layout.axis))


def _along_dims(node: Node, layouts: Layouts) -> Layout | None:
    """Ops that work along given dimensions and leave the others alone: slices, reductions, softmax, flips."""
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
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


def _spatial(node: Node, layouts: Layouts) -> Layout | None:
    """Pooling, resizing, padding by number of trailing axes: the digit in the op's name."""
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
    match = re.search(r"([123])d", node.op)
    if match is None or layout.axis >= len(value.shape) - int(match.group(1)):
        raise CannotFollow(f"{node.name} ({node.op}) works along the channels")
    return layout


def _pad(node: Node, layouts: Layouts) -> Layout | None:
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
    pad: list[Any] = list(node.args["pad"])
    place = 2 * (len(value.shape) - 1 - layout.axis)
    if any(pad[place : place + 2]):
        raise CannotFollow(f"{node.name} pads along the channels")
    return layout


def _expand(node: Node, layouts: Layouts) -> Layout | None:
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
    axis = layout.axis + len(node.outputs[0].shape) - len(value.shape)
    if node.outputs[0].shape[axis] != value.shape[layout.axis]:
        raise CannotFollow(f"{node.name} spreads one channel over several")
    return layout.at(axis)


def _layer_norm(node: Node, layouts: Layouts) -> Layout | None:
    found = _only(node, layouts)
    if found is None:
        return None
    value, layout = found
    if layout.axis >= len(value.shape) - len(node.args["normalized_shape"]):
        raise CannotFollow(f"{node.name} normalises over the channels, so removing some would change the others")
    return layout


def origin(value: Value) -> str:
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


_RULES: dict[str, Rule] = {
    "cat": _concatenate,
    "stack": _stack,
    "permute": _permute,
    "transpose": _permute,
    "t": _permute,
    "constant_pad_nd": _pad,
    "expand": _expand,
    "native_layer_norm": _layer_norm,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(
        (
            "select",
            "slice",
            "split",
            "split_with_sizes",
            "unbind",
            "flip",
            "roll",
            "mean",
            "sum",
            "amax",
            "amin",
            "max",
            "min",
            "prod",
            "var",
            "std",
            "var_mean",
            "linalg_vector_norm",
            "logsumexp",
            "argmax",
            "argmin",
            "cumsum",
            "sort",
            "_softmax",
            "_log_softmax",
        ),
        _along_dims,
    ),
}
