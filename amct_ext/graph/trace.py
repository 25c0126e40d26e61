"""The graph of a model as one forward ran it, and the questions that the rest of the package asks of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from amct_ext.common.layer_kinds import BATCH_NORM_TENSORS, BATCH_NORMS, CONVS, QUANTIZABLE
from amct_ext.config.traits import LayerTraits
from amct_ext.graph.export_risks import ExportRisk
from amct_ext.graph.functional_layers import find_functional_layers
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.operators import BATCH_NORM_OPS
from amct_ext.graph.probes import confirmed_unused, eval_only_layers, removed_by_eval_call
from amct_ext.graph.products import find_products
from amct_ext.graph.recorder import Recording, record
from amct_ext.graph.training import record_training
from amct_ext.graph.traits import layer_traits
from amct_ext.graph.values import Node, Value
from amct_ext.graph.weight_use import leaf_parameters, operands
from amct_ext.layers.product_call import Product

_UNREAD = "its result reaches no tensor that the model returns"
_EVAL_ONLY = (
    "it runs in evaluation but not in training, so nothing trains it (a block with branches that are merged into it?)"
)
_REMOVED_BY_EVAL = "model.eval() takes it out of the forward (a train() of its own that merges it into another layer?)"
_WRITTEN = "forward writes its weight or bias itself"

_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "permute", "transpose", "t")


@dataclass(eq=False)
class Graph:
    """The recorded forward. `calls` maps every layer that ran to its calls; `nodes` are in execution order.

    `excluded`: layers that ran and are not compressed -> why (their results reach no output, they do not
    run in training or after `model.eval()`, forward writes their weights). `foreign`: parameters that ops read and that
    are none of the model's. `export_risks`: locations that may break an export. `products`: modules
    with a weight and a forward of their own -> the product in it, or why there is none to quantise. `training`: what a
    forward in train mode computes with parameters that this one does not read (heads that only train), with all that it
    needs; None where there is no such parameter.
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    calls: dict[str, list[Node]]
    excluded: Mapping[str, str] = field(default_factory=dict)
    foreign: list[nn.Parameter] = field(default_factory=list)
    export_risks: tuple[ExportRisk, ...] = ()
    products: Mapping[str, Product | str] = field(default_factory=dict)
    training: Recording | None = None

    def traits(self, model: nn.Module, beyond_amct: bool = False) -> dict[str, LayerTraits]:
        """What each layer of the model can take, in named_modules order; where it cannot be quantised, why.

        `beyond_amct`: whether to quantise also what AMCT leaves float.
        """
        return layer_traits(self.calls, model, self.excluded, self.parameter_readers(), self.products, beyond_amct)

    def product_nodes(self) -> dict[str, Node]:
        """The op that is the product of each module in `products`, in execution order."""
        found = {}
        wanted = {f"{name}.weight": name for name, product in self.products.items() if isinstance(product, Product)}
        for node in self.nodes if wanted else ():
            weights = [value for value in operands(node) if not value.depends_on_input()]
            if len(weights) == 1:
                read = {source.name for source in leaf_parameters(weights[0]) if source.kind == "parameter"}
                found.update({wanted[name]: node for name in read & wanted.keys()})
        return found

    def layer_order(self) -> list[str]:
        """Layers, and modules with a product of their own, in the order in which they first ran."""
        products = {id(node): name for name, node in self.product_nodes().items()}
        names = (products.get(id(node), node.module) for node in self.nodes)
        return list(dict.fromkeys(name for name in names if name is not None))

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
        layers |= {name: [node] for name, node in self.product_nodes().items()}
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
        convolutions = {
            name: calls[0] for name, calls in self.calls.items() if len(calls) == 1 and calls[0].op in CONVS
        }
        for name, node in self.product_nodes().items():
            product = self.products[name]
            if isinstance(product, Product) and product.kind in CONVS:
                convolutions[name] = node
        for name, node in convolutions.items():
            readers = node.outputs[0].consumers
            if len(node.outputs) != 1 or len(readers) != 1 or node.outputs[0] in self.outputs:
                continue
            norm = self._norm(readers[0])
            if norm:
                pairs[name] = norm
        return pairs

    def _norm(self, node: Node) -> str:
        """The module whose only BatchNorm a node is: a plain one, or that in a forward of its own; '' where none."""
        if node.op in BATCH_NORMS:
            return node.name if len(self.calls[node.name]) == 1 else ""
        if node.op not in BATCH_NORM_OPS:
            return ""
        read = {key: node.args.get(key) for key in BATCH_NORM_TENSORS}
        names = {value.name for value in read.values() if isinstance(value, Value)}
        owner = next(iter(names), "").rpartition(".")[0]
        if not owner or names != {f"{owner}.{key}" for key, value in read.items() if value is not None}:
            return ""
        mean = read["running_mean"]
        uses = sum(other.op in BATCH_NORM_OPS and other.args.get("running_mean") is mean for other in self.nodes)
        return owner if uses == 1 and isinstance(mean, Value) and not node.args.get("training") else ""

    def fed_by_relu(self, layer: str) -> bool:
        """Whether input 0 of the layer comes straight from a ReLU (module or function, not ReLU6 or a clamp)."""
        value = self.layer_input(layer)
        if isinstance(self.products.get(layer), Product):
            value = self._product_input(layer)
        return value is not None and value.producer is not None and value.producer.op == "relu"

    def _product_input(self, name: str) -> Value | None:
        """What the product of a module reads, before its forward padded it with zeros or gave it another shape."""
        node = self.product_nodes().get(name)
        value = None if node is None else next(value for value in operands(node) if value.depends_on_input())
        while value is not None and value.producer is not None:
            made = value.producer
            if made.op not in _RESHAPES and (made.op != "constant_pad_nd" or made.args.get("value")):
                break
            value = made.inputs[0]
        return value

    def parameter_readers(self, and_training: bool = False) -> dict[str, list[Node]]:
        """Parameters that an op reads outside the layer that holds them: qualified parameter name -> the ops.

        `and_training`: also those of the part that `training` holds.
        """
        trained = leaf_values_of(self.training.nodes) if and_training and self.training is not None else []
        found = [value for value in (*trained, *self.leaf_values) if value.kind == "parameter" and value.consumers]
        return {value.name: value.consumers for value in found}

    @property
    def leaf_values(self) -> Sequence[Value]:
        """Values without a producer, in order of first use."""
        return leaf_values_of(self.nodes)

    def all_calls(self) -> dict[str, list[Node]]:
        """`calls`, and those of the layers that only run in training."""
        return {**(self.training.calls if self.training is not None else {}), **self.calls}


def leaf_values_of(nodes: Iterable[Node]) -> list[Value]:
    """Values without a producer that nodes read, in order of first use."""
    found: dict[int, Value] = {}
    for node in nodes:
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
    inputs = parse_inputs(model, input_data)
    graph = Graph(
        recording.nodes,
        recording.inputs,
        recording.outputs,
        recording.calls,
        foreign=recording.foreign,
        export_risks=recording.export_risks,
        products=find_products(model, inputs),
        training=record_training(model, inputs, recording),
    )
    functional = find_functional_layers(model, inputs, graph.nodes, graph.products)
    graph = replace(graph, products={**graph.products, **functional})
    read = [model.get_parameter(name) for name in graph.parameter_readers()]
    excluded = dict.fromkeys(confirmed_unused(model, inputs, graph.unread()), _UNREAD)
    excluded |= dict.fromkeys(removed_by_eval_call(model, inputs, graph.calls), _REMOVED_BY_EVAL)
    excluded |= dict.fromkeys((name.rpartition(".")[0] for name in recording.written), _WRITTEN)
    excluded |= dict.fromkeys(eval_only_layers(model, inputs, graph.calls, read), _EVAL_ONLY)
    layers = {name for name, nodes in graph.calls.items() if nodes[0].op in QUANTIZABLE} | graph.products.keys()
    return replace(graph, excluded={name: why for name, why in excluded.items() if name in layers})
