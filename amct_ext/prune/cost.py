"""Bit operations of a model, from its recorded feature maps, and of the model without some channels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from amct_ext.common.layer_kinds import LayerFamily, LayerKind, is_depthwise, kind_named, kind_of
from amct_ext.graph.trace import Graph
from amct_ext.graph.values import Node
from amct_ext.prune.groups import ChannelGroup


@dataclass(frozen=True)
class LayerCost:
    """One layer's cost per sample. positions: how often each filter is applied (pixels, tokens, calls).

    already_removed_inputs, already_removed_outputs: channels that are removed in any case.
    """

    inputs: int
    outputs: int
    kernel_elements: int
    groups: int
    bias: bool
    positions: int
    bits: int  # of one element of the weight
    depthwise: bool = False
    already_removed_inputs: int = 0
    already_removed_outputs: int = 0

    @property
    def original(self) -> int:
        """Bit operations of the unpruned layer."""
        return replace(self, already_removed_inputs=0, already_removed_outputs=0).bit_operations()

    def bit_operations(self, lost_inputs: int = 0, lost_outputs: int = 0) -> int:
        """(2 * inputs per filter * kernel elements - 1 + bias) * outputs * positions * bits^2, after more removals."""
        lost_inputs, lost_outputs = (
            lost_inputs + self.already_removed_inputs,
            lost_outputs + self.already_removed_outputs,
        )
        outputs = self.outputs - lost_outputs
        if self.depthwise:  # outputs follow from the inputs
            per_filter = 1
            outputs = self.outputs * (self.inputs - lost_inputs) // self.inputs
        else:
            per_filter = (self.inputs - lost_inputs) // self.groups
        operations = 2 * per_filter * self.kernel_elements - 1 + self.bias
        return max(0, operations) * outputs * self.positions * self.bits**2


class Cost:
    """Cost of a model as a function of how many channels each group loses.

    ``cost([0, 16])`` is the number of bit operations of one sample when the first group loses nothing and the second
    loses 16 channels. `layers`: the cost of every layer that counts, also of those that no group touches.
    """

    def __init__(self, layers: Mapping[str, LayerCost], groups: Sequence[ChannelGroup]) -> None:
        self._layers = {name: _Layer(cost) for name, cost in layers.items()}
        self._layers_of_group: list[set[str]] = []
        for index, group in enumerate(groups):
            makers, readers = (
                [m for m in side if m.name in self._layers] for side in (group.producers, group.consumers)
            )
            for member in makers:
                self._layers[member.name].outputs.append(index)
            for member in readers:
                self._layers[member.name].inputs.append((index, member.per_channel(group.count)))
            self._layers_of_group.append({member.name for member in [*makers, *readers]})
        self.original = sum(layer.cost.original for layer in self._layers.values())

    def __call__(self, removed: Sequence[int]) -> int:
        """Total bit operations per sample."""
        return sum(layer.bit_operations(removed) for layer in self._layers.values())

    def cost_of_group(self, removed: Sequence[int], group: int) -> int:
        """The part of the total that depends on this group: enough to compare two values of its count."""
        return sum(self._layers[name].bit_operations(removed) for name in self._layers_of_group[group])

    def affected_groups(self, group: int) -> set[int]:
        """The groups whose cost depends on how many channels this one loses, itself among them."""
        layers = [self._layers[name] for name in self._layers_of_group[group]]
        return {index for layer in layers for index in (*layer.outputs, *(index for index, _ in layer.inputs))}


@dataclass
class _Layer:
    """A layer's cost and the groups that it produces, or reads with so many indices per channel."""

    cost: LayerCost
    outputs: list[int] = field(default_factory=list)
    inputs: list[tuple[int, float]] = field(default_factory=list)

    def bit_operations(self, counts: Sequence[int]) -> int:
        lost_inputs = round(sum(counts[group] * repeat for group, repeat in self.inputs))
        return self.cost.bit_operations(lost_inputs, sum(counts[group] for group in self.outputs))


def layer_costs(graph: Graph, model: nn.Module, given: Sequence[tuple[ChannelGroup, int]] = ()) -> dict[str, LayerCost]:
    """The cost of every convolution and linear layer that ran. `given`: groups that lose so many channels anyway."""
    modules = dict(model.named_modules())
    costs = {name: layer_cost(modules[name], calls) for name, calls in graph.calls.items() if _counts(calls[0])}
    for group, count in given:
        for member in group.producers:
            if member.name in costs:
                cost = costs[member.name]
                costs[member.name] = replace(cost, already_removed_outputs=cost.already_removed_outputs + count)
        for member in group.consumers:
            if member.name in costs:
                cost = costs[member.name]
                costs[member.name] = replace(
                    cost,
                    already_removed_inputs=cost.already_removed_inputs + round(count * member.per_channel(group.count)),
                )
    return costs


def _counts(call: Node) -> bool:
    kind = kind_named(call.op)
    return kind is not None and kind.family in (LayerFamily.CONV, LayerFamily.TRANSPOSED_CONV, LayerFamily.LINEAR)


def layer_cost(module: nn.Module, calls: Sequence[Node]) -> LayerCost:
    """The cost of a convolution or linear layer in the traced forward, per sample (axis 0 counts samples)."""
    kind, weight = kind_of(module), module.weight
    assert isinstance(kind, LayerKind) and isinstance(weight, Tensor)
    inputs, outputs = (int(getattr(module, name)) for name in kind.widths)
    groups = int(getattr(module, "groups", 1))
    positions = 0
    for call in calls:
        # A transposed convolution applies its kernel at each position of its input.
        source = call.inputs[0] if kind.family is LayerFamily.TRANSPOSED_CONV else None
        channels, value = (outputs, call.outputs[0]) if source is None else (inputs, source)
        positions += math.prod(value.shape[1:]) // channels
    return LayerCost(
        inputs,
        outputs,
        kernel_elements=math.prod(weight.shape[2:]),
        groups=groups,
        bias=module.bias is not None,
        positions=positions,
        bits=8 * weight.element_size(),
        depthwise=is_depthwise(module),
    )
