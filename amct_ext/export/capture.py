"""A torch model as an ONNX graph: one capture with torch.export, translated by the onnxscript exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from amct_ext.errors import ExportError
from amct_ext.export.axes import Axes, apply_axes, rename_sizes
from amct_ext.export.odd_names import give_names_back, give_plain_names
from amct_ext.graph.run import tensors_in

_EXPORTABLE = (torch.Tensor, bool, int, float, str)  # leaves that torch.export lets a model return
OPSET = 18  # the lowest that the exporter writes without converting versions, so the most widely read


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's notices (missing torchvision, deprecations inside torch) away from the user."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def capture(model: torch.nn.Module, arguments: tuple[Any, ...], axes: Axes) -> torch.onnx.ONNXProgram:
    """Translate `model`, called with `arguments`, into an ONNX program that is not optimised yet.

    Initialisers carry the qualified names of parameters and buffers. Where the model returns objects that torch.export
    does not know (key-value caches, a user's own classes), the graph's outputs are all tensors in them, in order.
    ExportError when the model cannot be captured, with torch's own first lines: they name the operator or the size that
    is in the way.
    """
    arguments, shapes, _ = apply_axes(model, arguments, axes)
    with quiet(), torch.no_grad(), _plain_outputs(model):
        try:
            exported = torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise ExportError(f"the model cannot be captured for ONNX: {_head(error)}") from error
        given_names = give_plain_names(exported)
        try:
            program = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                input_names=axes.input_names,
                output_names=axes.output_names,
            )
        except Exception as error:
            raise ExportError(f"the model cannot be translated to ONNX: {_head(error)}") from error
    program = cast(torch.onnx.ONNXProgram, program)
    give_names_back(program.model, given_names)
    returned = len(program.model.graph.outputs)
    if axes.output_names is not None and len(axes.output_names) != returned:
        raise ExportError(f"output_names has {len(axes.output_names)} names, the model returns {returned} tensors")
    rename_sizes(program.model, axes)
    return program


def optimise(program: torch.onnx.ONNXProgram) -> ir.Model:
    """Fold constants and remove what is redundant; nodes of foreign domains are left as they are."""
    with quiet():
        program.optimize()
    return program.model


@contextmanager
def _plain_outputs(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, `model` returns a tuple of tensors wherever its output holds anything unknown to torch.export.

    A hook, not a module around the model: names of parameters and modules stay what they are.
    """

    def flatten(_: torch.nn.Module, __: Any, output: Any) -> Any:
        known = all(leaf is None or isinstance(leaf, _EXPORTABLE) for leaf in pytree.tree_leaves(output))
        return None if known else tuple(tensors_in(output))

    handle = model.register_forward_hook(flatten)
    try:
        yield
    finally:
        handle.remove()


def _head(error: BaseException) -> str:
    """What went wrong, without the pages of advice that torch wraps around it: the operator and the innermost cause."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    # the outermost error of a chain only says that the export failed, the next one names the operator
    texts = [str(cause).strip().splitlines() for cause in chain[1:] or chain]
    lines = [line for text in (texts[0], texts[-1]) for line in text[:8]]
    return "\n".join(dict.fromkeys(lines)) or type(error).__name__
