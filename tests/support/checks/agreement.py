"""Does a fake-quant ONNX file compute what the torch model computes in eval mode? Rounding ties are told from errors.

A quantiser may round a value that lies on a tie either way, and deep networks then differ by whole quantisation steps
behind it. So every quantised layer of the torch model is fed the integers that onnxruntime found there: what is left is
compared number by number, and where torch would have rounded otherwise the value must lie on a tie.

Two things the file has and torch has not; they are checked one by one and added to torch's output: biases in whole
INT32 steps, and weights on a rounding tie, since the file rounds them with the BatchNorm factor multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from amct_ext.model_surgery.session import session_of
from amct_ext.record.text import read_record
from amct_ext.record.types import QuantRecord

CLOSE = 2e-5  # relative where values are larger than one


@dataclass
class Agreement:
    """`error` of the model's output, in units of the largest of it and one; `ties` among `values` quantised values."""

    error: float = 0.0
    ties: int = 0
    values: int = 0
    weight_ties: int = 0
    worst_tie: float = 0.0  # distance of a value that was rounded otherwise from its tie, same units as `error`


def compare(model: nn.Module, record: Path, fake_quant: Path, data: Tensor) -> Agreement:
    """Run both on `data`. AssertionError where a value off the ties, or a bias, is rounded wrongly."""
    file = onnx.load(fake_quant)
    outputs, integers = run(file, data)
    nodes = {node.name: node for node in file.graph.node}
    tensors = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in file.graph.initializer}
    norms, result, handles = session_of(model).conv_bn, Agreement(), []
    try:
        for entry in read_record(str(record)).quant:
            layer, node = model.get_submodule(entry.key), nodes[entry.key]
            fed = integers[entry.key] * torch.tensor(entry.scale_d)  # on the grid: quantising it again changes nothing
            handles.append(layer.register_forward_pre_hook(_feed(entry, integers[entry.key], fed, result)))
            norm = model.get_submodule(norms[entry.key]) if entry.key in norms else None
            deq = _constant(nodes[f"{entry.key}.fakedequant.dqscale"]).flatten()
            moved: Any = 0.0
            if len(node.input) == 3:  # the bias of a MatMul is an Add behind it and stays float
                moved = moved + _bias_rounding(entry, layer, norm, tensors[node.input[2]], deq)
            if norm is not None:
                sign = deq.sign().reshape([-1] + [1] * (layer.weight.dim() - 1))
                moved = moved + _weight_rounding(entry, layer, norm, tensors[node.input[1]] * sign, fed, result)
            handles.append((norm or layer).register_forward_hook(lambda _, __, output, moved=moved: output + moved))
        with torch.no_grad():
            expected = first_tensor(model.eval()(data))
    finally:
        for handle in handles:
            handle.remove()
    result.error = relative(outputs[0] - expected, expected)
    return result


def run(file: onnx.ModelProto, data: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The file's outputs, and per layer the integers it reads. Layers on one quantiser get the very same tensor."""
    sources = {
        node.name: node.input[0]
        for node in file.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and ".quant.fakequant.sub" in node.input[0]
    }
    known = [output.name for output in file.graph.output]
    extra = list(dict.fromkeys(sources.values()))
    for name in extra:
        file.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = session.run([*known, *extra], {session.get_inputs()[0].name: data.numpy()})
    tensors = dict(zip([*known, *extra], map(torch.from_numpy, arrays), strict=True))
    return [tensors[name] for name in known], {layer: tensors[name] for layer, name in sources.items()}


def first_tensor(output: Any) -> Tensor:
    """The logits in whatever a model returns."""
    return output if isinstance(output, Tensor) else output[0]


def relative(error: Tensor, values: Tensor) -> float:
    """The largest error in units of the largest value, of one where that is smaller."""
    return float(error.abs().max()) / max(1.0, float(values.abs().max()))


def _feed(entry: QuantRecord, integers: Tensor, fed: Tensor, result: Agreement) -> Any:
    """A hook that gives the layer onnxruntime's integers and counts where torch would have rounded otherwise."""
    bits = int(str(entry.act_type).removeprefix("INT"))
    low, high = -(1 << (bits - 1)) - entry.offset_d, (1 << (bits - 1)) - 1 - entry.offset_d

    def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        assert x.shape == integers.shape, entry.key
        steps = x / entry.scale_d
        differ = steps.round().clamp(low, high) != integers
        result.values += x.numel()
        result.ties += int(differ.sum())
        if differ.any():
            # A tie lies half a step from the integer that was chosen, on the side of the value.
            beyond = ((steps - integers).abs() - 0.5)[differ] * entry.scale_d
            distance = relative(beyond, x)
            assert distance <= CLOSE, f"{entry.key}: rounded differently {distance} off a tie"
            result.worst_tie = max(result.worst_tie, distance)
        return (fed, *args[1:])

    return hook


def _constant(node: onnx.NodeProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(node.attribute[0].t).copy())


@torch.no_grad()
def _bias_rounding(entry: QuantRecord, layer: Any, norm: Any, integers: Tensor, step: Tensor) -> Tensor:
    """What rounding the bias to whole steps, at most half a step, moves the output."""
    bias = torch.zeros(len(integers)) if layer.bias is None else layer.bias
    if norm is not None:
        bias = (bias - norm.running_mean) * (norm.running_var + norm.eps).rsqrt() * norm.weight + norm.bias
    moved = integers * step - bias
    assert bool((moved.abs() <= step.abs() * 0.5001 + 1e-6 * bias.abs()).all()), entry.key
    return moved if isinstance(layer, nn.Linear) else moved.reshape([-1] + [1] * (layer.weight.dim() - 2))


@torch.no_grad()
def _weight_rounding(
    entry: QuantRecord, layer: Any, norm: Any, integers: Tensor, fed: Tensor, result: Agreement
) -> Tensor:
    """What weights on a tie, which the file holds one step off, move the output."""
    step, factor = (
        vector.reshape([-1] + [1] * (layer.weight.dim() - 1))
        for vector in (torch.tensor(entry.scale_w), (norm.running_var + norm.eps).rsqrt() * norm.weight)
    )
    exact, steps = layer.masked_weight() * factor / step, layer.compressed_weight() * factor / step
    off = integers - steps.round()
    tie = (off.abs() == 1) & ((exact - exact.floor() - 0.5).abs() < 1e-4)
    assert bool(((off == 0) | tie).all()), entry.key
    result.weight_ties += int(tie.sum())
    return layer._conv_forward(fed, off * step, None)
