"""What a layer of a model can take: written by the graph, read by the plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerTraits:
    """What a layer of the model can take.

    `type` is the torch class name; int4_weights: its Cin is even and it has one group.
    """

    type: str
    quantizable: bool
    filter_prunable: bool
    sparse_prunable: bool
    int4_weights: bool
    not_quantizable_reason: str = ""
    not_sparse_reason: str = ""  # 2:4
