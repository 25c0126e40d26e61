"""Channel groups, as records name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_ext.record.types import ChannelRecord, PruneNode

INITIALIZER = "Initializer"  # type of a member that is a bare parameter or buffer


@dataclass(frozen=True)
class Member:
    """A node that produces or reads a group's channels, at its indices begin .. begin + count * repeat.

    type: the ONNX operator; 'Initializer' for a bare parameter or buffer, whose name the member has. repeat: how many
    adjacent indices one channel takes (a flattened feature map, a depthwise multiplier). num_groups: of a
    grouped convolution. axis: of an Initializer. index_pairs: (channel, index) of each index, where channels are in
    another order (after a channel shuffle); begin and end are the range of all then.
    """

    name: str
    type: str
    begin: int = 0
    repeat: int = 1
    num_groups: int | None = None
    axis: int | None = None
    index_pairs: tuple[tuple[int, int], ...] = ()
    end: int | None = None

    def indices(self, channels: Iterable[int]) -> tuple[int, ...]:
        """The indices of the given channels in this node."""
        if self.index_pairs:
            removed = set(channels)
            return tuple(sorted(index for channel, index in self.index_pairs if channel in removed))
        return tuple(self.begin + channel * self.repeat + copy for channel in channels for copy in range(self.repeat))

    def per_channel(self, count: int) -> float:
        """How many indices one channel takes here, the mean where that differs."""
        return len(self.index_pairs) / count if self.index_pairs else self.repeat

    def summed(self, values: Tensor, count: int) -> Tensor:
        """Values by index (last axis), summed for each of the group's channels."""
        if self.index_pairs:
            channels, indices = torch.tensor(self.index_pairs, device=values.device).T
            result = values.new_zeros(*values.shape[:-1], count)
            return result.index_add(-1, channels, values[..., indices])
        part = values[..., self.begin : self.begin + count * self.repeat]
        return part.reshape(*values.shape[:-1], count, self.repeat).sum(-1)


@dataclass(eq=False)
class ChannelGroup:
    """Channels that can only be removed together.

    subgroups: the number of each channel's subgroup; all subgroups of a group and of its `tied_groups` lose the same
    share (groups of a convolution or norm, heads, halves of a split). None: no equal removal is asked for.
    frozen_reason: why the channels must stay, '' if they may be removed.
    """

    count: int
    producers: list[Member]
    consumers: list[Member] = field(default_factory=list)
    subgroups: Tensor | None = None
    frozen_reason: str = ""
    tied_groups: list[ChannelGroup] = field(default_factory=list, repr=False)

    @property
    def num_equal_subgroups(self) -> int | None:
        """The number of subgroups if they are equally long, one after another, as AMCT writes them; else None."""
        if self.subgroups is None or self.tied_groups:
            return None
        number = int(self.subgroups.max()) + 1
        if number == 1 or self.count % number:
            return None
        regular = torch.arange(number).repeat_interleave(self.count // number)
        return number if torch.equal(self.subgroups, regular) else None

    @staticmethod
    def of(record: ChannelRecord) -> ChannelGroup:
        """The group that a record describes. A record has no index pairs of reordered nodes."""
        first = record.producers[0]
        count = first.end - first.begin

        def member(node: PruneNode) -> Member:
            return Member(node.name, node.type, node.begin, (node.end - node.begin) // count, node.group, node.axis)

        producers, consumers = [[member(node) for node in nodes] for nodes in (record.producers, record.consumers)]
        num_subgroups = first.prune_group
        subgroups = (
            None if num_subgroups is None else torch.arange(num_subgroups).repeat_interleave(count // num_subgroups)
        )
        return ChannelGroup(count, producers, consumers, subgroups)

    def record(self, removed: Sequence[int]) -> ChannelRecord:
        """The record entry of this group when the given channels are removed."""

        def node(member: Member, num_subgroups: int | None) -> PruneNode:
            return PruneNode(
                name=member.name,
                type=member.type,
                begin=member.begin,
                end=member.begin + self.count * member.repeat if member.end is None else member.end,
                group=member.num_groups,
                prune_group=num_subgroups,
                prune_index=member.indices(removed),
                axis=member.axis,
                reordered=bool(member.index_pairs),
            )

        return ChannelRecord(
            producers=tuple(node(member, self.num_equal_subgroups) for member in self.producers),
            consumers=tuple(node(member, None) for member in self.consumers),
        )
