"""Normalisations: statistics over channels are those of the channels that are left."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import along
from amct_ext.prune.coupling import joined_indices
from amct_ext.prune.rules.elementwise import meet
from amct_ext.prune.rules.types import CannotFollow, Context, Maps


def layer_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """LayerNorm and RMSNorm over the trailing axes: factors and terms lose what the input loses."""
    values = [value for value in node.inputs if value is not None]
    return {0: meet(node, values, node.outputs[0].shape, context)}


def group_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """GroupNorm: each group loses equally many channels."""
    vector = _channels(node, context)
    if vector is None:
        return {}
    context.coupling.balance(vector.reshape(node.args["group"], -1), node.name)
    return {0: _with_parameters(node, context, vector, ("weight", "bias"))}


def batch_norm(node: Node, context: Context) -> Mapping[int, Maps]:
    """BatchNorm (also InstanceNorm, which torch computes by it): one factor and term a channel."""
    value, batch_statistics = node.inputs[0], bool(node.args.get("training", False))
    passing = [item for item in context.of(value) if item.axis != 1]
    if not batch_statistics:
        for item in passing:
            context.coupling.freeze(item.ids, f"{node.name} does not have its channels where theirs lie")
    vector = _channels(node, context)
    if vector is None:
        return {0: tuple(passing) if batch_statistics else ()}
    names = ("weight", "bias", "running_mean", "running_var")
    maps = _with_parameters(node, context, vector, names)
    for name in names[:1]:
        parameter = node.args.get(name)
        if isinstance(parameter, Value):
            context.owners.reads(node, parameter, vector)
    return {0: (*maps, *(passing if batch_statistics else ()))}


def _channels(node: Node, context: Context) -> Tensor | None:
    """The ids along axis 1 of the input, None where it has no channels there."""
    value = node.inputs[0]
    maps = [item for item in context.of(value) if item.axis == 1]
    if value is None or not maps:
        for name in ("weight", "bias", "running_mean", "running_var"):
            context.coupling.freeze_all(
                context.of(node.args.get(name)), f"{node.name} applies it to channels that stay"
            )
        return None
    return joined_indices(maps[0].ids, 1, value.shape[1], context.coupling, node.name)


def _with_parameters(node: Node, context: Context, vector: Tensor, names: tuple[str, ...]) -> Maps:
    for name in names:
        parameter = node.args.get(name)
        if isinstance(parameter, Value):
            maps = [item for item in context.of(parameter) if item.axis == 0]
            if not maps:
                raise CannotFollow(f"{node.name} has {name} values of its own that cannot be cut")
            context.coupling.join(vector, maps[0].ids, node.name)
    return (along(vector, 1, len(node.outputs[0].shape)),)
