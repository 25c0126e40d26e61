"""The fake-quant model: quantisation in standard ONNX operators, so that any runtime shows what the device computes.

Per layer: Mul(1/scale_d) -> Round -> Add(offset) -> Clip -> Sub(offset), the layer on integers
held as float32, Mul(scale_d * scale_w). With a shift N (searchN) the accumulator is floored to steps of 2^N and clipped
to INT16 before that Mul.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from amct_ext.export.factors import LayerFactors
from amct_ext.export.markers import MarkedLayer, float_like, markers, replace_uses, set_weights

INT16 = np.iinfo(np.int16)


def lower_fake_quant(model: ir.Model, layers: Mapping[str, MarkedLayer]) -> None:
    """Replace the markers of `model` in place. Layers that read one tensor with equal factors share one chain."""
    graph = model.graph
    chains: dict[tuple[int, tuple[float, int, str]], ir.Value] = {}
    for name, marker in markers(graph):
        layer = layers[name]
        source = marker.inputs[0]
        assert source is not None
        if marker.op_type == "Dequant":
            node = source.producer()
            assert node is not None
            # anew, because the optimiser lets layers share tensors that look alike
            bias = None if layer.bias is None else layer.bias.astype(np.float32)
            set_weights(graph, node, layer, layer.weight.astype(np.float32), bias)
            result = _dequantize(graph, marker, source, layer)
        else:
            key = (id(source), layer.factors.input_key)
            if key not in chains:
                chains[key] = quantize(graph, marker, source, layer.factors)
            result = chains[key]
        replace_uses(graph, marker.outputs[0], result)
        graph.remove(marker, safe=True)


class NodeChain:
    """Appends nodes in front of a marker, each reading the one before."""

    def __init__(self, graph: ir.Graph, marker: ir.Node, source: ir.Value) -> None:
        self.graph, self.marker, self.value = graph, marker, source

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A Constant node, as AMCT writes them: they show up as values, not as parameters."""
        value = ir.Value(name=f"{name}.output0", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("Constant", [], {"value": ir.Tensor(array, name=name)}, outputs=[value], name=name)
        self.graph.insert_before(self.marker, node)
        return value

    def then(self, op: str, name: str, *operands: ir.Value) -> None:
        """Append a node that reads the value so far first, then `operands`."""
        node = ir.node(op, [self.value, *operands], outputs=[float_like(self.value, f"{name}.output0")], name=name)
        self.graph.insert_before(self.marker, node)
        self.value = node.outputs[0]


def quantize(
    graph: ir.Graph, marker: ir.Node, source: ir.Value, factors: LayerFactors, stem: str = "quant"
) -> ir.Value:
    """Put the chain that rounds `source` to integers (held as float32) in front of `marker`."""
    prefix = f"{factors.name}.{stem}.fakequant"
    low, high = factors.range
    chain = NodeChain(graph, marker, source)
    scale = chain.constant(f"{prefix}.scale", np.asarray(np.float32(1) / factors.scale_d))
    offset = chain.constant(f"{prefix}.offset", np.asarray(factors.offset_d, np.float32))
    minimum = chain.constant(f"{prefix}.min_val", np.asarray(low, np.float32))
    maximum = chain.constant(f"{prefix}.max_val", np.asarray(high, np.float32))
    chain.then("Mul", f"{prefix}.mul", scale)
    chain.then("Round", f"{prefix}.round")
    chain.then("Add", f"{prefix}.add", offset)
    chain.then("Clip", f"{prefix}.clip", minimum, maximum)
    chain.then("Sub", f"{prefix}.sub", offset)
    return chain.value


def _dequantize(graph: ir.Graph, marker: ir.Node, source: ir.Value, layer: MarkedLayer) -> ir.Value:
    factors = layer.factors
    prefix = f"{factors.name}.fakedequant"
    chain = NodeChain(graph, marker, source)
    scale = factors.deq
    if factors.shift:
        step = np.ldexp(np.float32(1), np.asarray(factors.shift)).astype(np.float32)
        shift = chain.constant(f"{prefix}.shift_step", per_channel(1 / step, layer, source))
        chain.then("Mul", f"{prefix}.shift", shift)
        chain.then("Floor", f"{prefix}.floor")
        low = chain.constant(f"{prefix}.min_val", np.asarray(INT16.min, np.float32))
        high = chain.constant(f"{prefix}.max_val", np.asarray(INT16.max, np.float32))
        chain.then("Clip", f"{prefix}.clip", low, high)
        scale = scale * step  # powers of two: exact
    chain.then("Mul", f"{prefix}.mul", chain.constant(f"{prefix}.dqscale", per_channel(scale, layer, source)))
    return chain.value


def per_channel(vector: np.ndarray, layer: MarkedLayer, result: ir.Value) -> np.ndarray:
    """`vector` shaped to multiply the layer's output: [1, C, 1, ...] for convolutions, [1, C] for Linear."""
    if layer.op in ("Gemm", "MatMul"):
        flat = result.shape is not None and len(result.shape) < 2
        return vector.reshape([-1] if flat else [1, -1]).astype(np.float32)
    return vector.reshape([1, -1] + [1] * (layer.weight.ndim - 2)).astype(np.float32)
