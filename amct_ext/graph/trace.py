"""The graph of a model as one forward ran it, and the questions that the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from amct_ext.config.plan import LayerTraits
from amct_ext.graph.layer_types import BATCH_NORMS, CONVS, QUANTIZABLE
from amct_ext.graph.recorder import Doubt, record
from amct_ext.graph.traits import layer_traits
from amct_ext.graph.values import Node, Value

__all__ = ["Graph", "Node", "Value", "trace"]


@dataclass(eq=False)
class Graph:
    """The recorded forward. `calls` maps every layer that ran to its calls; `nodes` are in execution order.

    `doubts` are the places that make it worth while to try an export.
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    calls: dict[str, list[Node]]
    doubts: tuple[Doubt, ...] = ()

    def traits(self, model: nn.Module) -> dict[str, LayerTraits]:
        """What each layer of the model can take, in named_modules order; where it cannot be quantised, why."""
        return layer_traits(self.calls, model)

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
    return Graph(recording.nodes, recording.inputs, recording.outputs, recording.calls, recording.doubts)
