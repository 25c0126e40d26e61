"""Rules for ops that bring several tensors together: elementwise functions, concatenation, stacking."""

from __future__ import annotations

from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import Layout, Member, Segment
from amct_ext.prune.rule_types import CannotFollow, Layouts


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
            raise CannotFollow(f"{node.name} combines the channels with {_origin(value)}, whose channels stay")
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
    if len(first.segments) != len(other.segments) or not all(one.same_layout(two) for one, two in pairs):
        raise CannotFollow(f"{node.name} combines tensors whose channels are cut differently")
    for one, two in pairs:
        if one.group is not None and two.group is not None:
            one.group.absorb(two.group, node.name)
        elif one.group is not None or two.group is not None:
            Layout(0, (one, two)).freeze(f"{node.name} combines the channels with others that stay")


def concatenate(node: Node, layouts: Layouts) -> Layout | None:
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


def stack(node: Node, layouts: Layouts) -> Layout | None:
    new_axis = node.args.get("dim", 0) % len(node.outputs[0].shape)
    shifted = [None if layout is None else layout.at(layout.axis + (layout.axis >= new_axis)) for layout in layouts]
    first = next((layout for layout in shifted if layout is not None), None)
    for layout in shifted:
        if first is not None and layout is None:
            raise CannotFollow(f"{node.name} stacks the channels on others that stay")
        if first is not None and layout is not None and layout is not first:
            _couple(node, first, layout)
    return first


def _origin(value: Value) -> str:
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
