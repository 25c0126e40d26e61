"""Normalisations: statistics are taken over the channels that are left."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from amct_ext.common.layer_kinds import BATCH_NORM_TENSORS
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import from_vector
from amct_ext.prune.coupling import collapse_to_axis
from amct_ext.prune.rules.elementwise import broadcast_join
from amct_ext.prune.rules.types import CannotFollow, Context, Maps


def layer_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """LayerNorm and RMSNorm over the trailing axes: factors and terms lose what the input loses."""
    values = [value for value in node.inputs if value is not None]
    return {0: broadcast_join(node, values, node.outputs[0].shape, context)}


def group_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """GroupNorm: each group loses equally many channels."""
    vector = _channels(node, context)
    if vector is None:
        return {}
    context.coupling.require_equal_removal(vector.reshape(node.args["group"], -1), node.name)
    return {0: _with_parameters(node, context, vector, ("weight", "bias"))}


def batch_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """BatchNorm (also InstanceNorm, which torch computes by it): one factor and term a channel."""
    value, batch_statistics = node.inputs[0], bool(node.args.get("training", False))
    passing = [item for item in context.of(value) if item.axis != 1]
    if not batch_statistics:
        for item in passing:
            reason = f"{node.name} normalises axis 1, but the channels are along axis {item.axis}"
            context.coupling.freeze(item.ids, reason)
    vector = _channels(node, context)
    if vector is None:
        return {0: tuple(passing) if batch_statistics else ()}
    maps = _with_parameters(node, context, vector, BATCH_NORM_TENSORS)
    parameter = node.args.get("weight")
    if isinstance(parameter, Value):
        context.layers.mark_read(node, parameter, vector)
    return {0: (*maps, *(passing if batch_statistics else ()))}


def _channels(node: Node, context: Context) -> Tensor | None:
    """The ids along axis 1 of the input, None where it has no channels there."""
    value = node.inputs[0]
    maps = [item for item in context.of(value) if item.axis == 1]
    if value is None or not maps:
        for name in BATCH_NORM_TENSORS:
            context.coupling.freeze_all(
                context.of(node.args.get(name)), f"{node.name} applies it to channels that stay"
            )
        return None
    return collapse_to_axis(maps[0].ids, 1, value.shape[1], context.coupling, node.name)


def _with_parameters(node: Node, context: Context, vector: Tensor, names: tuple[str, ...]) -> Maps:
    for name in names:
        parameter = node.args.get(name)
        if isinstance(parameter, Value):
            maps = [item for item in context.of(parameter) if item.axis == 0]
            if not maps:
                raise CannotFollow(f"{node.name} has {name} values of its own that cannot be cut")
            context.coupling.join(vector, maps[0].ids, node.name)
    return (from_vector(vector, 1, len(node.outputs[0].shape)),)
