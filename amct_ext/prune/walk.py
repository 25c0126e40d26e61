"""Discovery of channel groups: one walk over the recorded forward, from each layer's output to its consumers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORM_TENSORS, LayerFamily, LayerKind, is_depthwise, kind_named, kind_of
from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune
from amct_ext.graph.tensor_values import RELATIONS
from amct_ext.graph.trace import Graph, leaf_values_of
from amct_ext.graph.traits import onnx_operator
from amct_ext.graph.values import Node, Value
from amct_ext.prune.channel_map import ChannelMap, from_vector
from amct_ext.prune.coupling import AxisUse, Coupling, ParameterAxis, collapse_to_axis
from amct_ext.prune.discovery import Discovery, EqualRemoval
from amct_ext.prune.fixed_shapes import fixed_shape_reasons, shared_parameters
from amct_ext.prune.grouping import Grouping
from amct_ext.prune.rules.table import op_rule
from amct_ext.prune.rules.types import CannotFollow, Context, Maps

_logger = logging.getLogger("amct_ext")


_CUT_LAYERS = (LayerFamily.CONV, LayerFamily.TRANSPOSED_CONV, LayerFamily.LINEAR, LayerFamily.BATCH_NORM)


def discover(graph: Graph, plan: Plan, model: nn.Module, equal_removals: Iterable[EqualRemoval] = ()) -> Discovery:
    """Find the groups of coupled channels of all layers that the plan asks to prune.

    `equal_removals`: of the ids of an earlier discovery in the same graph.
    """
    walk = _Walk(graph, plan, model)
    walk.follow(graph.nodes, graph.outputs)
    if graph.training is not None:
        walk.follow(graph.training.nodes, graph.training.outputs)
    for each in equal_removals:
        walk.coupling.require_equal_removal(each.rows, each.where, strict=False)
    grouping = Grouping(walk.coupling, walk.is_covered)
    coupling = walk.coupling
    return Discovery(
        graph,
        tuple(grouping.groups),
        walk.context.maps,
        grouping.channel_of,
        coupling.axis_ids,
        coupling.default_scaled_queries,
    )


class _Walk:
    """Visits nodes in order; the `LayerLookup` of the rules (rules.types)."""

    def __init__(self, graph: Graph, plan: Plan, model: nn.Module) -> None:
        self.coupling = Coupling()
        self.context = Context(self.coupling, self)
        self._plan, self._calls = plan, graph.all_calls()
        self._modules = dict(model.named_modules())
        self._fixed_shapes = fixed_shape_reasons(graph, model)
        self._fixed_readers: set[str] = set()  # layers that read channels that stay
        self._returned: set[Value] = set()
        self._shared = shared_parameters(model)

    def follow(self, nodes: Sequence[Node], outputs: Sequence[Value]) -> None:
        """Walk over the nodes of one forward."""
        self.coupling.begin_walk()
        self._returned.update(outputs)
        self._name_parameters(nodes)
        for node in nodes:
            self.visit(node)
        for value in outputs:
            self.coupling.freeze_all(self.context.of(value), "its channels are an output of the model")

    def _name_parameters(self, nodes: Sequence[Node]) -> None:
        for value in leaf_values_of(nodes):
            if value.kind in ("parameter", "buffer") and value.dtype.is_floating_point:
                self.context.maps[value] = tuple(
                    self._parameter_map(value, axis) for axis, size in enumerate(value.shape) if size > 1
                )
                if value.name in self._shared:
                    self.coupling.freeze_all(
                        self.context.maps[value], f"{value.name} is shared by {self._shared[value.name]}"
                    )

    def _parameter_map(self, value: Value, axis: int) -> ChannelMap:
        owner, _, key = value.name.rpartition(".")
        kind, groups = kind_of(self._modules[owner]), int(getattr(self._modules[owner], "groups", 1))
        if key == "weight" and kind is not None and kind.family is LayerFamily.CONV and groups > 1 and axis == 1:
            # A filter reads the inputs of its group: index j is another channel in another group.
            filters, inputs = value.shape[:2]
            ids = self.coupling.ids_of(ParameterAxis(owner, None), groups * inputs).reshape(groups, 1, inputs)
            ids = ids.expand(groups, filters // groups, inputs).reshape(filters, inputs, *[1] * (len(value.shape) - 2))
            return ChannelMap(ids, 1)
        return from_vector(
            self.coupling.ids_of(ParameterAxis(value.name, axis), value.shape[axis]), axis, len(value.shape)
        )

    def visit(self, node: Node) -> None:
        try:
            if node.module is not None:
                self._layer(node)
            elif self._matters(node) and any(self.context.of(value) for value in node.inputs):
                self._op(node)
        except CannotFollow as reason:
            self._freeze_all(node, str(reason))
        except (RuntimeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            # Unexpected call form: treated as an op without a rule. The log tells it from a broken rule.
            _logger.debug("%s (%s): its rule raised", node.name, node.op, exc_info=True)
            self._freeze_all(node, f"the rule for {node.name} ({node.op}) does not fit it: {error}")

    def _matters(self, node: Node) -> bool:
        """Whether an op's result is read, or its inputs have to fit each other."""
        if any(value.consumers or value in self._returned for value in node.outputs):
            return True
        return node.op not in RELATIONS and sum(v is not None and v.kind != "constant" for v in node.inputs) > 1

    def _freeze_all(self, node: Node, reason: str) -> None:
        for value in (*node.inputs, *node.outputs):
            self.coupling.freeze_all(self.context.of(value), reason)

    def is_covered(self, source: ParameterAxis) -> bool:
        """Whether an axis is cut with a layer."""
        name, _, key = source.name.rpartition(".")
        if source.axis is None or key not in BATCH_NORM_TENSORS:
            return source.axis is None
        owner = self._modules.get(name)
        kind = kind_of(owner) if owner is not None else None
        return kind is not None and kind.family in _CUT_LAYERS

    # What rules ask

    def input_ids(self, weight: Value, size: int) -> Tensor | None:
        owner = self._owner(weight)
        return None if owner is None else self.coupling.ids_of(ParameterAxis(owner, None), size)

    def mark_produced(self, node: Node, weight: Value, ids: Tensor) -> None:
        owner = self._owner(weight)
        if owner is None:
            return
        kind = kind_of(self._modules[owner])
        assert kind is not None
        if not self._is_to_prune(owner) or self._fixed_shapes.get(owner):
            self.coupling.freeze(ids, self._fixed_shapes.get(owner) or f"{owner} keeps its channels")
            return
        source = ParameterAxis(f"{owner}.weight", kind.weight_axes[1])
        groups = int(getattr(self._modules[owner], "groups", 1))
        own = self.coupling.ids_of(source, len(ids))
        self.coupling.add_producer(own, AxisUse(owner, self._operator(node, kind), own, groups if groups > 1 else None))

    def mark_read(self, node: Node, parameter: Value, ids: Tensor, num_groups: int | None = None) -> None:
        owner = self._owner(parameter)
        if owner is not None:
            kind = kind_of(self._modules[owner])
            assert kind is not None
            if self._fixed_shapes.get(owner):
                raise CannotFollow(f"they are read by {owner}, and {self._fixed_shapes[owner]}")
            self.coupling.add_consumer(AxisUse(owner, self._operator(node, kind), ids, num_groups))

    def _owner(self, weight: Value) -> str | None:
        """The layer whose weight a value is made of, None where it is that of no known type."""
        source: Value | None = weight
        while source is not None and source.producer is not None and source.producer.module is None:
            source = source.producer.inputs[0] if source.producer.inputs else None
        if source is None or source.kind != "parameter" or source.name.rpartition(".")[2] != "weight":
            return None
        owner = source.name.rpartition(".")[0]
        kind = kind_of(self._modules[owner])
        return owner if kind is not None and kind.family in _CUT_LAYERS else None

    @staticmethod
    def _operator(node: Node, kind: LayerKind) -> str:
        return kind.onnx[0] if node.op == "addmm" else kind.onnx[-1]

    def can_scale_output(self, node: Node) -> bool:
        kind = kind_of(self._modules[node.name])
        asked = kind is not None and kind.filter_prunable and kind.weight_axes[1] == 0
        return asked and len(self._calls[node.name]) == 1

    # Nodes

    def _op(self, node: Node) -> None:
        rule = op_rule(node)
        if rule is None:
            where = f" in {node.scope}" if node.scope else ""
            raise CannotFollow(f"they are read by {node.name} ({node.op}{where}), which channel removal cannot follow")
        for number, maps in rule(node, self.context).items():
            output = node.outputs[number]
            fitting = tuple(item for item in maps if len(item.ids.shape) == len(output.shape))
            if len(fitting) < len(maps):
                self.coupling.freeze_all(maps, f"{node.name} ({node.op}) changes their number")
            self.context.maps[output] = fitting

    def _is_to_prune(self, name: str) -> bool:
        settings = self._plan.layers.get(name)
        return settings is not None and isinstance(settings.prune, FilterPrune)

    def _layer(self, node: Node) -> None:
        kind = kind_named(node.op)
        assert kind is not None
        # Map the output first: a frozen input must not freeze the layer's own channels.
        if kind.filter_prunable and not is_depthwise(self._modules[node.name]):
            self._produce(node, kind)
        if any(self.context.of(value) for value in node.inputs[1:]):
            raise CannotFollow(f"they are read by {node.name} at a second input")
        value = node.inputs[0] if node.inputs else None
        maps = self.context.of(value)
        if value is None or not maps:
            known = self.coupling.axis_ids.get(ParameterAxis(node.name, None))
            if known is not None:
                self.coupling.freeze(known, f"{node.name} reads channels that stay in another call")
            self._fixed_readers.add(node.name)
            return
        if kind.family is LayerFamily.BATCH_NORM and maps[0].axis != 1:
            self._over_other_axis(node, maps)
            return
        reason_to_stay = self._fixed_shapes.get(node.name)
        if reason_to_stay:
            raise CannotFollow(f"they are read by {node.name}, and {reason_to_stay}")
        if not kind.input_prunable:
            raise CannotFollow(f"they are read by {node.name}, and channels of {node.op} inputs are not removed")
        if kind.family is LayerFamily.LINEAR:
            self._linear(node, value, maps)
            return
        if len(maps) > 1 or maps[0].axis != 1 or (kind.batched_dims not in (None, len(value.shape))):
            raise CannotFollow(f"{node.name} works along another axis than that of the channels")
        ids = collapse_to_axis(maps[0].ids, 1, value.shape[1], self.coupling, node.name)
        if kind.family is LayerFamily.BATCH_NORM:
            self._channelwise(node, ids)
        else:
            self._convolution(node, ids)

    def _produce(self, node: Node, kind: LayerKind) -> None:
        if not self._is_to_prune(node.name) or len(node.outputs) != 1:
            return
        module, output = self._modules[node.name], node.outputs[0]
        groups = int(getattr(module, "groups", 1))
        axis = kind.channel_axis % len(output.shape)
        ids = self.coupling.ids_of(ParameterAxis(f"{node.name}.weight", kind.weight_axes[1]), output.shape[axis])
        operator = onnx_operator(node, module)
        self.coupling.add_producer(ids, AxisUse(node.name, operator, ids, groups if groups > 1 else None))
        if groups > 1:
            self.coupling.require_equal_removal(ids.reshape(groups, -1), node.name)
        if self._fixed_shapes.get(node.name):
            self.coupling.freeze(ids, self._fixed_shapes[node.name])
        self.context.maps[output] = (from_vector(ids, axis, len(output.shape)),)

    def _add_consumer(self, node: Node, ids: Tensor, num_groups: int | None = None) -> None:
        # A layer that is called several times has the same channels each time, and is named once.
        source = ParameterAxis(node.name, None)
        known = source in self.coupling.axis_ids
        self.coupling.join(ids, self.coupling.ids_of(source, len(ids)), node.name)
        if node.name in self._fixed_readers:
            self.coupling.freeze(ids, f"{node.name} reads channels that stay in another call")
        if not known:
            self.coupling.add_consumer(
                AxisUse(node.name, onnx_operator(node, self._modules[node.name]), ids, num_groups)
            )

    def _over_other_axis(self, node: Node, maps: Maps) -> None:
        """BatchNorm over another axis (tokens): its weight is indexed by that axis, so it loses nothing."""
        if self._modules[node.name].running_mean is None:
            raise CannotFollow(f"{node.name} normalises over the channels, so removing some would change the others")
        self.context.maps[node.outputs[0]] = maps

    def _channelwise(self, node: Node, ids: Tensor, multiplier: int = 1) -> None:
        """BatchNorm, depthwise convolution: output channels follow from the input's."""
        self._add_consumer(node, ids)
        output = node.outputs[0]
        self.context.maps[output] = (from_vector(ids.repeat_interleave(multiplier), 1, len(output.shape)),)

    def _linear(self, node: Node, value: Value, maps: Maps) -> None:
        """Channels along the last axis are read; those along others (mixed tokens) pass through."""
        last, passing = len(value.shape) - 1, []
        for item in maps:
            if item.axis == last:
                self._add_consumer(node, collapse_to_axis(item.ids, last, value.shape[last], self.coupling, node.name))
            elif last in item.varying_axes:
                raise CannotFollow(f"{node.name} works along another axis than that of the channels")
            else:
                passing.append(item)
        output = node.outputs[0]
        self.context.maps[output] = (*self.context.of(output), *passing)

    def _convolution(self, node: Node, ids: Tensor) -> None:
        module = self._modules[node.name]
        groups = int(getattr(module, "groups", 1))
        if is_depthwise(module):
            self._channelwise(node, ids, int(getattr(module, "out_channels", 0)) // groups)
        else:
            if groups > 1:
                self.coupling.require_equal_removal(ids.reshape(groups, -1), node.name)
            self._add_consumer(node, ids, groups if groups > 1 else None)
