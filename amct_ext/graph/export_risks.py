"""Locations in a forward that may break an export."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch._ops import OpOverload

from amct_ext.graph.values import Value

READ = "() of a tensor"  # behind the function that the model's code calls
HOST_SYNC = "a value that an operator reads on the host"
_OPERATOR = "operator "

# Operators that are neither of torch's core nor decomposed into it, and have a translation to ONNX. Includes
# device-specific variants of common ops.
_TRANSLATED = frozenset(
    {
        "_embedding_bag_forward_only",
        "_fft_c2c",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
        "_trilinear",
        "addbmm",
        "complex",
        "grid_sampler_3d",
        "linalg_vector_norm",
        "miopen_batch_norm",
        "native_batch_norm",
        "polar",
        "rand_like",
        "randint_like",
        "randn_like",
        "unfold",
        "view_as_real",
    }
)
# Operators of its core, or decomposed into it, without an ONNX translation. torch's tracing exporter knows some.
_WITHOUT_TRANSLATION = frozenset({"_cdist_forward", "_pdist_forward", "linalg_pinv", "mvlgamma", "randperm"})
_PARTLY_TRANSLATED = frozenset({"aminmax"})  # of its core too: some calls are translated, others not
_NEVER_EXPORTED = frozenset({"equal", "randperm"})  # whatever they are given


@dataclasses.dataclass(frozen=True)
class ExportRisk:
    """A location in a forward that may break an export: what it is, `file:line`, and the module that runs."""

    what: str
    location: str
    module: str

    @property
    def specializes(self) -> bool:
        """Whether save traces one forward for it, or is likely to; for the others only a try shows it."""
        return not self.what.startswith(_OPERATOR) and self.what != HOST_SYNC

    @property
    def read(self) -> bool:
        """Whether the model's own code reads a tensor there."""
        return self.what.endswith(READ)

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.what, self.location and f"at {self.location}", self.module and f"in '{self.module}'"))
        )


def export_problem(func: OpOverload, inputs: Sequence[Value]) -> str:
    """Why an exporter may stop at an op, '' where none does.

    It may have sizes that depend on values, be read on the host inside of torch, or be unknown to exporters.
    """
    namespace, name = func._schema.name.split("::")
    if not (name in _NEVER_EXPORTED or any(value.depends_on_input() for value in inputs)):
        return ""
    if torch.Tag.dynamic_output_shape in func.tags and (
        name != "index" or any(value.dtype in (torch.bool, torch.uint8) for value in inputs)
    ):
        return f"sizes that depend on values ({name})"
    if name == "_local_scalar_dense":
        return HOST_SYNC
    if namespace == "aten" and name in _WITHOUT_TRANSLATION:
        return f"an operator that torch.export cannot translate ({name})"
    if namespace == "aten" and name not in _PARTLY_TRANSLATED and (name in _TRANSLATED or _is_core_or_decomposed(name)):
        return ""
    return f"{_OPERATOR}{namespace}::{name}"


@functools.cache
def _is_core_or_decomposed(name: str) -> bool:
    """Whether an op of torch belongs to its core, or is decomposed into that."""
    packet = getattr(torch.ops.aten, name.rstrip("_") if not name.endswith("__") else name, None)
    if packet is None:
        return False
    known = torch.export.default_decompositions()
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.core in overload.tags or overload in known for overload in overloads)


def exportable_submodules(risks: Sequence[ExportRisk], layers: Sequence[str]) -> list[str]:
    """The outermost modules with some of the `layers` and no risk, those with most layers first.

    A model whose forward cannot be exported may be compressed and saved by these parts. Single layers are not returned.
    """
    held = {risk.module for risk in risks}
    found: dict[str, int] = {}
    for layer in layers:
        parts = layer.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            if not any(module == name or module.startswith(f"{name}.") for module in held):
                found[name] = found.get(name, 0) + 1
                break
    return sorted(found, key=lambda name: -found[name])
