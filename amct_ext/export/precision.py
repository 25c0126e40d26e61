"""Files hold float32 networks, whatever precision the model runs in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from amct_ext.graph.inputs import Inputs

_NARROW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_DEFAULTS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_TYPE_ATTRIBUTES = ("to", "dtype")


@contextmanager
def precision_of(model: nn.Module) -> Iterator[None]:
    """Without autocast around, and with the type of most parameters as the default type; both as before afterwards.

    What a forward makes anew then has the type that the model expects, whatever a training loop has switched on.
    """
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel() if parameter.dtype in _DEFAULTS else 0
    devices = {parameter.device.type for parameter in model.parameters()}
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        for device in devices | {"cpu"}:
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if any(sizes.values()):
            torch.set_default_dtype(sizes.most_common(1)[0][0])
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def widened(inputs: Inputs) -> Inputs:
    """The same arguments, half precision as float32."""
    return inputs.map(lambda t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t)


def widen(model: ir.Model) -> None:
    """Turn every half-precision type of the graph into float32, in place: a forward may switch autocast on itself."""
    for graph in model.graphs():
        for value in graph.inputs:
            _widen_value(value)
        for value in tuple(graph.initializers.values()):
            _widen_value(value)
            if value.const_value is not None and value.const_value.dtype in _NARROW:
                value.const_value = _wide(value.const_value)
        for node in graph:
            for value in node.outputs:
                _widen_value(value)
            for name, attribute in tuple(node.attributes.items()):
                if attribute.type == ir.AttributeType.INT and name in _TYPE_ATTRIBUTES:
                    if attribute.value in _NARROW:
                        node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _NARROW:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attribute.value))


def _widen_value(value: ir.Value) -> None:
    if value.dtype in _NARROW:
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a type of its own: values may share one


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)
