"""The deploy model: AscendQuant and AscendDequant around layers of INT8 weights and INT32 biases.

Operators, attributes and the layout of the dequantisation words are AMCT's (docs/differences.md, "The same").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from amct_ext.errors import ExportError
from amct_ext.export.factors import LayerFactors
from amct_ext.export.markers import MarkedLayer, float_like, markers, replace_uses, set_constant, set_weights


def lower_deploy(model: ir.Model, layers: Mapping[str, MarkedLayer]) -> None:
    """Replace the markers of `model` in place. Layers that read one tensor with equal factors share one AscendQuant.

    Errors: ExportError (INT4 weights with an odd number of input channels).
    """
    graph = model.graph
    shared: dict[tuple[int, tuple[float, int, str]], ir.Value] = {}
    for name, marker in markers(graph):
        layer = layers[name]
        source = marker.inputs[0]
        assert source is not None
        if marker.op_type == "Dequant":
            _put_integers(graph, source, layer)
            node = _ascend_dequant(graph, marker, source, layer.factors)
            result = node.outputs[0]
        else:
            key = (id(source), layer.factors.input_key)
            if key not in shared:
                shared[key] = _ascend_quant(graph, marker, source, layer.factors).outputs[0]
            result = shared[key]
        replace_uses(graph, marker.outputs[0], result)
        graph.remove(marker, safe=True)


def dequant_words(factors: LayerFactors) -> np.ndarray:
    """One uint64 per scale: float32 bits of scale_d * scale_w in 31:0, the shift N in 39:32, offset_w = 0 in 47:40.

    Shape (scales,), one scale or one per output channel. Source: the input of AscendDequant.
    """
    words = np.ascontiguousarray(factors.deq).view(np.uint32).astype(np.uint64)
    if factors.shift:
        words |= np.asarray(factors.shift, dtype=np.uint64) << np.uint64(32)
    return words


def pack_int4(integers: np.ndarray, axis: int) -> np.ndarray:
    """Two 4-bit integers per byte along `axis`, the even index in the low nibble: int8, half as long there.

    `integers`: int8 within -8..7, of even length along `axis`.
    """
    pairs = np.moveaxis(integers, axis, -1)
    low, high = pairs[..., 0::2].astype(np.uint8) & 0x0F, pairs[..., 1::2].astype(np.uint8) & 0x0F
    packed = (low | (high << 4)).astype(np.uint8).view(np.int8)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis))


def _put_integers(graph: ir.Graph, result: ir.Value, layer: MarkedLayer) -> None:
    """Give the layer's node its INT8 weight (INT4 packed) and INT32 bias."""
    node, factors = result.producer(), layer.factors
    assert node is not None
    result.type = ir.TensorType(ir.DataType.INT32)  # a type of its own: values share theirs with the other file
    weight = layer.weight
    if factors.weight_bits == 4:
        channels = weight.shape[layer.input_axis]
        if channels % 2:
            raise ExportError(
                f"layer {factors.name!r}: INT4 weights are packed in pairs of input channels, but it has {channels}; "
                "record INT8 weights for this layer"
            )
        weight = pack_int4(weight, layer.input_axis)
    set_weights(graph, node, layer, weight, layer.bias)
    if layer.bias is not None and factors.act_type == "INT4":  # the device's 4-bit kernels take the bias as float
        bias = node.inputs[2]
        assert bias is not None
        cast = ir.node(
            "Cast",
            [bias],
            {"to": int(ir.DataType.FLOAT)},
            outputs=[float_like(bias, f"{factors.name}.bias_quant.output0")],
            name=f"{factors.name}.bias_quant",
        )
        graph.insert_before(node, cast)
        node.replace_input_with(2, cast.outputs[0])


def _ascend_quant(graph: ir.Graph, marker: ir.Node, source: ir.Value, factors: LayerFactors) -> ir.Node:
    name = f"{factors.name}.quant"
    integers = ir.TensorType(ir.DataType[factors.act_type])
    node = ir.node(
        "AscendQuant",
        [source],
        {
            "scale": float(np.float32(1) / factors.scale_d),
            "offset": float(factors.offset_d),
            "dst_type": factors.act_type,
        },
        outputs=[ir.Value(name=f"{name}.output0", shape=source.shape, type=integers)],
        name=name,
    )
    graph.insert_before(marker, node)
    return node


def _ascend_dequant(graph: ir.Graph, marker: ir.Node, source: ir.Value, factors: LayerFactors) -> ir.Node:
    name = f"{factors.name}.dequant"
    marker_output = marker.outputs[0]
    node = ir.node(
        "AscendDequant", [source], {"dtype": 0}, outputs=[float_like(marker_output, f"{name}.output0")], name=name
    )
    graph.insert_before(marker, node)
    set_constant(graph, node, 1, f"{name}.param", dequant_words(factors))
    return node
