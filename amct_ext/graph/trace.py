"""The graph of a model as one forward ran it, and the questions that the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from amct_ext.common.layer_kinds import BATCH_NORMS, CONVS, QUANTIZABLE
from amct_ext.config.traits import LayerTraits
from amct_ext.graph.export_risks import ExportRisk
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.probes import confirmed_unread, evaluated_only, left_out_by_eval
from amct_ext.graph.recorder import record
from amct_ext.graph.traits import layer_traits
from amct_ext.graph.values import Node, Value

_UNREAD = "its result reaches no tensor that the model returns"
_EVALUATED_ONLY = (
    "it runs in evaluation but not in training, so nothing trains it (a block with branches that are merged into it?)"
)
_LEFT_OUT = "model.eval() takes it out of the forward (a train() of its own that merges it into another layer?)"
_WRITTEN = "forward writes its weight or bias itself"


@dataclass(eq=False)
class Graph:
    """The recorded forward. `calls` maps every layer that ran to its calls; `nodes` are in execution order.

    `left_alone`: layers that ran and yet are not to be compressed -> why (their results reach no output, they do not
    run in training or after `model.eval()`, forward writes their weights). `foreign`: parameters that ops read and that
    are none of the model's. `export_risks`: the places that make it worth while to try an export.
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    calls: dict[str, list[Node]]
    left_alone: Mapping[str, str] = field(default_factory=dict)
    foreign: list[nn.Parameter] = field(default_factory=list)
    export_risks: tuple[ExportRisk, ...] = ()

    def traits(self, model: nn.Module) -> dict[str, LayerTraits]:
        """What each layer of the model can take, in named_modules order; where it cannot be quantised, why."""
        return layer_traits(self.calls, model, self.left_alone, self.parameter_readers())

    def unread(self) -> frozenset[str]:
        """Layers from which no recorded op leads to an output. Empty where the model returns no computed tensor."""
        seen: set[int] = set()
        open_nodes = [value.producer for value in self.outputs]
        while open_nodes:
            node = open_nodes.pop()
            if node is not None and id(node) not in seen:
                seen.add(id(node))
                open_nodes += [value.producer for value in node.inputs if value is not None]
        layers = {name: nodes for name, nodes in self.calls.items() if nodes[0].op in QUANTIZABLE}
        found = frozenset(name for name, nodes in layers.items() if not any(id(node) in seen for node in nodes))
        return found if len(found) < len(layers) else frozenset()

    def layer_input(self, layer: str) -> Value | None:
        """The value at input 0 of a layer that was called exactly once, else None."""
        calls = self.calls.get(layer, [])
        return calls[0].inputs[0] if len(calls) == 1 and calls[0].inputs else None

    def shared_inputs(self) -> list[tuple[str, ...]]:
        """Groups of two or more layers that read the same value at input 0, each group in execution order."""
        readers: dict[int, list[str]] = {}
        for node in self.nodes:
            if node.op in QUANTIZABLE and len(self.calls.get(node.name, [])) == 1 and node.inputs:
                readers.setdefault(id(node.inputs[0]), []).append(node.name)
        return [tuple(names) for names in readers.values() if len(names) > 1]

    def conv_bn(self) -> dict[str, str]:
        """Convolution name -> BatchNorm name, where the BatchNorm is the only reader of the convolution's output."""
        pairs = {}
        for name, calls in self.calls.items():
            node = calls[0]
            if len(calls) != 1 or node.op not in CONVS or len(node.outputs) != 1:
                continue
            readers = node.outputs[0].consumers
            if len(readers) != 1 or readers[0].op not in BATCH_NORMS or node.outputs[0] in self.outputs:
                continue
            if len(self.calls[readers[0].name]) == 1:
                pairs[name] = readers[0].name
        return pairs

    def fed_by_relu(self, layer: str) -> bool:
        """Whether input 0 of the layer comes straight from a ReLU (module or function, not ReLU6 or a clamp)."""
        value = self.layer_input(layer)
        return value is not None and value.producer is not None and value.producer.op == "relu"

    def parameter_readers(self) -> dict[str, list[Node]]:
        """Parameters that an op reads outside the layer that holds them: qualified parameter name -> the ops."""
        return {value.name: value.consumers for value in self.sources if value.kind == "parameter" and value.consumers}

    @property
    def sources(self) -> Sequence[Value]:
        """Values without a producer, in order of first use."""
        found: dict[int, Value] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and value.producer is None:
                    found.setdefault(id(value), value)
        return list(found.values())


def trace(model: nn.Module, input_data: Any) -> Graph:
    """Run the model once on `input_data` (see graph.inputs) and return what ran.

    The run is eager, in eval mode, without gradients; modes, buffers and random state are as before afterwards.
    Errors: InputDataError (input_data has another type, or the model rejects it), ModelError (nothing to trace).
    """
    recording = record(model, input_data)
    graph = Graph(
        recording.nodes,
        recording.inputs,
        recording.outputs,
        recording.calls,
        foreign=recording.foreign,
        export_risks=recording.export_risks,
    )
    inputs = parse_inputs(model, input_data)
    read = [model.get_parameter(name) for name in graph.parameter_readers()]
    left = dict.fromkeys(confirmed_unread(model, inputs, graph.unread()), _UNREAD)
    left |= dict.fromkeys(left_out_by_eval(model, inputs, graph.calls), _LEFT_OUT)
    left |= dict.fromkeys((name.rpartition(".")[0] for name in recording.written), _WRITTEN)
    left |= dict.fromkeys(evaluated_only(model, inputs, graph.calls, read), _EVALUATED_ONLY)
    layers = {name for name, nodes in graph.calls.items() if nodes[0].op in QUANTIZABLE}
    return replace(graph, left_alone={name: why for name, why in left.items() if name in layers})
