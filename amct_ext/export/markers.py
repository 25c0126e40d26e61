"""Find the recorded layers in a captured graph and put markers around each one, before anything is optimised.

Every recorded layer becomes `Quant -> layer -> Dequant` with two marker nodes of a domain of our own. The optimiser
knows nothing of that domain, so it cannot fold a BatchNorm, a Pad or a neighbour into a layer whose integers are fixed,
nor merge two layers that look alike; the two lowerings then replace the markers by what each file needs.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from torch import nn

from amct_ext.common.layer_kinds import PRODUCT_OPERATORS
from amct_ext.errors import ExportError
from amct_ext.export.factors import LayerFactors, int32_bias

DOMAIN = "amct_ext.marker"
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter keeps the path of the module a node comes from
_VIEWS = frozenset({"Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class MarkedLayer:
    """A located call of a layer: `weight` and `bias` as its node reads them (integers), `bias` None where it has none.

    `factors` bears the name of the call, which is the layer's for its first one; `owner` is the layer's name, that of
    its weight. `repeated`: the calls of the layer read one weight.
    """

    factors: LayerFactors
    op: str
    weight: np.ndarray
    bias: np.ndarray | None
    owner: str
    repeated: bool = False

    @property
    def input_axis(self) -> int:
        """The axis of `weight` that runs over input channels."""
        return 1 if self.op == "Conv" else 0


def mark_layers(
    model: ir.Model, torch_model: nn.Module, layers: Sequence[LayerFactors], repeated: Collection[str] = ()
) -> dict[str, MarkedLayer]:
    """Put the markers around every layer and give its node the integers (held as float32), in place.

    `repeated`: layers that may run several times. Returns the calls of the layers by name.
    Errors: ExportError naming a layer that the graph does not hold, or holds more often than it may.
    """
    aliases = parameter_aliases(torch_model)
    found = {
        factors.name: _find(model.graph, factors.name, aliases[f"{factors.name}.weight"], factors.name in repeated)
        for factors in layers
    }
    model.opset_imports[DOMAIN] = 1
    marked: dict[str, MarkedLayer] = {}
    for factors in layers:
        nodes = found[factors.name]
        for place, node in enumerate(nodes):
            call = factors if not place else replace(factors, name=_call_name(factors.name, place, {*found, *marked}))
            layer = _with_integers(call, node, factors.name, len(nodes) > 1)
            _add_markers(model.graph, call.name, node)
            if node.op_type == "Gemm":
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
            bias = None if layer.bias is None else layer.bias.astype(np.float32)
            set_weights(model.graph, node, layer, layer.weight.astype(np.float32), bias)
            marked[call.name] = layer
    return marked


def _call_name(layer: str, place: int, taken: Collection[str]) -> str:
    """The name of a further call of a layer."""
    name = f"{layer}_call{place + 1}"
    while name in taken:
        name += "_"
    return name


def name_layers(graph: ir.Graph) -> None:
    """Name the node of every marked layer after the layer; the optimiser may have replaced it by an equal one."""
    for layer, marker in markers(graph):
        source = marker.inputs[0]
        node = source.producer() if marker.op_type == "Dequant" and source is not None else None
        if node is not None:
            node.name = layer


def markers(graph: ir.Graph) -> Iterator[tuple[str, ir.Node]]:
    """The markers in graph order with the name of their layer. The graph may be edited while this runs."""
    for node in tuple(graph):
        if node.domain == DOMAIN:
            yield node.attributes["layer"].as_string(), node


def set_weights(
    graph: ir.Graph, node: ir.Node, layer: MarkedLayer, weight: np.ndarray, bias: np.ndarray | None
) -> None:
    """Give the node of `layer` its weight and bias under the layer's own names."""
    set_constant(graph, node, 1, f"{layer.owner}.weight", weight, layer.repeated)
    if layer.op != "MatMul":  # the bias of a MatMul is an Add behind it and stays float
        set_constant(graph, node, 2, f"{layer.owner}.bias", bias, layer.repeated)


def set_constant(
    graph: ir.Graph, node: ir.Node, index: int, name: str, array: np.ndarray | None, shared: bool = False
) -> None:
    """Let input `index` of `node` be an initialiser `name` holding `array`; None takes the input away.

    `shared`: one that another node was given before is taken.
    """
    if array is None:
        if len(node.inputs) > index:
            node.resize_inputs(index)
        return
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    present = graph.initializers.get(name) if shared else None
    if present is not None and present.const_value is not None:
        found = present.const_value.numpy()
        if found.dtype == array.dtype and np.array_equal(found, array):
            node.replace_input_with(index, present)
            return
    value = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    node.replace_input_with(index, value)
    old = graph.initializers.pop(name, None)
    if old is not None and old.uses():  # read elsewhere too: keep the float tensor under another name
        old.name = f"{name}.float"
        graph.register_initializer(old)
    graph.register_initializer(value)


def parameter_aliases(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of the same tensor: of a tied parameter the exporter keeps one name."""
    by_tensor: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(parameter, []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def float_like(value: ir.Value, name: str) -> ir.Value:
    """A new float value with the shape of `value`."""
    return ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))


def replace_uses(graph: ir.Graph, old: ir.Value, new: ir.Value, keep: ir.Node | None = None) -> None:
    """Let every reader of `old` (but `keep`) read `new`; a graph output keeps its name."""
    for use in tuple(old.uses()):
        if use.node is not keep:
            use.node.replace_input_with(use.idx, new)
    indices = [index for index, output in enumerate(graph.outputs) if output is old]
    if indices:
        name, old.name = old.name, f"{old.name}.accumulator"
        new.name = name
    for index in indices:
        graph.outputs[index] = new


def _find(graph: ir.Graph, layer: str, weights: Sequence[str], repeated: bool = False) -> list[ir.Node]:
    """The nodes that read the weight of `layer`, directly or through a transposition: one, unless it is `repeated`."""
    values = [graph.initializers[name] for name in weights if name in graph.initializers]
    nodes: list[ir.Node] = []
    while values:
        for use in values.pop().uses():
            if use.node.op_type in PRODUCT_OPERATORS and use.idx == 1:
                nodes.append(use.node)
            elif use.node.op_type in _VIEWS and use.idx == 0:
                values.append(use.node.outputs[0])
    if len(nodes) > 1 and (len(weights) > 1 or not repeated):  # a weight shared by several layers: the path decides
        nodes = [node for node in nodes if layer in module_scopes(node)]
    if len(nodes) == 1 or (nodes and repeated):
        order = {id(node): place for place, node in enumerate(graph)} if len(nodes) > 1 else {}
        return sorted(nodes, key=lambda node: order.get(id(node), 0))
    if nodes:
        raise ExportError(
            f"layer {layer!r} runs {len(nodes)} times in one forward; only once can be quantised (of a list of images, "
            "give save one)"
        )
    raise ExportError(
        f"layer {layer!r} is in the record, but no {', '.join(sorted(PRODUCT_OPERATORS))} of the exported graph reads "
        "its weight: in evaluation it does not run with this input_data, or computes with another weight than its own"
    )


def module_scopes(node: ir.Node) -> list[str]:
    """Paths of the modules that `node` comes from, outermost first; the last entry is the operator's own name."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return []
    return [str(scope) for scope in scopes]


def _with_integers(factors: LayerFactors, node: ir.Node, owner: str, repeated: bool) -> MarkedLayer:
    weight = factors.weight
    if node.op_type in ("Gemm", "MatMul"):
        weight = np.ascontiguousarray(weight.T)
    if node.op_type == "Gemm":
        neutral = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        other = {key: node.attributes[key].value for key in neutral if key in node.attributes}
        if any(value != neutral[key] for key, value in other.items()):
            raise ExportError(f"layer {factors.name!r}: its Gemm has {other}, which cannot be deployed in integers")
    bias = None if node.op_type == "MatMul" else int32_bias(factors)
    return MarkedLayer(factors, node.op_type, weight, bias, owner, repeated)


def _add_markers(graph: ir.Graph, layer: str, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    quant, dequant = (
        ir.node(op, [value], {"layer": layer}, domain=DOMAIN, outputs=[float_like(value, f"{layer}.{op}")])
        for op, value in (("Quant", source), ("Dequant", result))
    )
    node.replace_input_with(0, quant.outputs[0])
    graph.insert_before(node, quant)
    graph.insert_after(node, dequant)
    replace_uses(graph, result, dequant.outputs[0], keep=dequant)
