"""Groups of coupled channels, and where in a tensor the channels of which group lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from amct_ext.record.types import ChannelRecord, PruneNode


@dataclass(frozen=True)
class Member:
    """A node that produces or reads a group's channels: they take the indices begin .. begin + count * repeat there.

    type: the ONNX operator. repeat: how many adjacent indices one channel takes (a flattened feature map, a depthwise
    multiplier). group: the group count of a grouped convolution.
    """

    name: str
    type: str
    begin: int = 0
    repeat: int = 1
    group: int | None = None

    def indices(self, channels: Iterable[int]) -> tuple[int, ...]:
        """Where the given channels lie in this node."""
        return tuple(self.begin + channel * self.repeat + copy for channel in channels for copy in range(self.repeat))


@dataclass(eq=False)
class ChannelGroup:
    """Channels that can only go together. After a merge the survivor speaks for both: ask `root` first.

    blocks: the channels lie in this many equal blocks that must lose equally many (grouped convolutions); None: no such
    condition. why_frozen: why the channels must stay, '' where they may go.
    """

    count: int
    producers: list[Member]
    consumers: list[Member] = field(default_factory=list)
    blocks: int | None = None
    why_frozen: str = ""
    _parent: ChannelGroup | None = field(default=None, repr=False)

    @property
    def root(self) -> ChannelGroup:
        """The group that this one has become part of, itself if none."""
        group = self
        while group._parent is not None:
            group = group._parent
        return group

    def freeze(self, reason: str) -> None:
        """Keep the channels; the first reason is the one that is told."""
        root = self.root
        root.why_frozen = root.why_frozen or reason

    def read_by(self, member: Member) -> None:
        """Add a consumer."""
        self.root.consumers.append(member)

    def in_blocks(self, blocks: int, where: str) -> None:
        """Demand equal removal in equal blocks. Demands combine where one divides the other, else the group freezes."""
        root = self.root
        if root.count % blocks:
            root.freeze(f"{where} has {blocks} groups, which {root.count} channels cannot be divided into")
        elif root.blocks is None or blocks % root.blocks == 0:
            root.blocks = blocks
        elif root.blocks % blocks:
            root.freeze(f"{where} needs {blocks} equal blocks of channels, another layer {root.blocks}")

    def absorb(self, other: ChannelGroup, where: str) -> None:
        """Couple two groups; this one's producers and consumers come first."""
        root, merged = self.root, other.root
        if root is merged:
            return
        if root.count != merged.count:
            raise AssertionError(f"{where}: groups of {root.count} and {merged.count} channels cannot be coupled")
        merged._parent = root
        root.producers.extend(merged.producers)
        root.consumers.extend(merged.consumers)
        if merged.why_frozen:
            root.freeze(merged.why_frozen)
        if merged.blocks is not None:
            root.in_blocks(merged.blocks, where)

    @staticmethod
    def of(record: ChannelRecord) -> ChannelGroup:
        """The group that a record describes."""
        first = record.producers[0]
        count = first.end - first.begin

        def member(node: PruneNode) -> Member:
            return Member(node.name, node.type, node.begin, (node.end - node.begin) // count, node.group)

        producers, consumers = [[member(node) for node in nodes] for nodes in (record.producers, record.consumers)]
        return ChannelGroup(count, producers, consumers, first.prune_group)

    def record(self, removed: Sequence[int]) -> ChannelRecord:
        """The record entry of this group when the given channels are removed."""

        def node(member: Member, blocks: int | None) -> PruneNode:
            return PruneNode(
                name=member.name,
                type=member.type,
                begin=member.begin,
                end=member.begin + self.count * member.repeat,
                group=member.group,
                prune_group=blocks,
                prune_index=member.indices(removed),
            )

        return ChannelRecord(
            producers=tuple(node(member, self.blocks) for member in self.producers),
            consumers=tuple(node(member, None) for member in self.consumers),
        )


@dataclass(frozen=True)
class Segment:
    """A run of indices along a channel axis: `count` channels of `repeat` indices each. group None: they stay."""

    group: ChannelGroup | None
    count: int
    repeat: int = 1

    @property
    def size(self) -> int:
        return self.count * self.repeat

    def same_layout(self, other: Segment) -> bool:
        """Whether channel i of both takes the same indices."""
        return self.count == other.count and self.repeat == other.repeat


@dataclass(frozen=True)
class Layout:
    """Which channels lie where along one axis of a tensor."""

    axis: int
    segments: tuple[Segment, ...]

    @property
    def groups(self) -> list[ChannelGroup]:
        """The groups that have channels here."""
        return [segment.group.root for segment in self.segments if segment.group is not None]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    def at(self, axis: int) -> Layout:
        """The same channels along another axis."""
        return Layout(axis, self.segments)

    def repeated(self, times: int) -> Layout:
        """Every index taken `times` times."""
        return Layout(self.axis, tuple(Segment(part.group, part.count, part.repeat * times) for part in self.segments))

    def freeze(self, reason: str) -> None:
        """Keep all channels that lie here."""
        for group in self.groups:
            group.freeze(reason)

    def begins(self) -> list[tuple[int, Segment]]:
        """Each segment with the index where it begins."""
        result, begin = [], 0
        for segment in self.segments:
            result.append((begin, segment))
            begin += segment.size
        return result
