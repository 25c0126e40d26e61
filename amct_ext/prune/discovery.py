"""What discovery finds: groups of channels, and where in the forward they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from amct_ext.common.layer_kinds import kind_of
from amct_ext.graph.trace import Graph
from amct_ext.graph.values import Value
from amct_ext.prune.coupling import Source
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.rules.types import Maps
from amct_ext.record.types import ChannelRecord


@dataclass(frozen=True, eq=False)
class Demand:
    """Rows of ids that must lose equally many channels, and the operator that asks for it."""

    rows: Tensor
    where: str


@dataclass(frozen=True)
class Discovery:
    """All groups in the order in which their first producer ran, and where in the forward their channels are.

    maps: the channels in each value. classes: for each id of a map, the smallest id of the same channel. sources: the
    ids of each axis of a parameter or buffer. attended: of each attention that divides by the root of the size of a
    head, the parameters that scale its queries and the ids (heads, size) of these.
    """

    graph: Graph
    groups: tuple[ChannelGroup, ...] = ()
    maps: Mapping[Value, Maps] = field(default_factory=dict, repr=False)
    classes: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64), repr=False)
    sources: Mapping[Source, Tensor] = field(default_factory=dict, repr=False)
    attended: Sequence[tuple[tuple[str, ...], Tensor]] = ()

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        """The groups whose channels may go."""
        return tuple(group for group in self.groups if not group.why_frozen)

    def why_not(self) -> dict[str, str]:
        """Layers that the plan would prune but that stay whole: name -> reason."""
        cut = {member.name for group in self.prunable for member in group.producers}
        frozen = [group for group in self.groups if group.why_frozen]
        return {m.name: group.why_frozen for group in frozen for m in group.producers if m.name not in cut}

    def removed(self, records: Sequence[ChannelRecord], model: nn.Module) -> Tensor:
        """For each id whether its channel goes with these records of `model`, which is whole or cut already."""
        gone = torch.zeros(len(self.classes), dtype=torch.bool)
        for record in records:
            for node in record.producers:
                module = model.get_submodule(node.name)
                kind = kind_of(module)
                ids = self.sources.get(Source(f"{node.name}.weight", kind.weight_axes[1])) if kind else None
                if ids is not None:
                    gone[self.classes[ids[list(node.prune_index)]]] = True
        return gone[self.classes]
