"""Recurrent layers in the two ONNX files: found in the captured graph, marked, and written in either form.

Fake-quant: the standard LSTM / GRU on a rounded input, a rounded initial state and rounded weights. The states between
the steps stay float, as in AMCT's files: the standard operators keep them inside. Deploy: the device's own operators,
which take INT8 weights, INT32 biases and all factors, and round every state (docs/differences.md, "Quantisation").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import nn

from amct_ext.errors import ExportError
from amct_ext.export.deploy import dequant_words, pack_int4
from amct_ext.export.factors import LayerFactors, int32_bias
from amct_ext.export.fake_quant import NodeChain, quantize
from amct_ext.export.markers import (
    DOMAIN,
    float_like,
    markers,
    module_scopes,
    parameter_aliases,
    replace_uses,
    set_constant,
)
from amct_ext.export.rnn_factors import RnnFactors

_SLOT_H, _SLOT_C = 5, 6  # inputs of the standard operators: X, W, R, B, sequence lengths, initial h, initial c
_DTYPES = {"INT8": 2, "INT16": 6}  # the device's numbers of the types
_FIRST_INPUT_OPS = frozenset({"Slice", "Unsqueeze", "Identity", "Reshape", "Transpose", "Cast"})


def mark_rnns(model: ir.Model, torch_model: nn.Module, layers: Sequence[RnnFactors]) -> dict[str, RnnFactors]:
    """Put one marker in place of each recorded recurrent node, in place. Errors: ExportError (not exactly one node)."""
    names = parameter_aliases(torch_model)
    found = {factors.name: _find(model.graph, factors, names[f"{factors.name}.weight_ih_l0"]) for factors in layers}
    if found:
        model.opset_imports[DOMAIN] = 1
    for factors in layers:
        _squeeze_output(model.graph, factors.name, found[factors.name])
        _add_marker(model.graph, factors, found[factors.name])
    return {factors.name: factors for factors in layers}


def lower_rnn_fake_quant(model: ir.Model, layers: Mapping[str, RnnFactors]) -> None:
    """Replace the markers of recurrent layers by standard operators, in place."""
    graph = model.graph
    for name, marker in tuple(markers(graph)):
        if name not in layers:
            continue
        factors = layers[name]
        source, hidden, *cell = marker.inputs
        assert source is not None and hidden is not None
        x = _rounded(graph, marker, source, factors.inputs, "")
        h = _rounded(graph, marker, hidden, factors.hidden, "1")
        node = ir.node(factors.kind, [x, None, None, None, None, h, *cell], _attributes(factors), name=name)
        _replace(graph, marker, node, len(marker.outputs))
        sides = (factors.inputs, factors.hidden)
        for slot, key, side in ((1, "weight_ih_l0", sides[0]), (2, "weight_hh_l0", sides[1])):
            set_constant(graph, node, slot, f"{name}.{key}", (side.weight * factors.row_scale(side))[None])
        if factors.has_bias:
            bias = [_integers(side).astype(np.float32) * factors.row_deq(side) for side in sides]
            set_constant(graph, node, 3, f"{name}.bias", np.concatenate(bias)[None].astype(np.float32))


def lower_rnn_deploy(model: ir.Model, layers: Mapping[str, RnnFactors]) -> None:
    """Replace the markers of recurrent layers by the device's operators, in place.

    Errors: ExportError (INT4 weights with an odd number of columns).
    """
    graph = model.graph
    for name, marker in tuple(markers(graph)):
        if name not in layers:
            continue
        factors = layers[name]
        x, *states = marker.inputs
        # X, W, R, initial states, B, sequence lengths, clean_cache, factors
        inputs = [x, None, None, *states, None, None, None, None]
        bias_slot = 3 + len(states)
        attributes = _attributes(factors) | _quant_attributes(factors)
        kind = f"Basic{factors.kind}InplaceFillWindowCache"
        node = ir.node(kind, inputs, attributes, name=name)
        _replace(graph, marker, node, len(marker.outputs))
        sides = (factors.inputs, factors.hidden)
        for slot, key, side in ((1, "weight_ih_l0", sides[0]), (2, "weight_hh_l0", sides[1])):
            set_constant(graph, node, slot, f"{name}.{key}", _packed(side)[None])
        if factors.has_bias:
            bias = np.concatenate([_integers(side) for side in sides])
            set_constant(graph, node, bias_slot, f"{name}.bias", bias[None])
        words = np.concatenate([dequant_words(side) for side in sides])
        set_constant(graph, node, bias_slot + 3, f"{name}.dequant.param", words)


def _find(graph: ir.Graph, factors: RnnFactors, weights: Sequence[str]) -> ir.Node:
    nodes = [node for node in graph if node.op_type == factors.kind and _reads(node.inputs[1], weights)]
    if len(nodes) > 1:  # a weight shared by several layers: the module path decides
        nodes = [node for node in nodes if factors.name in module_scopes(node)]
    if len(nodes) != 1:
        raise ExportError(
            f"layer {factors.name!r} is in the record, but {len(nodes) or 'no'} {factors.kind} of the exported graph "
            "read(s) its weight; exactly one must"
        )
    return nodes[0]


def _reads(value: ir.Value | None, names: Sequence[str]) -> bool:
    """Whether `value` is cut and joined from an initialiser of one of `names`."""
    pending = [value]
    while pending:
        value = pending.pop()
        if value is None:
            continue
        if value.name in names:
            return True
        node = value.producer()
        if node is not None and node.op_type == "Concat":
            pending.extend(node.inputs)
        elif node is not None and node.op_type in _FIRST_INPUT_OPS:
            pending.append(node.inputs[0])
    return False


def _squeeze_output(graph: ir.Graph, layer: str, node: ir.Node) -> None:
    """Take the axis of directions out of the outputs by Squeeze; the exporter computes a shape and reshapes to it."""
    sequence = node.outputs[0]
    for use in tuple(sequence.uses()):
        transpose = use.node
        readers = [other.node for other in transpose.outputs[0].uses() if other.node.op_type == "Reshape"]
        if transpose.op_type != "Transpose" or len(readers) != 1:
            continue
        old = readers[0].outputs[0]
        squeeze = ir.node("Squeeze", [sequence], outputs=[float_like(old, f"{layer}.squeeze.output0")])
        squeeze.metadata_props.update(node.metadata_props)
        graph.insert_after(node, squeeze)
        set_constant(graph, squeeze, 1, f"{layer}.squeeze.axes", np.asarray([1], np.int64))
        replace_uses(graph, old, squeeze.outputs[0])


def _add_marker(graph: ir.Graph, factors: RnnFactors, node: ir.Node) -> None:
    states = [node.inputs[slot] for slot in (_SLOT_H, _SLOT_C)[: factors.state_count]]
    marker = ir.node(
        factors.kind, [node.inputs[0], *map(_unsliced, states)], {"layer": factors.name}, domain=DOMAIN,
        num_outputs=len(node.outputs),
    )  # fmt: skip
    marker.metadata_props.update(node.metadata_props)
    _replace(graph, node, marker, len(node.outputs))


def _unsliced(state: ir.Value | None) -> ir.Value | None:
    """The initial state itself: the exporter cuts the layer out of it, and here there is only one layer."""
    node = None if state is None else state.producer()
    return node.inputs[0] if node is not None and node.op_type == "Slice" else state


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node, outputs: int) -> None:
    """Put `new` in place of `old`; readers of its outputs move over."""
    new.resize_outputs(outputs)
    graph.insert_before(old, new)
    for index, (before, after) in enumerate(zip(old.outputs, new.outputs, strict=True)):
        after.name, after.shape = f"{new.name or before.name}.{new.op_type}.output{index}", before.shape
        after.type = ir.TensorType(ir.DataType.FLOAT)
        replace_uses(graph, before, after)
    graph.remove(old, safe=True)


def _rounded(graph: ir.Graph, marker: ir.Node, source: ir.Value, side: LayerFactors, number: str) -> ir.Value:
    """`source` rounded to integers and scaled back."""
    chain = NodeChain(graph, marker, quantize(graph, marker, source, side, f"quant{number}"))
    prefix = f"{side.name}.anti_quant{number}.fake_antiquant"
    chain.then("Mul", f"{prefix}.mul", chain.constant(f"{prefix}.scale", np.asarray(side.scale_d)))
    return chain.value


def _attributes(factors: RnnFactors) -> dict[str, ir.Attr]:
    own = ir.AttrInt64("input_forget", 0) if factors.kind == "LSTM" else ir.AttrInt64("linear_before_reset", 1)
    return {
        "hidden_size": ir.AttrInt64("hidden_size", factors.hidden_size),
        "direction": ir.AttrString("direction", "forward"),
        own.name: own,
    }


def _quant_attributes(factors: RnnFactors) -> dict[str, ir.Attr]:
    attributes = [
        ir.AttrFloat32s("activation_alpha", []),
        ir.AttrFloat32s("activation_beta", []),
        ir.AttrStrings("activations", []),
        ir.AttrFloat32("clip", -1.0),
        ir.AttrInt64("quant_dtype", _DTYPES[factors.inputs.act_type]),
    ]
    for letter, side in (("x", factors.inputs), ("h", factors.hidden)):
        attributes += [
            ir.AttrInt64(f"quant_sqrt_mode_{letter}", 0),
            ir.AttrFloat32(f"quant_scale_{letter}", float(np.float32(1) / side.scale_d)),
            ir.AttrFloat32(f"quant_offset_{letter}", float(side.offset_d)),
        ]
    return {attribute.name: attribute for attribute in attributes}


def _integers(side: LayerFactors) -> np.ndarray:
    bias = int32_bias(side)
    assert bias is not None
    return bias


def _packed(side: LayerFactors) -> np.ndarray:
    if side.weight_bits != 4:
        return side.weight
    if side.weight.shape[1] % 2:
        raise ExportError(
            f"layer {side.name!r}: INT4 weights are packed in pairs of columns, but one weight has "
            f"{side.weight.shape[1]}; record INT8 weights for this layer"
        )
    return pack_int4(side.weight, 1)
