"""Names and dynamic axes of an ONNX export: checking them, and saying them in torch.export's words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from amct_ext.errors import ExportError, InputDataError


@dataclass(frozen=True)
class Axes:
    """What the caller asked for: graph names, and per tensor name the dynamic axes with the names of their sizes."""

    input_names: tuple[str, ...] | None
    output_names: tuple[str, ...] | None
    sizes: Mapping[str, Mapping[int, str]]


def as_arguments(input_data: Any) -> tuple[Any, ...]:
    """The positional arguments in `input_data`; InputDataError unless it is a tensor or a tuple (1.1)."""
    if isinstance(input_data, torch.Tensor):
        return (input_data,)
    if isinstance(input_data, tuple):
        return input_data
    raise InputDataError(f"input_data must be a torch.Tensor or a tuple of a model's arguments, not {type(input_data)}")


def check_names(names: Any, what: str) -> tuple[str, ...] | None:
    """A list of distinct non-empty strings as a tuple, or None where nothing was given. ExportError otherwise."""
    if not names:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ExportError(f"{what} must be a list of non-empty strings, not {names!r}")
    if len(set(names)) != len(names):
        raise ExportError(f"{what} {list(names)} names the same tensor twice")
    return tuple(names)


def check_axes(input_names: Any, output_names: Any, dynamic_axes: Any) -> Axes:
    """Check the three arguments against each other (amct-behaviour 1.12); ExportError says which entry is wrong.

    `dynamic_axes` maps a tensor name to a list of axes or to {axis: name of the size}; empty or None means none.
    """
    inputs, outputs = check_names(input_names, "input_names"), check_names(output_names, "output_names")
    if inputs and outputs and set(inputs) & set(outputs):
        raise ExportError(f"{sorted(set(inputs) & set(outputs))} stand in input_names and in output_names")
    if not dynamic_axes:
        return Axes(inputs, outputs, {})
    if not isinstance(dynamic_axes, Mapping):
        raise ExportError(f"dynamic_axes must be a dict of tensor name -> axes, not {type(dynamic_axes)}")
    sizes = {}
    for tensor, axes in dynamic_axes.items():
        if not isinstance(tensor, str):
            raise ExportError(f"dynamic_axes: the key {tensor!r} is no tensor name")
        if isinstance(axes, Mapping):
            named = dict(axes)
        elif isinstance(axes, (list, tuple)):
            named = {axis: f"{tensor}_dynamic_axes_{place + 1}" for place, axis in enumerate(axes)}
        else:
            raise ExportError(
                f"dynamic_axes[{tensor!r}] must be a list of int or a dict of int -> str, not {type(axes)}"
            )
        for axis, name in named.items():
            if type(axis) is not int or not isinstance(name, str) or not name:
                raise ExportError(f"dynamic_axes[{tensor!r}]: {axis!r}: {name!r} is no int axis with a str name")
        sizes[tensor] = named
    return Axes(inputs, outputs, sizes)


def argument_names(model: torch.nn.Module, arguments: Sequence[Any], axes: Axes) -> list[str | None]:
    """One name per leaf of the arguments: from input_names where given, else forward's own for plain tensors."""
    leaves = pytree.tree_leaves(tuple(arguments))
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    names: list[str | None] = [None] * len(leaves)
    if axes.input_names is not None:
        if len(axes.input_names) != len(tensors):
            raise ExportError(f"input_names has {len(axes.input_names)} names, the model takes {len(tensors)} tensors")
        for place, name in zip(tensors, axes.input_names, strict=True):
            names[place] = name
        return names
    parameters = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    place = 0
    for argument, parameter in zip(arguments, parameters, strict=False):
        if isinstance(argument, torch.Tensor):
            names[place] = parameter
        place += len(pytree.tree_leaves(argument))
    return names


def apply_axes(
    model: torch.nn.Module, arguments: tuple[Any, ...], axes: Axes
) -> tuple[tuple[Any, ...], Any, list[str | None]]:
    """The arguments to capture with, torch.export's `dynamic_shapes` for them, and the names of their leaves.

    A size of one cannot be captured as dynamic (torch specialises it), so such an axis is doubled in the example.
    ExportError for a name that is no input or output, or for an axis that the tensor does not have.
    """
    names = argument_names(model, arguments, axes)
    unknown = set(axes.sizes) - {name for name in names if name} - set(axes.output_names or ())
    if unknown:
        known = [name for name in names if name] + list(axes.output_names or ())
        raise ExportError(f"dynamic_axes names {sorted(unknown)}, but the tensors with names are {known}")
    if not axes.sizes:
        return arguments, None, names
    leaves, spec = pytree.tree_flatten(arguments)
    shapes: list[Any] = [None] * len(leaves)
    for place, name in enumerate(names):
        tensor = leaves[place]
        if name is None or name not in axes.sizes or not isinstance(tensor, torch.Tensor):
            continue
        for axis in axes.sizes[name]:
            if not 0 <= axis < tensor.dim():
                raise ExportError(f"dynamic_axes[{name!r}]: axis {axis} is outside 0..{tensor.dim() - 1}")
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
        leaves[place] = tensor
        shapes[place] = dict.fromkeys(axes.sizes[name], torch.export.Dim.DYNAMIC)
    return pytree.tree_unflatten(leaves, spec), pytree.tree_unflatten(shapes, spec), names


def rename_sizes(model: ir.Model, axes: Axes) -> None:
    """Give the symbolic sizes of the captured graph the names that the caller chose; inputs decide before outputs."""
    chosen: dict[str, str] = {}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for axis, name in axes.sizes.get(value.name or "", {}).items():
            size = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                chosen.setdefault(str(size.value), name)
    if not chosen:
        return
    symbol = re.compile(r"\b(" + "|".join(re.escape(text) for text in chosen) + r")\b")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            symbol.sub(lambda match: chosen[match.group(1)], str(size.value))
            if isinstance(size, ir.SymbolicDim) and size.value is not None
            else size
            for size in value.shape
        )
