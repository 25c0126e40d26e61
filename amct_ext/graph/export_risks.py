"""Places in a forward that an exporter may not be able to follow."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch._ops import OpOverload

from amct_ext.graph.values import Value

_OPERATOR = "operator "


@dataclasses.dataclass(frozen=True)
class ExportRisk:
    """A place in a forward: what stands there, `file:line`, and the module that runs."""

    what: str
    place: str
    module: str

    @property
    def specializes(self) -> bool:
        """Whether a trace would keep what it saw; an unknown operator is followed or not."""
        return not self.what.startswith(_OPERATOR)

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.what, self.place and f"at {self.place}", self.module and f"in '{self.module}'"))
        )


def export_problem(func: OpOverload, inputs: tuple[Value, ...]) -> str:
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
