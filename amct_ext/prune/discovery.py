"""What discovery finds: groups of channels, and where in the forward they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.graph.trace import Graph
from amct_ext.graph.values import Value
from amct_ext.prune.coupling import ParameterAxis
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.rules.types import Maps
from amct_ext.record.types import ChannelRecord


@dataclass(frozen=True, eq=False)
class EqualRemoval:
    """Rows of ids that must lose equally many channels, and the operator that asks for it."""

    rows: Tensor
    where: str


@dataclass(frozen=True)
class Discovery:
    """All groups in the order in which their first producer ran, and where in the forward their channels are.

    maps: the channel maps of each value. channel_of: for each id, the smallest id of its channel. axis_ids: the ids of
    each axis of a parameter or buffer. default_scaled_queries: of each attention without a given scale, the parameters
    that scale its queries and the ids (heads, size) of these.
    """

    graph: Graph
    groups: tuple[ChannelGroup, ...] = ()
    maps: Mapping[Value, Maps] = field(default_factory=dict, repr=False)
    channel_of: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64), repr=False)
    axis_ids: Mapping[ParameterAxis, Tensor] = field(default_factory=dict, repr=False)
    default_scaled_queries: Sequence[tuple[tuple[str, ...], Tensor]] = ()

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups that may lose channels."""
        return tuple(group for group in self.groups if not group.frozen_reason)

    def unpruned_reasons(self) -> dict[str, str]:
        """Layers that the plan would prune and that lose nothing: name -> reason."""
        cut = {member.name for group in self.prunable for member in group.producers}
        frozen = [group for group in self.groups if group.frozen_reason]
        return {m.name: group.frozen_reason for group in frozen for m in group.producers if m.name not in cut}

    def removed_mask(self, records: Sequence[ChannelRecord], model: nn.Module) -> Tensor:
        """For each id whether these records remove its channel. `model`: pruned by them or not yet."""
        mask = torch.zeros(len(self.channel_of), dtype=torch.bool)
        for record in records:
            for node in record.producers:
                module = model.get_submodule(node.name)
                kind = kind_of(module)
                ids = self.axis_ids.get(ParameterAxis(f"{node.name}.weight", kind.weight_axes[1])) if kind else None
                if ids is not None:
                    mask[self.channel_of[ids[list(node.prune_index)]]] = True
        return mask[self.channel_of]
