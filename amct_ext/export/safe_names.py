"""Parameters whose names torch cannot write into the code that it makes of a captured graph: quotes, keywords, ..."""

from __future__ import annotations

import keyword

import onnx_ir as ir
import torch


def make_names_safe(program: torch.export.ExportedProgram) -> dict[str, str]:
    """Rename what could not be translated, in place; returns plain name -> the name as it was."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.target is not None]
    taken = {str(spec.target) for spec in specs}
    given: dict[str, str] = {}
    for spec in specs:
        old = str(spec.target)
        if all(_is_safe(part) for part in old.split(".")):
            continue
        new = f"renamed.t{len(given)}"
        while new in taken:
            new += "_"
        given[new] = old
        spec.target = new
        for holder in (program.state_dict, program.constants):
            if old in holder:
                holder[new] = holder.pop(old)
    for output in program.graph_signature.output_specs:
        output.target = next((new for new, old in given.items() if old == output.target), output.target)
    return given


def restore_names(model: ir.Model, given: dict[str, str]) -> None:
    """Undo ``make_names_safe`` in the graph made of that program."""
    initializers = model.graph.initializers
    for new, old in given.items():
        value = initializers.pop(new, None)
        if value is not None:
            value.name = old
            initializers.add(value)


def _is_safe(part: str) -> bool:
    """Whether torch writes the name right: it takes anything between quotes that is no identifier, unescaped."""
    return not keyword.iskeyword(part) and part.isprintable() and not set(part) & {'"', "\\"}
