"""Values and nodes: what one recorded forward consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(eq=False)
class Value:
    """A tensor that existed during the forward. An in-place op makes a new value; a copy without change does not.

    kind: 'computed' (has a producer), 'input', 'parameter', 'buffer' or 'constant'; `name` is the qualified name of a
    parameter or buffer. The tensor itself is not kept, but for the number of a result without dimensions that does not
    depend on the input (where it lies in host memory).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "computed"
    name: str = ""
    producer: Node | None = field(default=None, repr=False)
    consumers: list[Node] = field(default_factory=list, repr=False)
    dependent: bool = field(default=False, repr=False)
    number: float | None = None

    def depends_on_input(self) -> bool:
        """Whether the value depends on what the model was given."""
        return self.kind == "input" or self.dependent


@dataclass(eq=False)
class Node:
    """One call of a layer, or one aten op outside layers.

    op: the standard layer class ('Conv2d') or the op's name without namespace 'aten', overload and in-place
    underscore ('relu', 'add'; other namespaces stay: 'mylib::op').
    name: the layer's qualified name, or the name that the TorchScript ONNX exporter would give ('/block1/Add').
    module: qualified name of the layer, None for ops.
    args: an op's arguments by schema name, defaults filled in, tensors replaced by their values; empty for layers.
    pointwise: each output element depends on the input elements at its place alone (torch's tag).
    scope: qualified name of the innermost module that was running, '' for the model itself.
    """

    op: str
    name: str
    module: str | None = None
    inputs: tuple[Value | None, ...] = ()
    outputs: tuple[Value, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict, repr=False)
    pointwise: bool = False
    scope: str = ""

    def __post_init__(self) -> None:
        for value in self.inputs:
            if value is not None and not any(node is self for node in value.consumers):
                value.consumers.append(self)
        dependent = any(value is not None and value.depends_on_input() for value in self.inputs)
        for value in self.outputs:
            value.producer, value.dependent = self, dependent


def value_of(tensor: torch.Tensor, kind: str = "computed", name: str = "") -> Value:
    """A new value with the shape and type of a tensor."""
    return Value(tuple(tensor.shape), tensor.dtype, kind, name)
