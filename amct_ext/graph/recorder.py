"""Recording of one forward: a dispatch mode sees every aten op, module hooks turn each layer call into one node."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from amct_ext.common.layer_kinds import keeps_forward, layer_type
from amct_ext.errors import InputDataError, ModelError
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.reads import HostReads, caller
from amct_ext.graph.run import tensors_in, undisturbed
from amct_ext.graph.values import Node, Value

# Ops that hand on the same numbers in the same shape: their result is the value they were given.
_SAME_VALUE = {"detach", "alias", "clone", "lift", "lift_fresh", "lift_fresh_copy", "contiguous"}
# ONNX names where the op's own name in camel case is not it.
_ONNX_NAMES = {"cat": "Concat", "stack": "Concat"}


_OPERATOR = "operator "


@dataclasses.dataclass(frozen=True)
class Doubt:
    """A place in a forward: what stands there, `file:line`, and the module that runs."""

    what: str
    place: str
    module: str

    @property
    def fixes(self) -> bool:
        """Whether a trace would keep what it saw; an unknown operator is followed or not."""
        return not self.what.startswith(_OPERATOR)

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.what, self.place and f"at {self.place}", self.module and f"in '{self.module}'"))
        )


@dataclasses.dataclass(frozen=True)
class Recording:
    """Nodes in execution order, the values that went in and came out, and the calls of each layer by name.

    `doubts` are the places that an exporter may not be able to follow, each with what stands there; `written` are the
    parameters (qualified names) that the forward wrote into, or put another one in the place of.
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    calls: dict[str, list[Node]]
    foreign: list[nn.Parameter]  # parameters that an op read and that are none of the model's
    doubts: tuple[Doubt, ...]
    written: frozenset[str]


def record(model: nn.Module, input_data: Any) -> Recording:
    """One forward of `model` on `input_data`; the model is left as it was."""
    if layer_type(model) is not None and keeps_forward(model):
        raise ModelError(f"the model itself is a single {layer_type(model)}: wrap it in a module")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} has no shape yet (lazy module): run the model once first")
    inputs = parse_inputs(model, input_data).copied()
    recorder = _Recorder(model, inputs)
    with undisturbed(model), torch.no_grad(), recorder.hooked(), HostReads(recorder.note_read), recorder:
        try:
            output = inputs.call(model)
        except Exception as error:
            raise InputDataError(f"the model rejects input_data ({inputs}): {type(error).__name__}: {error}") from error
        return recorder.recording(output)


class _Recorder(TorchDispatchMode):
    """Values by tensor object. Every tensor seen is kept alive until the end: neither ids nor storages are reused."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.doubts: dict[Doubt, None] = {}
        self.calls: dict[str, list[Node]] = {}
        self.foreign: list[nn.Parameter] = []
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._values: dict[int, Value] = {}
        self._aliases: dict[Any, list[torch.Tensor]] = {}
        self._scopes: list[str] = []
        self._layers: list[tuple[nn.Module, tuple[Value | None, ...]]] = []
        self._used_names: dict[str, int] = {}
        self._parameters = dict(model.named_parameters())
        for kind, named in (("parameter", self._parameters.items()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._bind(tensor, _value_of(tensor, kind, name))
        self.inputs = tuple(
            self._bind(tensor, _value_of(tensor, "input")) for tensor in tensors_in((inputs.args, inputs.kwargs))
        )

    def recording(self, output: Any) -> Recording:
        """What was recorded; `output` is what the model returned."""
        outputs = tuple(self._lookup(tensor) for tensor in tensors_in(output))
        present = dict(self._model.named_parameters())
        exchanged = {name for name, parameter in self._parameters.items() if present.get(name) is not parameter}
        for name in sorted(exchanged):
            self.doubts[Doubt(f"another parameter put in the place of '{name}'", "", "")] = None
        written = {name for name, value in self._parameters.items() if self._values[id(value)].kind == "computed"}
        doubts = tuple(self.doubts)
        return Recording(
            self.nodes, self.inputs, outputs, self.calls, self.foreign, doubts, frozenset(written | exchanged)
        )

    def note_read(self, tensor: torch.Tensor, how: str) -> None:
        """The model's code reads a tensor that depends on the input: what it finds decides on what runs."""
        if not self._layers and self._lookup(tensor).follows_input():
            self._doubt(f"{how.strip('_')}() of a tensor")
            if how in ("numpy", "__array__"):  # its memory is handed out, and no op tells of what is written there
                self._overwrite(tensor, self._related("host_memory", (self._lookup(tensor),), tensor))

    def _doubt(self, what: str) -> None:
        module = next((scope for scope in reversed(self._scopes) if scope), "")
        self.doubts[Doubt(what, caller(), module)] = None

    # Modules

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every module for the length of the block."""
        handles: list[Any] = []
        try:
            for module in self._model.modules():
                # Of nn.Module itself: a scripted module runs hooks, but forbids to register them.
                handles.append(nn.Module.register_forward_pre_hook(module, self._enter, with_kwargs=True))
                # In front of the user's hooks: what they make of a result (an activation, a call of another layer)
                # comes after the layer. always_call: a model may catch the exception of a part of it and go on.
                leave = nn.Module.register_forward_hook
                handles.append(leave(module, self._leave, prepend=True, with_kwargs=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scopes.append(self._names[id(module)])
        if not self._layers and (keeps_forward(module) or isinstance(module, torch.jit.ScriptModule)):
            first = {"input": kwargs["input"]} if "input" in kwargs else {}  # all layers have it in front
            inputs = tuple(self._lookup(tensor) for tensor in tensors_in((args, first | kwargs)))
            self._layers.append((module, inputs))  # from here on ops belong to the layer

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._scopes.pop()
        if self._layers and self._layers[-1][0] is module:
            _, inputs = self._layers.pop()
            name = self._names[id(module)]
            results = list(tensors_in(output))
            if not results:  # the call failed, and the model caught that
                return
            if isinstance(module, torch.jit.ScriptModule):  # what happens inside is not ours to know
                node = Node("scripted", name, None, inputs, tuple(_value_of(tensor) for tensor in results))
            else:
                node = Node(str(layer_type(module)), name, name, inputs, tuple(_value_of(tensor) for tensor in results))
                self.calls.setdefault(name, []).append(node)
            for tensor, value in zip(results, node.outputs, strict=True):
                self._bind(tensor, value)
            self.nodes.append(node)

    # Ops

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._layers:
            return func(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        named: dict[str, Any] = {}
        written: list[torch.Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            tensors.extend(tensors_in(given))
            named[argument.name] = self._replaced(given)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.extend(tensors_in(given))
        inputs = tuple(self._lookup(tensor) for tensor in tensors)
        output = func(*args, **kwargs)
        self._record_op(func, named, inputs, list(tensors_in(output)), written)
        return output

    def _record_op(
        self,
        func: Any,
        named: dict[str, Any],
        inputs: tuple[Value, ...],
        results: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> None:
        op = _op_name(func)
        if not written and len(inputs) == 1 and len(results) == 1 and _same_value(op, inputs[0], results[0]):
            self._bind(results[0], inputs[0])
            return
        # An op that writes may return nothing (foreach ops) or what it wrote; either way that is its result.
        results = results + [tensor for tensor in written if not any(tensor is result for result in results)]
        outputs = tuple(_value_of(tensor) for tensor in results)
        if any(value.follows_input() for value in inputs):
            problem = _export_problem(func, inputs)
            if problem:
                self._doubt(problem)
        pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
        self.nodes.append(Node(op, self._unique_name(op), None, inputs, outputs, named, pointwise))
        for tensor, value in zip(results, outputs, strict=True):
            if any(tensor is target for target in written):
                self._overwrite(tensor, value)
            else:
                self._bind(tensor, value)

    def _overwrite(self, tensor: torch.Tensor, value: Value) -> None:
        """New content of `tensor`: the same for every alias of the same elements, partly new for those that overlap."""
        for alias in list(self._aliases.get(_storage(tensor), [])):
            if alias is tensor or _geometry(alias) == _geometry(tensor):
                self._values[id(alias)] = value
            else:
                self._values[id(alias)] = self._related("overwritten_part", (self._values[id(alias)], value), alias)
        self._bind(tensor, value)

    # Values

    def _bind(self, tensor: torch.Tensor, value: Value) -> Value:
        known = id(tensor) in self._values
        self._values[id(tensor)] = value
        if not known:
            self._aliases.setdefault(_storage(tensor), []).append(tensor)
        return value

    def _lookup(self, tensor: torch.Tensor) -> Value:
        value = self._values.get(id(tensor))
        if value is not None:
            return value
        aliases = self._aliases.get(_storage(tensor), [])
        for alias in aliases:
            if _geometry(alias) == _geometry(tensor):
                return self._bind(tensor, self._values[id(alias)])
        sources = [self._values[id(alias)] for alias in aliases]
        if any(source.kind in ("computed", "input") for source in sources):
            # A view that was made where ops are not seen: related to what is known, in an unknown way.
            return self._bind(tensor, self._related("unseen_view", tuple(sources), tensor))
        if isinstance(tensor, nn.Parameter):
            self.foreign.append(tensor)
        return self._bind(tensor, _value_of(tensor, "constant"))

    def _related(self, op: str, sources: tuple[Value, ...], tensor: torch.Tensor) -> Value:
        """A value that depends on others through shared memory, in a way that no op describes."""
        value = _value_of(tensor)
        self.nodes.append(Node(op, self._unique_name(op), None, sources, (value,)))
        return value

    def _replaced(self, given: Any) -> Any:
        """An argument with values in place of tensors."""
        if isinstance(given, torch.Tensor):
            return self._lookup(given)
        if isinstance(given, (list, tuple)):
            return [self._replaced(item) for item in given]
        return given

    def _unique_name(self, op: str) -> str:
        """The node name that the TorchScript ONNX exporter derives from the modules on the stack and the operator."""
        kind = _ONNX_NAMES.get(op) or "".join(part.capitalize() for part in op.rsplit("::", 1)[-1].split("_"))
        name = "/".join(["", *(scope_name(scope) for scope in self._scopes if scope), kind])
        count = self._used_names.get(name, 0)
        self._used_names[name] = count + 1
        return f"{name}_{count}" if count else name


def _export_problem(func: Any, inputs: tuple[Value, ...]) -> str:
    """Why an exporter may stop at an op: sizes that depend on values, or an op that it may not know; '' otherwise."""
    namespace, name = func._schema.name.split("::")
    if torch.Tag.dynamic_output_shape in func.tags and (
        name != "index" or any(value.dtype in (torch.bool, torch.uint8) for value in inputs)
    ):
        return f"sizes that depend on values ({name})"
    if namespace == "aten" and _is_common(name):
        return ""
    return f"{_OPERATOR}{namespace}::{name}"


@functools.cache
def _is_common(name: str) -> bool:
    """Whether an op of torch belongs to its core, or is decomposed into that."""
    packet = getattr(torch.ops.aten, name.rstrip("_") if not name.endswith("__") else name, None)
    if packet is None:
        return False
    known = torch.export.default_decompositions()
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.core in overload.tags or overload in known for overload in overloads)


def _value_of(tensor: torch.Tensor, kind: str = "computed", name: str = "") -> Value:
    return Value(tuple(tensor.shape), tensor.dtype, kind, name)


def _same_value(op: str, source: Value, result: torch.Tensor) -> bool:
    same_kind = source.dtype == result.dtype and source.shape == tuple(result.shape)
    return op in _SAME_VALUE or (op in ("_to_copy", "expand", "view", "_unsafe_view") and same_kind)


def _op_name(func: Any) -> str:
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return f"{namespace}::{name}"
    return name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name


def _storage(tensor: torch.Tensor) -> Any:
    """Identity of the memory behind a tensor; tensors without any (sparse layouts) stand for themselves."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return ("object", id(tensor))


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def scope_name(qualified: str) -> str:
    """The exporter shows the last part of a module's name, with the parts before it as far as it is a mere number."""
    parts = qualified.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isnumeric():
        start -= 1
    return ".".join(parts[start:])
