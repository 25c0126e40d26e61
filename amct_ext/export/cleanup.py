"""Bring a captured graph into the form that device compilers know: usual operators, readable names, nothing else.

The exporter writes global average pooling as ReduceMean and flattening as Reshape to a computed shape, and attaches the
source lines of the user's model to every node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from amct_ext.common.layer_kinds import PRODUCT_OPERATORS
from amct_ext.export.markers import DOMAIN, module_scopes


def use_matmul(graph: ir.Graph) -> None:
    """Turn a Gemm without bias (a bias-free Linear on 2-D input) into MatMul, which is what it computes. In place."""
    for node in tuple(graph):
        if node.op_type != "Gemm" or (len(node.inputs) > 2 and node.inputs[2] is not None):
            continue
        attributes = {key: attribute.value for key, attribute in node.attributes.items()}
        weight = node.inputs[1]
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("transA", 0) or weight is None:
            continue
        if attributes.get("transB", 0):
            if weight.const_value is None or not weight.is_initializer() or len(weight.uses()) > 1:
                continue
            transposed = np.ascontiguousarray(weight.const_value.numpy().T)
            weight.const_value, weight.shape = ir.Tensor(transposed, name=weight.name), ir.Shape(transposed.shape)
        _replace(graph, node, ir.node("MatMul", list(node.inputs[:2]), name=node.name))


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initialisers that nothing reads, in place."""
    RemoveUnusedNodesPass()(model)


def clean_up(model: ir.Model, layers: Collection[str]) -> None:
    """Use GlobalAveragePool and Flatten where they mean the same, name the nodes, drop the exporter's notes. In place.

    Nodes of `layers` have their names already; the single node of a leaf module takes the module's path, every other
    node `/<path>/<operator>` with a counter, as exporters usually write it.
    """
    graph = model.graph
    for node in tuple(graph):
        if node.op_type == "ReduceMean" and _is_global_pooling(node):
            _replace(graph, node, ir.node("GlobalAveragePool", [node.inputs[0]], name=node.name))
        elif node.op_type == "Reshape" and _is_flattening(node):
            _replace(graph, node, ir.node("Flatten", [node.inputs[0]], {"axis": 1}, name=node.name))
    drop_unused(model)
    _name_nodes(graph, layers)
    for subgraph in model.graphs():
        for node in subgraph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in [*subgraph.inputs, *subgraph.initializers.values()]:
            value.metadata_props.clear()
        subgraph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "amct_ext", None


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    result, value = old.outputs[0], new.outputs[0]
    name, value.shape, value.type = result.name, result.shape, result.type
    for use in tuple(result.uses()):
        use.node.replace_input_with(use.idx, value)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = value
    graph.remove(old, safe=True)
    value.name = name


def _is_global_pooling(node: ir.Node) -> bool:
    """Whether a mean is what torch.export makes of adaptive pooling to size 1: axes -1, -2, ... down to the channels.

    The model's own means have axes from 0 upwards here (see capture): of tokens [N, T, C], say, which are no channels.
    """
    source = node.inputs[0]
    axes = ir.convenience.get_const_tensor(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] else None
    keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
    if source is None or source.shape is None or axes is None or not keep:
        return False
    rank = len(source.shape)
    return rank > 2 and sorted(int(axis) for axis in axes.numpy().ravel()) == list(range(2 - rank, 0))


def _is_flattening(node: ir.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return False
    if len(source.shape) < 2 or len(result.shape) != 2 or source.shape[0] != result.shape[0]:
        return False
    if not isinstance(source.shape[0], int) and source.shape[0].value is None:
        return False  # two sizes of which nothing is known
    size = 1
    for axis in source.shape[1:]:
        if not isinstance(axis, int):
            return False
        size *= axis
    return result.shape[1] == size


def _name_nodes(graph: ir.Graph, layers: Collection[str]) -> None:
    paths = {id(node): _module_path(node) for node in graph}
    # a module counts as one node only where nothing else comes from it or from below it
    counts = Counter(path for path in paths.values() if path)
    parents = {path.rsplit(".", depth)[0] for path in counts for depth in range(1, path.count(".") + 1)}
    used = set(layers)
    serial: Counter[str] = Counter()
    for node in graph:
        if node.domain == DOMAIN or node.name in layers:
            continue
        path = paths[id(node)]
        name = path if path and counts[path] == 1 and path not in parents else ""
        if not name or name in used:
            stem = "/" + "/".join([*path.split("."), node.op_type] if path else [node.op_type])
            name = stem
            while name in used:
                serial[stem] += 1
                name = f"{stem}_{serial[stem]}"
        node.name = name
        used.add(name)


def _module_path(node: ir.Node) -> str:
    """The module that a node comes from, by its weight first: a Conv fused with a BatchNorm has the latter's notes."""
    if node.op_type in PRODUCT_OPERATORS and node.inputs[1] is not None:
        path, _, parameter = (node.inputs[1].name or "").rpartition(".")
        if parameter == "weight":
            return path
    scopes = module_scopes(node)
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else path  # what the exporter writes for size computations
