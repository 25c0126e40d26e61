"""Recording of one forward: a dispatch mode sees every aten op, module hooks turn each layer call into one node."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from amct_ext.common.layer_kinds import keeps_forward, layer_type
from amct_ext.errors import InputDataError, ModelError
from amct_ext.graph.export_risks import HOST_SYNC, READ, ExportRisk, export_problem
from amct_ext.graph.host_reads import HostReads, caller
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.onnx_names import NodeNames
from amct_ext.graph.run import preserved_state, tensors_in
from amct_ext.graph.tensor_values import TensorValues
from amct_ext.graph.values import Node, Value, value_of

# Ops whose result has the values and shape of their input.
_SAME_VALUE = {"detach", "alias", "clone", "lift", "lift_fresh", "lift_fresh_copy", "contiguous"}


@dataclasses.dataclass(frozen=True)
class Recording:
    """Nodes in execution order, the values that went in and came out, and the calls of each layer by name.

    `export_risks` are locations that may break an export. `written` are
    the parameters (qualified names) that the forward wrote into or replaced.
    """

    nodes: list[Node]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    calls: dict[str, list[Node]]
    foreign: list[nn.Parameter]  # parameters that an op read and that are none of the model's
    export_risks: tuple[ExportRisk, ...]
    written: frozenset[str]


def record(model: nn.Module, input_data: Any) -> Recording:
    """One forward of `model` on `input_data` in eval mode; the model is left as it was."""
    if layer_type(model) is not None and keeps_forward(model):
        raise ModelError(f"the model itself is a single {layer_type(model)}: wrap it in a module")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} has no shape yet (lazy module): run the model once first")
    inputs = parse_inputs(model, input_data).copied()
    recorder = Recorder(model, inputs)
    try:
        output = recorder.run(inputs)
    except Exception as error:
        raise InputDataError(f"the model rejects input_data ({inputs}): {type(error).__name__}: {error}") from error
    return recorder.recording(output)


class _NodeLog:
    """The nodes so far, and the modules that are running (qualified names, outermost first)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.scopes: list[str] = []
        self._names = NodeNames()

    def add_op(
        self,
        op: str,
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
        args: Mapping[str, Any] = MappingProxyType({}),
        pointwise: bool = False,
    ) -> Node:
        name, scope = self._names.unique(op, self.scopes), self.scopes[-1] if self.scopes else ""
        self.nodes.append(Node(op, name, None, inputs, outputs, args, pointwise, scope))
        return self.nodes[-1]

    def relate(self, op: str, sources: tuple[Value, ...], tensor: torch.Tensor) -> Value:
        """A value that depends on others through shared memory, in a way that no op describes."""
        value = value_of(tensor)
        self.add_op(op, sources, (value,))
        return value


class Recorder(TorchDispatchMode):
    """Nodes of ops from the dispatcher, of layers from hooks; inside of a layer ops are not recorded.

    A subclass may change what layers are given and how ops run, and sees the results of every node.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.export_risks: dict[ExportRisk, None] = {}
        self.calls: dict[str, list[Node]] = {}
        self._model = model
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._log = _NodeLog()
        self._own = False
        self._values = TensorValues(self._log.relate)
        self._layers: list[tuple[nn.Module, tuple[Value | None, ...]]] = []
        self._parameters = dict(model.named_parameters())
        for kind, named in (("parameter", self._parameters.items()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._values.bind(tensor, value_of(tensor, kind, name))
        self.inputs = tuple(
            self._values.bind(tensor, value_of(tensor, "input")) for tensor in tensors_in((inputs.args, inputs.kwargs))
        )

    @property
    def nodes(self) -> list[Node]:
        """The nodes so far."""
        return self._log.nodes

    def run(self, inputs: Inputs, training: bool = False) -> Any:
        """One forward without gradients, in eval or train mode; the model is left as it was."""
        # A mode for functions keeps torch off its fast paths, which only take plain tensors (MultiheadAttention).
        with preserved_state(self._model, training), torch.no_grad(), HostReads(self.note_read), self.hooked(), self:
            return inputs.call(self._model)

    def replace_layer_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer is called with: None for what it was given."""
        return None

    def evaluate(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an op outside of layers."""
        return func(*args, **kwargs)

    def observe(self, node: Node, results: list[torch.Tensor]) -> None:
        """A node has run."""

    def recording(self, output: Any) -> Recording:
        """What was recorded; `output` is what the model returned."""
        outputs = tuple(self._values.lookup(tensor) for tensor in tensors_in(output))
        present = dict(self._model.named_parameters())
        exchanged = {name for name, parameter in self._parameters.items() if present.get(name) is not parameter}
        for name in sorted(exchanged):
            self.export_risks[ExportRisk(f"another parameter put in the place of '{name}'", "", "")] = None
        written = {name for name, value in self._parameters.items() if self._values.lookup(value).kind == "computed"}
        export_risks = tuple(self.export_risks)
        return Recording(
            self._log.nodes,
            self.inputs,
            outputs,
            self.calls,
            self._values.foreign,
            export_risks,
            frozenset(written | exchanged),
        )

    def note_read(self, tensor: torch.Tensor, how: str) -> None:
        """The model's code reads a tensor that depends on the input: what it finds decides on what runs."""
        if not self._layers and self._values.lookup(tensor).depends_on_input():
            self._note_risk(how.strip("_") + READ)
            if how in ("numpy", "__array__"):  # its memory is handed out, and no op tells of what is written there
                self._values.overwrite(tensor, self._log.relate("host_memory", (self._values.lookup(tensor),), tensor))

    def _note_risk(self, what: str) -> None:
        module = next((scope for scope in reversed(self._log.scopes) if scope), "")
        risk = ExportRisk(what, caller(), module)
        if what == HOST_SYNC and any(risk.location == other.location and other.read for other in self.export_risks):
            return  # what the model's code reads is named with the function it calls
        self.export_risks[risk] = None

    @contextlib.contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """Do not record ops that our hooks run."""
        self._own = True
        try:
            yield
        finally:
            self._own = False

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

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._log.scopes.append(self._modules[id(module)])
        if not self._layers and (keeps_forward(module) or isinstance(module, torch.jit.ScriptModule)):
            first = (
                {"input": kwargs["input"]} if "input" in kwargs else {}
            )  # `input` is the first parameter of every torch layer
            inputs = tuple(self._values.lookup(tensor) for tensor in tensors_in((args, first | kwargs)))
            with self._unrecorded():
                replaced = self.replace_layer_inputs(module, args, kwargs)
            self._layers.append((module, inputs))  # from here on ops belong to the layer
            return replaced
        return None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._log.scopes.pop()
        if self._layers and self._layers[-1][0] is module:
            _, inputs = self._layers.pop()
            name = self._modules[id(module)]
            results = list(tensors_in(output))
            if not results:  # the call failed, and the model caught that
                return
            if isinstance(module, torch.jit.ScriptModule):  # ops inside a script are not recorded
                node = Node("scripted", name, None, inputs, tuple(value_of(tensor) for tensor in results))
            else:
                node = Node(str(layer_type(module)), name, name, inputs, tuple(value_of(tensor) for tensor in results))
                self.calls.setdefault(name, []).append(node)
            for tensor, value in zip(results, node.outputs, strict=True):
                self._values.bind(tensor, value)
            self._log.nodes.append(node)
            with self._unrecorded():
                self.observe(node, results)

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._layers or self._own:
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
        inputs = tuple(self._values.lookup(tensor) for tensor in tensors)
        output = self.evaluate(func, args, kwargs)
        self._record_op(func, named, inputs, list(tensors_in(output)), written)
        return output

    def _record_op(
        self,
        func: OpOverload,
        named: dict[str, Any],
        inputs: tuple[Value, ...],
        results: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> None:
        op = op_name(func)
        if not written and len(inputs) == 1 and len(results) == 1 and _same_value(op, inputs[0], results[0]):
            self._values.bind(results[0], inputs[0])
            return
        # An op that writes may return nothing (foreach ops) or what it wrote; either way that is its result.
        results = results + [tensor for tensor in written if not any(tensor is result for result in results)]
        outputs = tuple(value_of(tensor) for tensor in results)
        problem = export_problem(func, inputs)
        if problem:
            self._note_risk(problem)
        pointwise = torch.Tag.pointwise in getattr(func, "tags", ())
        node = self._log.add_op(op, inputs, outputs, named, pointwise)
        for tensor, value in zip(results, outputs, strict=True):
            if any(tensor is target for target in written):
                self._values.overwrite(tensor, value)
            else:
                self._values.bind(tensor, value)
            if not value.dependent and _holds_a_number(tensor):
                with self._unrecorded():
                    value.number = tensor.item()
        self.observe(node, results)

    def _replaced(self, given: Any) -> Any:
        """An argument with values in place of tensors."""
        if isinstance(given, torch.Tensor):
            return self._values.lookup(given)
        if isinstance(given, (list, tuple)):
            return [self._replaced(item) for item in given]
        return given


def _same_value(op: str, source: Value, result: torch.Tensor) -> bool:
    same_kind = source.dtype == result.dtype and source.shape == tuple(result.shape)
    return op in _SAME_VALUE or (op in ("_to_copy", "expand", "view", "_unsafe_view") and same_kind)


def _holds_a_number(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a number that can be read without waiting for a device."""
    return tensor.dim() == 0 and tensor.is_floating_point() and tensor.device.type == "cpu"


def op_name(func: OpOverload) -> str:
    namespace, name = str(func._schema.name).split("::")
    if namespace != "aten":
        return f"{namespace}::{name}"
    return name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
