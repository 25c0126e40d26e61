"""A torch model as an ONNX graph: torch.export and the onnxscript exporter, or a trace where these cannot follow."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch

from amct_ext.errors import ExportError
from amct_ext.export.axes import Axes, apply_axes, rename_sizes
from amct_ext.export.flat_call import flat_call
from amct_ext.export.precision import widen
from amct_ext.export.safe_names import make_names_safe, restore_names
from amct_ext.export.traced import LayerValues, trace_to_onnx
from amct_ext.graph.export_risks import ExportRisk
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.trace import trace

OPSET = 18  # the lowest that the exporter writes without converting versions, so the most widely read
_MAX_LISTED = 5
_MAX_CHARS = 300
_ADVICE = ("For ", "The error above occurred", "If you suspect", "consider using", "(Refer to")
logger = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class Captured:
    """The graph, not optimised yet; `traced_reason` is empty where torch.export could follow the forward."""

    program: torch.onnx.ONNXProgram
    traced_reason: str = ""

    @property
    def model(self) -> ir.Model:
        """The graph itself."""
        return self.program.model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' notices (missing torchvision, deprecations inside torch) away from the user."""
    names = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    prints = torch._C._jit_is_onnx_log_enabled()
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        # where they fail they print the graph that they have so far
        nowhere = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_set_onnx_log_enabled(prints)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def capture(
    model: torch.nn.Module,
    inputs: Inputs,
    axes: Axes,
    values: Callable[[], LayerValues] = dict,
    traced: str = "",
) -> Captured:
    """Translate `model`, called with `inputs`, into an ONNX graph of tensors in and tensors out.

    Initialisers carry the qualified names of parameters and buffers; no type is narrower than float32. Where
    torch.export cannot follow the forward (it decides by values, say), or where `traced` gives another reason, one run
    is traced instead, and what that run read on the host is constant in the graph; `values` is asked then for what the
    layers of the quantised model returned. The outputs are all tensors that the
    model returns, in order. ExportError when neither works, with torch's own first lines: they name the operator or the
    size that is in the way.
    """
    names = axes.input_names_for(inputs.names(model))
    inputs = inputs.copied()  # torch.export leaves notes on tensors, a trace runs what writes into them
    if not traced:
        try:
            program = _export(model, inputs, names, axes)
        except ExportError as error:
            # Sizes that cannot be dynamic are the caller's affair: a trace would not make them so.
            if axes.sizes and _can_export(model, inputs, names):
                raise
            traced, cause = str(error), error
        else:
            return _finalize(Captured(program), axes)
    else:
        cause = None
    try:
        with quiet(), torch.no_grad(), flat_call(model, inputs, names):
            program = trace_to_onnx(model, inputs.tensors(), names, axes, OPSET, values())
    except Exception as error:
        if cause is not None:
            raise ExportError(f"{cause}\nnor be traced: {_summary(error)}") from error
        raise ExportError(f"the model cannot be traced for ONNX: {_summary(error)}") from error
    return _finalize(Captured(program, traced), axes)


def trace_note(captured: Captured, model: torch.nn.Module, inputs: Inputs, names: Sequence[str]) -> str:
    """For the user: what a trace fixed and where, '' where there was none. `names`: those of the inputs."""
    if not captured.traced_reason:
        return ""
    risks = format_risks(trace(model, inputs).export_risks)
    where, reason = f" ({risks})" if risks else "", captured.traced_reason.splitlines()[0]
    left = {value.name for value in captured.model.graph.inputs}
    lost = [name for name in names if name not in left]
    without = f" Nothing else hangs on {', '.join(lost)}: no inputs of the files." if lost else ""
    return (
        "one forward was traced, because torch.export cannot follow the model's: sizes, branches and numbers that it "
        f"takes from tensors{where} are constants in the files, those of input_data.{without} To have them computed, "
        "take them from shapes, or use torch.where and the like. torch.export says: "
        f"{reason[:_MAX_CHARS]}"
    )


def format_risks(export_risks: Sequence[ExportRisk]) -> str:
    """The first of them, for a message."""
    lines = list(dict.fromkeys(map(str, export_risks)))
    more = f" and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    return "; ".join(lines[:_MAX_LISTED]) + more


def optimize(captured: Captured) -> ir.Model:
    """Fold constants and remove what is redundant; nodes of foreign domains are left as they are."""
    with quiet():
        captured.program.optimize()
    return captured.model


def _finalize(captured: Captured, axes: Axes) -> Captured:
    graph = captured.model.graph
    returned, given = len(graph.outputs), len(axes.output_names or ())
    if given > returned:
        raise ExportError(f"output_names has {given} names, the model returns {returned} tensors")
    rename_sizes(captured.model, axes)
    widen(captured.model)
    known = {value.name for value in (*graph.inputs, *graph.outputs)}
    unknown = [name for name in axes.sizes if name not in known]
    if unknown:
        logger.warning(
            "dynamic_axes: no input or output is named %s, which has no effect", ", ".join(map(repr, unknown))
        )
    return captured


def _can_export(model: torch.nn.Module, inputs: Inputs, names: list[str]) -> bool:
    try:
        with quiet(), torch.no_grad(), flat_call(model, inputs, names):
            torch.export.export(model, tuple(inputs.copied().tensors()), strict=False)
    except Exception:
        return False
    return True


def _export(model: torch.nn.Module, inputs: Inputs, names: list[str], axes: Axes) -> torch.onnx.ONNXProgram:
    tensors, shapes = apply_axes(inputs.tensors(), names, axes)
    with quiet(), torch.no_grad(), flat_call(model, inputs, names):
        try:
            exported = torch.export.export(model, tensors, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ExportError(f"the model cannot be captured for ONNX: {_summary(error)}") from error
        given_names = make_names_safe(exported)
        try:
            _normalize_means(exported)
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                input_names=names,
                output_names=axes.output_names,
            )
        except Exception as error:
            raise ExportError(f"the model cannot be translated to ONNX: {_summary(error)}") from error
    program = cast(torch.onnx.ONNXProgram, program)
    restore_names(program.model, given_names)
    return program


def _normalize_means(exported: torch.export.ExportedProgram) -> None:
    """Write the axes of the model's own means from 0 upwards: negative ones are left to what pooling turns into."""
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten.mean.dim and node.args[1] is not None:
            rank = node.args[0].meta["val"].dim()
            node.update_arg(1, sorted(axis % rank for axis in node.args[1]) if rank else node.args[1])


def _summary(error: BaseException) -> str:
    """What went wrong, without the pages of advice that torch wraps around it: the operator and the innermost cause."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # the outermost error of a chain only says that the export failed, the next one names the operator
    texts = [str(cause).strip().splitlines() for cause in chain[1:] or chain]
    lines = [
        line[:_MAX_CHARS]
        for text in (texts[0], texts[-1])
        for line in text[:8]
        if line and not line.startswith(_ADVICE)
    ]
    return "\n".join(dict.fromkeys(lines)) or type(error).__name__
