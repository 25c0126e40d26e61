"""Compares the pruned model with the masked unpruned model, node by node, and the outputs of both."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from amct_ext.graph.inputs import Inputs
from amct_ext.graph.run import tensors_in
from amct_ext.graph.values import Node, Value
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.removal import Removal
from amct_ext.prune.rescale import rescaling
from amct_ext.prune.runs import Difference, MaskedRun, PrunedRun

_SELECTIONS = ("nonzero", "masked_select", "topk", "sort", "argsort", "nms", "batched_nms")
_CHECKSUM_TOLERANCE = 2e-5  # difference of two weighted sums, over the sum of magnitudes


def run_pruned(
    model: nn.Module, inputs: Inputs, discovery: Discovery, removed_mask: Tensor, sums: bool = False
) -> tuple[PrunedRun, list[Tensor], Difference | None]:
    """A forward of the pruned model: its recording, outputs, and what is wrong with it.

    `sums`: take the checksums that `first_divergence` compares.
    """
    inputs = inputs.copied()
    pruned = PrunedRun(model, inputs, discovery, removed_mask, sums)
    try:
        outputs = [tensor.clone() for tensor in tensors_in(pruned.run(inputs))]
    except Exception as error:
        node = pruned.expected()
        where = f"{node.name} ({node.op}) fails: " if node is not None else ""
        return pruned, [], Difference(node, f"{where}{type(error).__name__}: {error}")
    dims, wanted = [tensor.dim() for tensor in outputs], [len(value.shape) for value in discovery.graph.outputs]
    if dims != wanted:  # sizes are not compared: how many boxes a detector returns depends on the weights
        return pruned, outputs, Difference(None, f"its outputs would have {dims} dimensions instead of {wanted}")
    return pruned, outputs, pruned.difference()


@dataclass(frozen=True)
class RescaledRun:
    """Outputs of a pruned model, what is wrong with it, and values whose scale its own multipliers change."""

    outputs: list[Tensor]
    difference: Difference | None
    scaled: Collection[Value] = ()


def run_rescaled(
    model: nn.Module, inputs: Inputs, discovery: Discovery, removed_mask: Tensor, removal: Removal
) -> RescaledRun:
    """A forward of the model that `removal` pruned, rescaled where numbers in it depend on its size."""
    pruned, outputs, difference = run_pruned(model, inputs, discovery, removed_mask)
    if difference is not None:
        return RescaledRun(outputs, difference)
    change = rescaling(model, discovery, removed_mask, pruned.nodes)
    if change.missing is not None:
        reason = f"{change.missing.name} ({change.missing.op}) uses their number, and no layer makes up for that"
        return RescaledRun(outputs, Difference(_with_channels(change.missing, discovery), reason))
    if not change.multipliers:
        return RescaledRun(outputs, None)
    removal.undo()
    removal.scale(change.multipliers)
    removal.apply()
    _, outputs, difference = run_pruned(model, inputs, discovery, removed_mask)
    return RescaledRun(outputs, difference, change.values)


def _with_channels(node: Node, discovery: Discovery) -> Node:
    """A node, or the one before it that works on channels."""
    while not any(value and discovery.maps.get(value) for value in node.inputs):
        before = next((value.producer for value in node.inputs if value and value.producer), None)
        if before is None:
            break
        node = before
    return node


def run_masked(
    model: nn.Module, inputs: Inputs, discovery: Discovery, removed_mask: Tensor, sums: bool = False
) -> tuple[MaskedRun, list[Tensor]]:
    """A forward of the unpruned model in which removed channels have no influence."""
    inputs = inputs.copied()
    masked = MaskedRun(model, inputs, discovery, removed_mask, sums)
    return masked, [tensor.clone() for tensor in tensors_in(masked.run(inputs))]


def largest_error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, over the largest magnitude of each; inf where shapes differ."""
    worst = 0.0
    if len(got) != len(wanted):
        return torch.inf
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape:
            return torch.inf
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            same = torch.isfinite(a) & torch.isfinite(b)
            if not bool((same | (a == b) | (a.isnan() & b.isnan())).all()):
                return torch.inf
            difference = (a - b).abs()[same]
            if difference.numel():
                worst = max(worst, float(difference.max()) / max(float(b.abs()[same].max()), 1e-30))
    return worst


def first_divergence(pruned: PrunedRun, masked: MaskedRun, scaled: Collection[Value] = ()) -> Difference:
    """The first node whose checksum differs, apart from values with another scale."""
    for old, got, wanted in zip(pruned.discovery.graph.nodes, pruned.checksums, masked.checksums, strict=False):
        for value, a, b in zip(old.outputs, got, wanted, strict=False):
            if value in scaled or _is_scaled(value, pruned.discovery):
                continue
            if a is not None and b is not None and abs(a[0] - b[0]) > _CHECKSUM_TOLERANCE * max(a[1], b[1]):
                return Difference(old, f"{old.name} ({old.op}) computes something else without them")
    return Difference(None, "it computes something else without them")


def selects_by_value(node: Node) -> bool:
    """Whether a node takes elements by their values, of which a last bit may decide: a threshold, an order."""
    if node.op == "index":
        return any(value is not None and value.dtype == torch.bool for value in node.inputs)
    return node.op.rpartition("::")[2] in _SELECTIONS


def _is_scaled(value: Value, discovery: Discovery) -> bool:
    """Whether a value holds queries that the pruned model has multiplied by a factor."""
    return any(
        bool(torch.isin(item.ids, rows).any())
        for item in discovery.maps.get(value, ())
        for _, rows in discovery.default_scaled_queries
    )
