"""Discovery of channel groups: one walk over the recorded forward, from each layer's output to its readers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from amct_ext.common.layer_kinds import Family, LayerKind, computed_parameter, is_depthwise, kind_named, kind_of
from amct_ext.config.plan import Plan
from amct_ext.config.text import FilterPrune
from amct_ext.graph.trace import Graph
from amct_ext.graph.traits import why_not_usable
from amct_ext.graph.values import Node, Value
from amct_ext.prune.groups import ChannelGroup, Layout, Member, Segment
from amct_ext.prune.op_rules import op_rule
from amct_ext.prune.rule_types import CannotFollow


@dataclass(frozen=True)
class Discovery:
    """All groups in the order in which their first producer ran, merged ones once."""

    groups: tuple[ChannelGroup, ...]

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels may go."""
        return tuple(group for group in self.groups if not group.why_frozen)

    def why_not(self) -> dict[str, str]:
        """Layers that the plan would prune but that stay whole: name -> reason."""
        return {
            member.name: group.why_frozen for group in self.groups if group.why_frozen for member in group.producers
        }


def discover(graph: Graph, plan: Plan, model: nn.Module) -> Discovery:
    """Find the groups of coupled channels of all layers that the plan asks to prune."""
    walk = _Walk(graph, plan, model)
    for node in graph.nodes:
        walk.visit(node)
    for value in graph.outputs:
        layout = walk.layouts.get(value)
        if layout is not None:
            layout.freeze("its channels are an output of the model")
    return Discovery(tuple(group for group in walk.groups if group.root is group))


class _Walk:
    def __init__(self, graph: Graph, plan: Plan, model: nn.Module) -> None:
        self.layouts: dict[Value, Layout] = {}
        self.groups: list[ChannelGroup] = []
        self._plan = plan
        self._modules = dict(model.named_modules())
        self._obstacles = _obstacles(graph, model)

    def visit(self, node: Node) -> None:
        arriving = [None if value is None else self.layouts.get(value) for value in node.inputs]
        try:
            if node.module is not None:
                self._layer(node, arriving)
            elif any(layout is not None for layout in arriving):
                self._op(node, arriving)
        except CannotFollow as reason:
            for layout in arriving:
                if layout is not None:
                    layout.freeze(str(reason))

    def _op(self, node: Node, arriving: list[Layout | None]) -> None:
        rule = op_rule(node)
        if rule is None:
            raise CannotFollow(f"they are read by {node.name} ({node.op}), which channel removal cannot follow")
        layout = rule(node, arriving)
        if layout is None:
            return
        outputs = [value for value in node.outputs if value.shape[layout.axis : layout.axis + 1] == (layout.size,)]
        if not outputs:
            raise CannotFollow(f"{node.name} ({node.op}) changes their number")
        self.layouts.update(dict.fromkeys(outputs, layout))

    def _layer(self, node: Node, arriving: list[Layout | None]) -> None:
        kind = kind_named(node.op)
        assert kind is not None
        # The output first: whatever hinders the input, a layer's own channels are a group of their own.
        if kind.filter_prunable and not is_depthwise(self._modules[node.name]):
            self._produce(node, kind)
        if any(layout is not None for layout in arriving[1:]):
            raise CannotFollow(f"they are read by {node.name} at a second input")
        layout = arriving[0] if arriving else None
        if layout is None:
            return
        if kind.family is Family.BATCH_NORM and layout.axis != 1:
            self._across(node, layout)
            return
        obstacle = self._obstacles.get(node.name)
        if obstacle:
            raise CannotFollow(f"they are read by {node.name}, and {obstacle}")
        if not kind.input_prunable:
            raise CannotFollow(f"they are read by {node.name}, and channels of {node.op} inputs are not removed")
        if kind.family is Family.BATCH_NORM:
            self._channelwise(node, layout)
        elif kind.family is Family.LINEAR:
            self._linear(node, layout)
        else:
            self._convolution(node, kind, layout)

    def _produce(self, node: Node, kind: LayerKind) -> None:
        settings = self._plan.layers.get(node.name)
        if settings is None or not isinstance(settings.prune, FilterPrune) or len(node.outputs) != 1:
            return
        module = self._modules[node.name]
        groups = getattr(module, "groups", 1)
        output = node.outputs[0]
        axis = kind.channel_axis % len(output.shape)
        member = Member(node.name, onnx_operator(node, module), group=groups if groups > 1 else None)
        group = ChannelGroup(output.shape[axis], [member])
        if groups > 1:
            group.in_blocks(groups, node.name)
        if self._obstacles.get(node.name):
            group.freeze(self._obstacles[node.name])
        if not any(member == other for known in self.groups for other in known.producers):
            self.groups.append(group)
        self.layouts[output] = Layout(axis, (Segment(group, group.count),))

    def _read(self, node: Node, layout: Layout, group: int | None = None) -> None:
        module = self._modules[node.name]
        for begin, segment in layout.begins():
            if segment.group is not None:
                segment.group.read_by(Member(node.name, onnx_operator(node, module), begin, segment.repeat, group))

    def _across(self, node: Node, layout: Layout) -> None:
        """BatchNorm over another axis (tokens): one factor and term for all channels, so it is not cut itself."""
        if self._modules[node.name].running_mean is None:
            raise CannotFollow(f"{node.name} normalises over the channels, so removing some would change the others")
        self.layouts[node.outputs[0]] = layout

    def _channelwise(self, node: Node, layout: Layout, multiplier: int = 1) -> None:
        """BatchNorm, depthwise convolution: output channels follow from the input's."""
        if layout.axis != 1:
            raise CannotFollow(f"{node.name} does not have its channels where theirs lie")
        self._read(node, layout)
        self.layouts[node.outputs[0]] = layout.repeated(multiplier)

    def _linear(self, node: Node, layout: Layout) -> None:
        source = node.inputs[0]
        if source is None or layout.axis != len(source.shape) - 1:
            raise CannotFollow(f"{node.name} works along another axis than that of the channels")
        self._read(node, layout)

    def _convolution(self, node: Node, kind: LayerKind, layout: Layout) -> None:
        module = self._modules[node.name]
        source = node.inputs[0]
        if source is None or layout.axis != 1 or len(source.shape) != kind.batched_dims:
            raise CannotFollow(f"{node.name} works along another axis than that of the channels")
        groups = int(getattr(module, "groups", 1))
        if is_depthwise(module):
            self._channelwise(node, layout, int(getattr(module, "out_channels", 0)) // groups)
        elif groups == 1:
            self._read(node, layout)
        elif len(layout.segments) > 1:
            raise CannotFollow(f"the {groups} groups of {node.name} lie across joined tensors")
        else:
            for group in layout.groups:
                group.in_blocks(groups, node.name)
            self._read(node, layout, groups)


def onnx_operator(node: Node, module: nn.Module) -> str:
    """The ONNX operator that a call of a layer becomes, as records name it."""
    kind = kind_named(node.op)
    assert kind is not None
    source = node.inputs[0] if node.inputs else None
    flat = source is not None and len(source.shape) == 2 and getattr(module, "bias", None) is not None
    return kind.onnx[0] if flat else kind.onnx[-1]


def _obstacles(graph: Graph, model: nn.Module) -> dict[str, str]:
    """Layers whose shapes must not change, with the reason."""
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name or "the model itself")
    result: dict[str, str] = {}
    for parameter_name, readers in graph.parameter_readers().items():
        result[parameter_name.rpartition(".")[0]] = f"{readers[0].name} also reads its parameter {parameter_name}"
    for name, calls in graph.calls.items():
        for reason in _layer_obstacles(name, calls, modules[name], graph, owners):
            result.setdefault(name, reason)
    return result


def _layer_obstacles(
    name: str, calls: list[Node], module: nn.Module, graph: Graph, owners: dict[int, list[str]]
) -> Iterator[str]:
    kind = kind_of(module)
    if kind is not None and kind.family is Family.BATCH_NORM:
        if len(calls) > 1:
            yield f"it is called {len(calls)} times in one forward"
        computed = computed_parameter(module)
        if computed:
            yield f"its {computed} is computed (parametrisation or weight norm)"
    else:
        reason = why_not_usable(graph.calls, name, module)
        if reason:
            yield reason
    for parameter in module._parameters.values():
        others = [other for other in owners.get(id(parameter), []) if other != name]
        if others:
            yield f"it shares a parameter with {', '.join(others)}"
