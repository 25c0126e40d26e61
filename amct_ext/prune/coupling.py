"""What discovery learns about channel ids: which are one channel, which stay and why, which lose equally many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amct_ext.prune.channel_map import ChannelMap

_DEDUPLICATE_FROM = 4096  # pairs of ids; with more, duplicates are dropped first


@dataclass(frozen=True)
class ParameterAxis:
    """An axis that has ids: of a parameter or buffer, or (axis None) the inputs of a grouped convolution.

    name: of the parameter or buffer; of the layer for the inputs of a grouped convolution.
    """

    name: str
    axis: int | None


@dataclass(frozen=True, eq=False)
class AxisUse:
    """A node that produces or reads channels: its name and ONNX operator in records, and the ids along its axis.

    num_groups: of a convolution with groups. axis: of a parameter that no layer of a known type holds.
    """

    name: str
    type: str
    ids: Tensor
    num_groups: int | None = None
    axis: int | None = None


@dataclass(eq=False)
class CoupledLayers:
    """Layers whose output channels depend on each other, in the order in which records name them.

    Union-find: after a merge use `root`.
    """

    producers: list[AxisUse]
    consumers: list[AxisUse] = field(default_factory=list)
    parent: CoupledLayers | None = field(default=None, repr=False)

    @property
    def root(self) -> CoupledLayers:
        """The set that this one was merged into, itself if none."""
        coupled = self
        while coupled.parent is not None:
            coupled = coupled.parent
        return coupled

    def absorb(self, other: CoupledLayers) -> None:
        """Merge two sets; this one's producers and consumers come first."""
        root, merged = self.root, other.root
        if root is not merged:
            merged.parent = root
            root.producers.extend(merged.producers)
            root.consumers.extend(merged.consumers)


class Coupling:
    """Channel ids and what is known about them. Id 0: an index that stays."""

    def __init__(self) -> None:
        self.coupled_layers: list[CoupledLayers] = []
        self.unclaimed: list[AxisUse] = []  # consumers of ids without a known producer
        self.axis_ids: dict[ParameterAxis, Tensor] = {}
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        # Ids (rows, n), of which each row must lose equally many; the node that requires it; whether channels stay
        # where they cannot.
        self.equal_removals: list[tuple[Tensor, str, bool]] = []
        # Of each attention without a given scale: the parameters that scale its queries, and their ids.
        self.default_scaled_queries: list[tuple[tuple[str, ...], Tensor]] = []
        self.size = 1
        self._producers: list[tuple[int, int, CoupledLayers]] = []  # first id, end, layers; ascending
        self._readers: set[str] = set()
        self._known: frozenset[str] = frozenset()  # readers of an earlier walk

    def ids_of(self, axis: ParameterAxis, size: int) -> Tensor:
        """The ids of an axis, assigned when it is first asked for."""
        if axis not in self.axis_ids:
            self.axis_ids[axis] = torch.arange(self.size, self.size + size)
            self.size += size
        return self.axis_ids[axis]

    def add_producer(self, ids: Tensor, producer: AxisUse) -> None:
        """Record the layer whose output axis has these ids."""
        first = int(ids[0])
        if any(begin == first for begin, _, _ in self._producers):
            return
        coupled = CoupledLayers([producer])
        self.coupled_layers.append(coupled)
        self._producers.append((first, first + len(ids), coupled))
        self._producers.sort(key=lambda entry: entry[0])

    def coupled_layers_of(self, ids: Tensor) -> list[CoupledLayers]:
        """The sets of coupled layers that ids belong to, in order of their first index."""
        found: dict[int, CoupledLayers] = {}
        for number in first_seen(self._producers_of(ids.flatten())).tolist():
            if number >= 0:
                coupled = self._producers[number][2].root
                found.setdefault(id(coupled), coupled)
        return list(found.values())

    def _producers_of(self, ids: Tensor) -> Tensor:
        """For each id the number of the producer that it belongs to, -1 for none."""
        if not self._producers:
            return torch.full_like(ids, -1)
        starts, ends = (torch.tensor([entry[i] for entry in self._producers]) for i in (0, 1))
        numbers = torch.searchsorted(starts, ids.contiguous(), right=True) - 1
        return torch.where((numbers >= 0) & (ids < ends[numbers]), numbers, -1)

    def join(self, one: Tensor, two: Tensor, where: str) -> None:
        """Make ids at equal positions one channel; an id that is joined with 0 stays."""
        one, two = torch.broadcast_tensors(one, two)
        pairs = torch.stack([one.flatten(), two.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if not pairs.shape[1]:
            return
        if pairs.shape[1] > _DEDUPLICATE_FROM:  # a joined axis is repeated along others
            codes = (pairs[0] * self.size + pairs[1]).unique()
            pairs = torch.stack([codes // self.size, codes % self.size])
        with_zero = (pairs == 0).any(0)
        if bool(with_zero.any()):
            self.freeze(pairs[:, with_zero].flatten(), f"{where} combines the channels with others that stay")
            pairs = pairs[:, ~with_zero]
        if pairs.shape[1]:
            self.edges.append((pairs[0], pairs[1]))
            numbers, count = self._producers_of(pairs.flatten()).reshape(2, -1), len(self._producers)
            known = (numbers >= 0).all(0)
            for pair in first_seen(numbers[0, known] * count + numbers[1, known]).tolist():
                self._producers[pair // count][2].absorb(self._producers[pair % count][2])

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Mark channels as not removable. Only the first reason is reported."""
        self.frozen.append((ids.flatten(), reason))

    def freeze_all(self, maps: tuple[ChannelMap, ...], reason: str) -> None:
        """Keep all the channels of a tensor."""
        for channel_map in maps:
            self.freeze(channel_map.ids, reason)

    def require_equal_removal(self, rows: Tensor, where: str, strict: bool = True) -> None:
        """Each row of ids must lose equally many channels, or none of them any; if not `strict`, where they can."""
        if len(rows) > 1:
            self.equal_removals.append((rows, where, strict))

    def begin_walk(self) -> None:
        """Begin another walk over the graph: nodes that are consumers already are not recorded again."""
        self._known = frozenset(self._readers)

    def add_consumer(self, use: AxisUse) -> None:
        """Record a node with each set of coupled layers whose channels it reads."""
        if use.name in self._known:
            return
        self._readers.add(use.name)
        coupled_layers = self.coupled_layers_of(use.ids)
        for coupled in coupled_layers:
            coupled.consumers.append(use)
        if not coupled_layers:
            self.unclaimed.append(use)


def first_seen(values: Tensor) -> Tensor:
    """The different values of a vector, in order of their first appearance."""
    if not len(values) or bool((values == values[0]).all()):
        return values[:1]
    different, positions = values.unique(return_inverse=True)
    first = torch.full((len(different),), len(values)).scatter_reduce(0, positions, torch.arange(len(values)), "amin")
    ordered: Tensor = different[first.argsort()]
    return ordered


def merge_along(ids: Tensor, axes: Iterable[int], coupling: Coupling, where: str) -> Tensor:
    """Join all ids along some axes; returns them with size 1 there."""
    merged = ids
    for axis in axes:
        merged = merged.narrow(axis, 0, 1)
    if merged.shape != ids.shape:
        coupling.join(merged, ids, where)
    return merged


def collapse_to_axis(ids: Tensor, axis: int, size: int, coupling: Coupling, where: str) -> Tensor:
    """ids as a vector along one axis; all ids at one of its indices become one channel."""
    vector = merge_along(ids, [other for other in range(ids.dim()) if other != axis], coupling, where).flatten()
    return vector.expand(size) if len(vector) == 1 else vector
