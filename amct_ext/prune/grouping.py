"""From what is known of single channels to groups of them: blocks of channels that lie alike in all their layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from amct_ext.prune.coupling import CoupledLayers, Coupling, Read, Source, first_seen
from amct_ext.prune.groups import INITIALIZER, ChannelGroup, Member

_MOST_BLOCKS = 64  # of one set of layers; channels that are coupled in another order make very many
_MOST_RUNS = 8  # of one group in one reader, else its places are listed


def classes_of(coupling: Coupling) -> Tensor:
    """For each id the smallest id of its channel."""
    parent = torch.arange(coupling.size)
    if not coupling.edges:
        return parent
    one, two = (torch.cat([edge[side] for edge in coupling.edges]) for side in (0, 1))
    while True:
        a, b = parent[one], parent[two]
        if torch.equal(a, b):
            return parent
        low = torch.minimum(a, b)
        parent = parent.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        jumped = parent[parent]
        while not torch.equal(jumped, parent):
            parent, jumped = jumped, jumped[jumped]


class Grouping:
    """The groups in the order in which their first producer ran, and in which of them each channel lies.

    `is_covered`: whether a source is cut with a producer or reader, so that it needs no member of its own.
    """

    def __init__(self, coupling: Coupling, is_covered: Callable[[Source], bool]) -> None:
        self.groups: list[ChannelGroup] = []
        self.classes = classes_of(coupling)
        self._group_of = torch.full((coupling.size,), -1)
        self._place_of = torch.full((coupling.size,), -1)
        self._merge(coupling)
        reasons = self._reasons(coupling)
        families = [layers for layers in coupling.families if layers.root is layers]
        found: list[tuple[CoupledLayers, range]] = []
        for layers in families:
            first = len(self.groups)
            self._split(layers, reasons, [reason for _, reason in coupling.frozen])
            found.append((layers, range(first, len(self.groups))))
        for layers, numbers in found:
            self._add(layers.producers, numbers, lambda group: group.producers)
            self._add(layers.reads, numbers, lambda group: group.consumers)
        others = [read for read in coupling.unclaimed if bool((self._group_of[self.classes[read.ids]] >= 0).any())]
        others += [
            Read(source.name, INITIALIZER, ids, axis=source.axis)
            for source, ids in coupling.sources.items()
            if not is_covered(source)
        ]
        self._add(others, range(len(self.groups)), lambda group: group.consumers)
        self._balance(coupling)

    def _merge(self, coupling: Coupling) -> None:
        """Layers whose channels became one through parameters alone belong together too."""
        owner = torch.full((coupling.size,), -1)
        for number, layers in enumerate(coupling.families):
            for producer in layers.producers if layers.root is layers else ():
                channels = self.classes[producer.ids]
                for other in first_seen(owner[channels]).tolist():
                    if other >= 0:
                        coupling.families[other].absorb(layers)
                owner[channels] = torch.where(owner[channels] < 0, number, owner[channels])

    def _reasons(self, coupling: Coupling) -> Tensor:
        """For each channel the number of its first reason to stay; the number of reasons where it has none."""
        result = torch.full((coupling.size,), len(coupling.frozen))
        for number, (ids, _) in reversed(list(enumerate(coupling.frozen))):
            result[self.classes[ids]] = number
        result[0] = len(coupling.frozen)
        return result

    def _split(self, layers: CoupledLayers, reasons: Tensor, texts: list[str]) -> None:
        """One group for each block of channels that follow each other in all producers."""
        channels = torch.cat([self.classes[producer.ids] for producer in layers.producers])
        order = first_seen(channels)
        number = torch.full((len(self.classes),), -1)
        number[order] = torch.arange(len(order))
        cuts = {0, len(order)}
        for producer in layers.producers:
            sequence = number[self.classes[producer.ids]]
            step = sequence[1:] - sequence[:-1]
            breaks = ((step != 1) & (step != 0)).nonzero().flatten()
            cuts.update((sequence[breaks] + 1).tolist(), sequence[breaks + 1].tolist())
            cuts.update((int(sequence[0]), int(sequence[-1]) + 1))
        edges = sorted(cuts)
        why = ""
        if len(edges) > _MOST_BLOCKS + 1:
            names = ", ".join(dict.fromkeys(producer.name for producer in layers.producers))
            why, edges = f"the channels of {names} are coupled in another order", [0, len(order)]
        for begin, end in pairwise(edges):
            block = order[begin:end]
            first = int(reasons[block].min())
            self._group_of[block], self._place_of[block] = len(self.groups), torch.arange(end - begin)
            self.groups.append(
                ChannelGroup(end - begin, [], why_frozen=why or (texts[first] if first < len(texts) else ""))
            )

    def _add(self, reads: list[Read], numbers: range, side: Callable[[ChannelGroup], list[Member]]) -> None:
        for read in reads:
            channels = self.classes[read.ids]
            group_of = self._group_of[channels]
            for number in first_seen(group_of).tolist():
                if number in numbers:
                    group = self.groups[number]
                    places = torch.where(group_of == number, self._place_of[channels], -1)
                    side(group).extend(_members(read, places, group.count))

    def _balance(self, coupling: Coupling) -> None:
        """Turn demands for equal numbers into cells, or keep the channels where no cells can meet them."""
        demands = []
        for rows, where, strict in coupling.balanced:
            channels = self.classes[rows]
            numbers = [number for number in self._group_of[channels].unique().tolist() if number >= 0]
            if numbers:
                demands.append((channels, where, numbers, strict))
        stays = True
        while stays:
            stays = False
            for demand in list(demands):
                channels, where, numbers, strict = demand
                open_groups = [self.groups[number] for number in numbers if not self.groups[number].why_frozen]
                if open_groups and not self._equal_rows(channels):
                    if not strict:
                        demands = [other for other in demands if other is not demand]
                        continue
                    stays = True
                    for group in open_groups:
                        group.why_frozen = f"{where} needs equally many of the channels in each of its parts"
        for numbers in _united([demand[2] for demand in demands], len(self.groups)):
            groups = [self.groups[number] for number in numbers]
            if any(group.why_frozen for group in groups):
                continue
            columns = [self._rows_of(channels, groups, numbers) for channels, _, n, _ in demands if n[0] in numbers]
            table = torch.stack(columns)
            cells = torch.unique(table, dim=1, return_inverse=True)[1]
            cells = torch.where((table < 0).all(0), -1, cells)
            cells = _renumbered(cells)
            for group, part in zip(groups, cells.split([group.count for group in groups]), strict=True):
                group.cells = part
                group.linked = groups if len(groups) > 1 else []

    def _equal_rows(self, channels: Tensor) -> bool:
        """Whether rows of channels can lose equally many places, if all lose the same share of their channels.

        As many places that may go in each; two rows share all channels or none; all have as many channels, or each has
        its channels equally often.
        """
        group_of = self._group_of[channels]
        may_go = torch.tensor([not group.why_frozen for group in self.groups] + [False])
        free = may_go[group_of]
        if len(free.sum(1).unique()) > 1:
            return False
        rows = torch.where(free, channels, 0).sort(1).values.unique(dim=0)
        different = [row[row > 0].unique(return_counts=True) for row in rows]
        together = torch.cat([channels for channels, _ in different])
        alike = len({len(channels) for channels, _ in different}) == 1
        alike = alike or all(len(times.unique()) <= 1 for _, times in different)
        return alike and len(together) == len(together.unique())

    def _rows_of(self, channels: Tensor, groups: list[ChannelGroup], numbers: list[int]) -> Tensor:
        """The row of each channel of some groups, one after another; -1 for none."""
        result = [torch.full((group.count,), -1) for group in groups]
        group_of, place_of = self._group_of[channels], self._place_of[channels]
        for row, (owners, places) in enumerate(zip(group_of, place_of, strict=True)):
            for part, number in zip(result, numbers, strict=True):
                part[places[owners == number]] = row
        return torch.cat(result)


def _renumbered(cells: Tensor) -> Tensor:
    """Cells numbered from 0 in order of their first channel; -1 stays."""
    result = torch.full_like(cells, -1)
    for number, cell in enumerate(cell for cell in first_seen(cells).tolist() if cell >= 0):
        result[cells == cell] = number
    return result


def _united(sets: list[list[int]], count: int) -> list[list[int]]:
    """Sets of numbers that overlap, united; ascending."""
    root = list(range(count))

    def find(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    for numbers in sets:
        for other in numbers[1:]:
            low, high = sorted((find(numbers[0]), find(other)))
            root[high] = low
    united: dict[int, list[int]] = {}
    for number in sorted({number for numbers in sets for number in numbers}):
        united.setdefault(find(number), []).append(number)
    return list(united.values())


def _members(read: Read, places: Tensor, count: int) -> list[Member]:
    """The members of a group in a node: one for each run of its channels, or one that lists their places."""
    member = Member(read.name, read.type, group=read.group, axis=read.axis)
    here = places >= 0
    before = torch.cat([torch.tensor([-1]), places[:-1]])
    begins = ((places == 0) & (before != 0)).nonzero().flatten().tolist()
    runs, covered = [], 0
    for begin in begins:
        rest = (places[begin:] != 0).nonzero()
        repeat = int(rest[0]) if len(rest) else len(places) - begin
        expected = torch.arange(count).repeat_interleave(repeat)
        if torch.equal(places[begin : begin + len(expected)], expected):
            runs.append(replace(member, begin=begin, repeat=repeat))
            covered += len(expected)
    if covered == int(here.sum()) and len(runs) <= _MOST_RUNS:
        return runs
    indices = here.nonzero().flatten()
    pairs = tuple(zip(places[indices].tolist(), indices.tolist(), strict=True))
    return [replace(member, begin=int(indices[0]), end=int(indices[-1]) + 1, places=pairs)]
