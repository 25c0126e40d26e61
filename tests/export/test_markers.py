"""Markers around recorded layers: which node is a layer's, what its inputs become."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from amct_ext.errors import ExportError
from amct_ext.export import markers


def conv_graph(scopes: tuple[str, ...] = ("",), weight: str = "a.weight") -> ir.Graph:
    """Convolutions with one weight, one behind the other, each with the module path that the exporter notes."""
    x = markers.float_like(ir.Value(name="x", shape=ir.Shape([1, 2, 4, 4])), "x")
    value = ir.Value(name=weight, const_value=ir.Tensor(np.zeros((2, 2, 1, 1), np.float32), name=weight))
    nodes, source = [], x
    for i, scope in enumerate(scopes):
        nodes.append(ir.node("Conv", [source, value], outputs=[markers.float_like(x, f"y{i}")]))
        if scope:
            nodes[-1].metadata_props[markers.SCOPES] = repr([scope, "conv"])
        source = nodes[-1].outputs[0]
    return ir.Graph([x], [source], nodes=nodes, initializers=[value], opset_imports={"": 18})


def test_the_node_that_reads_the_weight_is_the_layers() -> None:
    graph = conv_graph()
    assert markers._find(graph, "a", ["a.weight"]) == [graph[0]]


def test_the_module_path_decides_between_readers_of_a_shared_weight() -> None:
    graph = conv_graph(("a", "b"))
    assert markers._find(graph, "b", ["a.weight", "b.weight"]) == [graph[1]]


@pytest.mark.parametrize(
    ("scopes", "layer", "words"), [(("a", "a"), "a", "runs 2 times"), (("a",), "other", "no .* of the exported graph")]
)
def test_a_layer_that_is_not_there_once_is_an_error(scopes: tuple[str, ...], layer: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        markers._find(conv_graph(scopes), layer, [f"{layer}.weight"])


def test_notes_that_are_no_paths_are_ignored() -> None:
    graph = conv_graph()
    assert markers.module_scopes(graph[0]) == []
    graph[0].metadata_props[markers.SCOPES] = "not ["
    assert markers.module_scopes(graph[0]) == []


def test_a_weight_that_is_read_elsewhere_keeps_its_float_values() -> None:
    graph = conv_graph(("a", "b"))
    new = np.ones((2, 2, 1, 1), np.float32)
    markers.set_constant(graph, graph[0], 1, "a.weight", new)
    assert np.array_equal(graph[0].inputs[1].const_value.numpy(), new)
    assert graph[1].inputs[1].name == "a.weight.float" and set(graph.initializers) == {"a.weight", "a.weight.float"}
    markers.set_constant(graph, graph[0], 2, "a.bias", np.zeros(2, np.float32))
    assert len(graph[0].inputs) == 3
    markers.set_constant(graph, graph[0], 2, "a.bias", None)
    assert len(graph[0].inputs) == 2


def test_an_output_keeps_its_name_when_its_value_is_replaced() -> None:
    graph = conv_graph()
    old = graph.outputs[0]
    new = markers.float_like(old, "new")
    markers.replace_uses(graph, old, new)
    assert graph.outputs[0] is new and new.name == "y0" and old.name == "y0.accumulator"


def test_names_of_a_tied_parameter() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    assert markers.parameter_aliases(net) == {name: ["0.weight", "1.weight"] for name in ("0.weight", "1.weight")}
