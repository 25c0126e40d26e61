"""Names and dynamic axes of an ONNX export: checking them, and saying them in torch.export's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import onnx_ir as ir
import torch

from amct_ext.errors import ExportError


@dataclass(frozen=True)
class Axes:
    """What the caller asked for: names of the first tensors; by tensor name, dynamic axes and names of their sizes."""

    input_names: tuple[str, ...] | None
    output_names: tuple[str, ...] | None
    sizes: Mapping[str, Mapping[int, str]]

    def input_names_for(self, own: Sequence[str]) -> list[str]:
        """One name for each tensor that goes in: the given ones first, then the tensors' own, all of them distinct.

        ExportError where more names are given than there are tensors.
        """
        given = self.input_names or ()
        if len(given) > len(own):
            raise ExportError(f"input_names has {len(given)} names, the model takes {len(own)} tensors")
        names = list(given)
        taken = {*given, *(self.output_names or ())}
        for name in own[len(given) :]:
            free = next(candidate for candidate in _numbered(name) if candidate not in taken)
            names.append(free)
            taken.add(free)
        return names


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def check_names(names: object, what: str) -> tuple[str, ...] | None:
    """A list of distinct non-empty strings as a tuple, or None where nothing was given. ExportError otherwise."""
    if not names:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ExportError(f"{what} must be a list of non-empty strings, not {names!r}")
    if len(set(names)) != len(names):
        raise ExportError(f"{what} {list(names)} names the same tensor twice")
    return tuple(names)


def check_axes(input_names: object, output_names: object, dynamic_axes: object) -> Axes:
    """Check the three arguments against each other, by AMCT's rules. Errors: ExportError naming the wrong entry.

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
            named = {axis: f"{tensor}_dynamic_axes_{index + 1}" for index, axis in enumerate(axes)}
        else:
            raise ExportError(
                f"dynamic_axes[{tensor!r}] must be a list of int or a dict of int -> str, not {type(axes)}"
            )
        for axis, name in named.items():
            if type(axis) is not int or not isinstance(name, str) or not name:
                raise ExportError(f"dynamic_axes[{tensor!r}]: {axis!r}: {name!r} is no int axis with a str name")
        sizes[tensor] = named
    return Axes(inputs, outputs, sizes)


def apply_axes(
    tensors: Sequence[torch.Tensor], names: Sequence[str], axes: Axes
) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, object] | None, ...] | None]:
    """The tensors to capture with, and torch.export's `dynamic_shapes` for them.

    A size of one cannot be captured as dynamic (torch specialises it), so such an axis is doubled in the example.
    ExportError for an axis that a tensor does not have.
    """
    if not any(name in axes.sizes for name in names):
        return tuple(tensors), None
    examples, shapes = [], []
    for tensor, name in zip(tensors, names, strict=True):
        for axis in axes.sizes.get(name, {}):
            if not 0 <= axis < tensor.dim():
                raise ExportError(f"dynamic_axes[{name!r}]: axis {axis} is outside 0..{tensor.dim() - 1}")
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], dim=axis)
        examples.append(tensor)
        shapes.append(dict.fromkeys(axes.sizes[name], torch.export.Dim.DYNAMIC) if name in axes.sizes else None)
    return tuple(examples), tuple(shapes)


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
