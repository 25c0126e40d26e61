"""What a walk over the graph finds out about channels: which go together, which stay and why, which lose alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_ext.prune.channel_map import ChannelMap

_MANY = 4096  # pairs of ids, from which on equal ones are dropped


@dataclass(frozen=True)
class Source:
    """Where ids come from: an axis of a parameter or buffer, or (axis None) the inputs of a grouped convolution.

    name: of the parameter or buffer; of the layer for the inputs of a grouped convolution.
    """

    name: str
    axis: int | None


@dataclass(frozen=True, eq=False)
class Read:
    """A node that makes or reads channels: its name and ONNX operator in records, and the ids along its axis.

    group: of a convolution with groups. axis: of a parameter that no layer of a known type holds.
    """

    name: str
    type: str
    ids: Tensor
    group: int | None = None
    axis: int | None = None


@dataclass(eq=False)
class CoupledLayers:
    """Layers whose output channels depend on each other, in the order in which records name them.

    After a merge the survivor speaks for both: ask `root` first.
    """

    producers: list[Read]
    reads: list[Read] = field(default_factory=list)
    parent: CoupledLayers | None = field(default=None, repr=False)

    @property
    def root(self) -> CoupledLayers:
        """The family that this one has become part of, itself if none."""
        family = self
        while family.parent is not None:
            family = family.parent
        return family

    def absorb(self, other: CoupledLayers) -> None:
        """Merge two families; this one's producers and reads come first."""
        root, merged = self.root, other.root
        if root is not merged:
            merged.parent = root
            root.producers.extend(merged.producers)
            root.reads.extend(merged.reads)


class Coupling:
    """Ids of channels and what is known of them. Id 0 stands for indices that stay."""

    def __init__(self) -> None:
        self.families: list[CoupledLayers] = []
        self.unclaimed: list[Read] = []  # reads of ids that no producer was known for
        self.sources: dict[Source, Tensor] = {}
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.balanced: list[tuple[Tensor, str]] = []  # ids (rows, n): each row must lose equally many; said by whom
        # Queries whose product with keys is divided by the root of their size: parameters that scale them, ids.
        self.attended: list[tuple[tuple[str, ...], Tensor]] = []
        self.size = 1
        self._producers: list[tuple[int, int, CoupledLayers]] = []  # first id, end, family; ascending
        self._readers: set[str] = set()
        self._known: frozenset[str] = frozenset()  # readers of an earlier walk

    def ids_of(self, source: Source, size: int) -> Tensor:
        """The ids of a source, made at first sight."""
        if source not in self.sources:
            self.sources[source] = torch.arange(self.size, self.size + size)
            self.size += size
        return self.sources[source]

    def produced_by(self, ids: Tensor, producer: Read) -> None:
        """Ids of an output axis belong to a layer that may lose channels."""
        first = int(ids[0])
        if any(begin == first for begin, _, _ in self._producers):
            return
        family = CoupledLayers([producer])
        self.families.append(family)
        self._producers.append((first, first + len(ids), family))
        self._producers.sort(key=lambda block: block[0])

    def families_in(self, ids: Tensor) -> list[CoupledLayers]:
        """The families that ids belong to, in order of their first index."""
        found: dict[int, CoupledLayers] = {}
        for block in first_seen(self._blocks_of(ids.flatten())).tolist():
            if block >= 0:
                family = self._producers[block][2].root
                found.setdefault(id(family), family)
        return list(found.values())

    def _blocks_of(self, ids: Tensor) -> Tensor:
        """For each id the number of the producer that it belongs to, -1 for none."""
        if not self._producers:
            return torch.full_like(ids, -1)
        starts, ends = (torch.tensor([block[i] for block in self._producers]) for i in (0, 1))
        blocks = torch.searchsorted(starts, ids.contiguous(), right=True) - 1
        return torch.where((blocks >= 0) & (ids < ends[blocks]), blocks, -1)

    def join(self, one: Tensor, two: Tensor, where: str) -> None:
        """Ids at the same places are one channel; an id that meets 0 stays."""
        one, two = torch.broadcast_tensors(one, two)
        pairs = torch.stack([one.flatten(), two.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if not pairs.shape[1]:
            return
        if pairs.shape[1] > _MANY:  # a joined axis is repeated along others
            codes = (pairs[0] * self.size + pairs[1]).unique()
            pairs = torch.stack([codes // self.size, codes % self.size])
        half = (pairs == 0).any(0)
        if bool(half.any()):
            self.freeze(pairs[:, half].flatten(), f"{where} combines the channels with others that stay")
            pairs = pairs[:, ~half]
        if pairs.shape[1]:
            self.edges.append((pairs[0], pairs[1]))
            blocks, count = self._blocks_of(pairs.flatten()).reshape(2, -1), len(self._producers)
            known = (blocks >= 0).all(0)
            for pair in first_seen(blocks[0, known] * count + blocks[1, known]).tolist():
                self._producers[pair // count][2].absorb(self._producers[pair % count][2])

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Keep channels; the first reason is the one that is told."""
        self.frozen.append((ids.flatten(), reason))

    def freeze_all(self, maps: tuple[ChannelMap, ...], reason: str) -> None:
        """Keep all the channels of a tensor."""
        for channel_map in maps:
            self.freeze(channel_map.ids, reason)

    def balance(self, rows: Tensor, where: str) -> None:
        """Each row of ids must lose equally many channels."""
        if len(rows) > 1:
            self.balanced.append((rows, where))

    def start_again(self) -> None:
        """Another walk begins: nodes that have been noted as readers are not noted again."""
        self._known = frozenset(self._readers)

    def read(self, read: Read) -> None:
        """Note a node that reads channels with each family whose channels it reads."""
        if read.name in self._known:
            return
        self._readers.add(read.name)
        families = self.families_in(read.ids)
        for family in families:
            family.reads.append(read)
        if not families:
            self.unclaimed.append(read)


def first_seen(values: Tensor) -> Tensor:
    """The different values of a vector, in order of their first appearance."""
    if not len(values) or bool((values == values[0]).all()):
        return values[:1]
    different, positions = values.unique(return_inverse=True)
    first = torch.full((len(different),), len(values)).scatter_reduce(0, positions, torch.arange(len(values)), "amin")
    ordered: Tensor = different[first.argsort()]
    return ordered


def joined_indices(ids: Tensor, axis: int, size: int, coupling: Coupling, where: str) -> Tensor:
    """ids as a vector along one axis; whatever lies at one index there becomes one channel."""
    vectors = ids.movedim(axis, 0).flatten(1)
    if vectors.shape[1] > 1:
        coupling.join(vectors[:, :1], vectors, where)
    vector = vectors[:, 0]
    return vector.expand(size) if len(vector) == 1 else vector
