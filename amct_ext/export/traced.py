"""The trace of one forward as an ONNX graph, for models that torch.export cannot follow.

torch's older exporter runs the model on real tensors and notes the operators: what the forward reads on the host is
constant, branches are taken as they were. Its graph is brought into the form of the other one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from amct_ext.export.axes import Axes
from amct_ext.export.markers import SCOPES
from amct_ext.graph.onnx_names import scope_name
from amct_ext.graph.run import tensors_in

Calls = Iterator[Sequence[torch.Tensor]]
LayerValues = Mapping[str, Sequence[Sequence[torch.Tensor]]]  # by layer and call, the tensors that it returned


def trace_to_onnx(
    model: nn.Module,
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    axes: Axes,
    opset: int,
    values: LayerValues | None = None,
) -> torch.onnx.ONNXProgram:
    """The graph of `model(*tensors)`, which returns a tuple of tensors.

    `values`: what layers returned in the evaluation of the quantised model. They take the place of what the float
    layers compute, so that what the forward reads is what it read there. Errors: whatever torch raises.
    """
    known = {*names, *(axes.output_names or ())}
    # by way of a file, because the bytes of a message are limited
    with (
        tempfile.TemporaryDirectory() as folder,
        _substituted(model, values or {}),
        _without_graph_prints(model),
        _Decompose(),
    ):
        path = Path(folder) / "traced.onnx"
        torch.onnx.export(
            model,
            tuple(tensors),
            str(path),
            dynamo=False,
            opset_version=opset,
            do_constant_folding=False,
            input_names=list(names),
            output_names=list(axes.output_names or ()),
            dynamic_axes={name: dict(sizes) for name, sizes in axes.sizes.items() if name in known},
        )
        graph = ir.load(path)
        ir.external_data.load_to_model(graph)
    _split_initializers(graph.graph)
    _positive_axes(graph.graph)
    _add_module_scopes(graph.graph, model)
    return torch.onnx.ONNXProgram(graph, None)  # nothing of it but the graph is used


class _Decompose(TorchFunctionMode):
    """Says in operators that the older exporter knows what it has no translation of."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in (torch.Tensor.mT.__get__, torch.Tensor.mH.__get__):  # type: ignore[attr-defined]
            return args[0].transpose(-2, -1)
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            return _rms_norm(*args, **kwargs)
        if func is torch.nn.functional.one_hot and len(args) == 1 and kwargs.get("num_classes", -1) == -1:
            return func(args[0], int(args[0].max()) + 1)
        return func(*args, **kwargs)


def _rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    result = input * torch.rsqrt(input.pow(2).mean(axes, keepdim=True) + eps)
    return result if weight is None else result * weight


@contextmanager
def _without_graph_prints(model: nn.Module) -> Iterator[None]:
    """While this lasts, a failure prints no graph past Python's streams; torch switches that on before the forward."""
    handle = model.register_forward_pre_hook(lambda *_: torch._C._jit_set_onnx_log_enabled(False))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _substituted(model: nn.Module, values: LayerValues) -> Iterator[None]:
    """While this lasts, layers return the given values, which the tracer takes for their results."""
    handles = []
    for name, calls in values.items():
        waiting = iter(calls)

        def substitute(_: nn.Module, __: object, output: object, waiting: Calls = waiting) -> None:
            state: object = torch._C._get_tracing_state()
            if state is None:  # a run that is not traced
                return
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
            try:
                for tensor, value in zip(tensors_in(output), next(waiting, ()), strict=False):
                    if tensor.shape == value.shape:
                        tensor.copy_(value)
            finally:
                torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

        handles.append(model.get_submodule(name).register_forward_hook(substitute))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split_initializers(graph: ir.Graph) -> None:
    """Tensors that look alike are one in the traced graph, with an Identity for each further name: undo that."""
    for node in tuple(graph):
        source = node.inputs[0] if node.op_type == "Identity" else None
        if source is None or not source.is_initializer() or source.const_value is None:
            continue
        result = node.outputs[0]
        if any(result is output for output in graph.outputs):
            continue
        name = result.name
        result.name = f"{name}.identity"
        value = ir.Value(name=name, shape=source.shape, type=source.type, const_value=source.const_value)
        graph.register_initializer(value)
        for use in tuple(result.uses()):
            use.node.replace_input_with(use.idx, value)
        graph.remove(node, safe=True)


def _positive_axes(graph: ir.Graph) -> None:
    """Means stay means: poolings are single operators here already (see cleanup)."""
    for node in tuple(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        source, axes = node.inputs[:2]
        constant = None if axes is None else ir.convenience.get_const_tensor(axes)
        if source is None or source.shape is None or constant is None:
            continue
        array = np.sort(constant.numpy().reshape(-1) % len(source.shape))
        value = ir.Value(name=f"{node.name}.axes", const_value=ir.Tensor(array, name=f"{node.name}.axes"))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.INT64
        graph.register_initializer(value)
        node.replace_input_with(1, value)


def _add_module_scopes(graph: ir.Graph, model: nn.Module) -> None:
    """Tell each node the path of its module, as far as its name ('/blocks.0/conv/Conv') says which one that is."""
    paths: dict[str, list[str]] = {}
    for qualified, _ in model.named_modules():
        paths.setdefault(scope_name(qualified), []).append(qualified)
    for node in graph:
        *scopes, operator = (node.name or "").split("/")
        scopes = [scope for scope in scopes if scope]
        found = [name for name in paths.get(scopes[-1], []) if _scopes_lead_to(scopes, name)] if scopes else []
        if len(found) == 1:
            parts = found[0].split(".")
            prefixes = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
            node.metadata_props[SCOPES] = str(["", *prefixes, operator])


def _scopes_lead_to(scopes: Sequence[str], qualified: str) -> bool:
    """Whether the scopes are names of modules on the way to `qualified`; lists of modules do not show up."""
    parts = qualified.split(".")
    way = iter([scope_name(".".join(parts[: depth + 1])) for depth in range(len(parts))])
    return all(scope in way for scope in scopes)
