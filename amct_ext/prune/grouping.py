"""Builds channel groups from the coupling: maximal runs in the same order in all producers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from amct_ext.prune.coupling import AxisUse, CoupledLayers, Coupling, ParameterAxis, first_seen
from amct_ext.prune.groups import INITIALIZER, ChannelGroup, Member

_MAX_GROUPS = 64  # of one set of coupled layers; channels coupled in another order would make very many
_MAX_RUNS = 8  # of one group in one consumer; with more, it gets index pairs, which producers cannot have


def channel_labels(coupling: Coupling) -> Tensor:
    """For each id the smallest id of its channel (union-find by label propagation)."""
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
    """The groups in the order in which their first producer ran, and the group of each channel.

    `is_covered`: whether an axis is cut with a producer or consumer, so that it needs no member of its own.
    """

    def __init__(self, coupling: Coupling, is_covered: Callable[[ParameterAxis], bool]) -> None:
        self.groups: list[ChannelGroup] = []
        self.channel_of = channel_labels(coupling)
        self._group_of = torch.full((coupling.size,), -1)
        self._position_in_group = torch.full((coupling.size,), -1)
        self._merge(coupling)
        reasons = self._reasons(coupling)
        coupled_layers = [layers for layers in coupling.coupled_layers if layers.root is layers]
        found: list[tuple[CoupledLayers, range]] = []
        for layers in coupled_layers:
            first = len(self.groups)
            self._split(layers, reasons, [reason for _, reason in coupling.frozen])
            found.append((layers, range(first, len(self.groups))))
        for layers, numbers in found:
            self._add(layers.producers, numbers, lambda group: group.producers, most_runs=sys.maxsize)
            self._add(layers.consumers, numbers, lambda group: group.consumers)
        others = [use for use in coupling.unclaimed if bool((self._group_of[self.channel_of[use.ids]] >= 0).any())]
        others += [
            AxisUse(source.name, INITIALIZER, ids, axis=source.axis)
            for source, ids in coupling.axis_ids.items()
            if not is_covered(source)
        ]
        self._add(others, range(len(self.groups)), lambda group: group.consumers)
        self._assign_subgroups(coupling)

    def _merge(self, coupling: Coupling) -> None:
        """Also merge layers that are coupled only through a shared parameter."""
        owner = torch.full((coupling.size,), -1)
        for number, layers in enumerate(coupling.coupled_layers):
            for producer in layers.producers if layers.root is layers else ():
                channels = self.channel_of[producer.ids]
                for other in first_seen(owner[channels]).tolist():
                    if other >= 0:
                        coupling.coupled_layers[other].absorb(layers)
                owner[channels] = torch.where(owner[channels] < 0, number, owner[channels])

    def _reasons(self, coupling: Coupling) -> Tensor:
        """For each channel the number of its first reason to stay; the number of reasons where it has none."""
        result = torch.full((coupling.size,), len(coupling.frozen))
        for number, (ids, _) in reversed(list(enumerate(coupling.frozen))):
            result[self.channel_of[ids]] = number
        result[0] = len(coupling.frozen)
        return result

    def _split(self, layers: CoupledLayers, reasons: Tensor, texts: list[str]) -> None:
        """One group for each run of channels that is contiguous in all producers."""
        channels = torch.cat([self.channel_of[producer.ids] for producer in layers.producers])
        order = first_seen(channels)
        number = torch.full((len(self.channel_of),), -1)
        number[order] = torch.arange(len(order))
        boundaries = {0, len(order)}
        for producer in layers.producers:
            sequence = number[self.channel_of[producer.ids]]
            step = sequence[1:] - sequence[:-1]
            breaks = ((step != 1) & (step != 0)).nonzero().flatten()
            boundaries.update((sequence[breaks] + 1).tolist(), sequence[breaks + 1].tolist())
            boundaries.update((int(sequence[0]), int(sequence[-1]) + 1))
        edges = sorted(boundaries)
        why = ""
        if len(edges) > _MAX_GROUPS + 1:
            names = ", ".join(dict.fromkeys(producer.name for producer in layers.producers))
            why, edges = f"the channels of {names} are coupled in another order", [0, len(order)]
        for begin, end in pairwise(edges):
            run = order[begin:end]
            first = int(reasons[run].min())
            self._group_of[run], self._position_in_group[run] = len(self.groups), torch.arange(end - begin)
            self.groups.append(
                ChannelGroup(end - begin, [], frozen_reason=why or (texts[first] if first < len(texts) else ""))
            )

    def _add(
        self,
        uses: list[AxisUse],
        numbers: range,
        side: Callable[[ChannelGroup], list[Member]],
        most_runs: int = _MAX_RUNS,
    ) -> None:
        for use in uses:
            channels = self.channel_of[use.ids]
            group_of = self._group_of[channels]
            for number in first_seen(group_of).tolist():
                if number in numbers:
                    group = self.groups[number]
                    positions = torch.where(group_of == number, self._position_in_group[channels], -1)
                    side(group).extend(_members(use, positions, group.count, most_runs))

    def _assign_subgroups(self, coupling: Coupling) -> None:
        """Assign subgroup numbers that satisfy all equal removals; freeze groups for which none exist."""
        equal_removals = []
        for rows, where, strict in coupling.equal_removals:
            channels = self.channel_of[rows]
            numbers = [number for number in self._group_of[channels].unique().tolist() if number >= 0]
            if numbers:
                equal_removals.append((channels, where, numbers, strict))
        stays = True
        while stays:
            stays = False
            for equal_removal in list(equal_removals):
                channels, where, numbers, strict = equal_removal
                open_groups = [self.groups[number] for number in numbers if not self.groups[number].frozen_reason]
                if open_groups and not (self._equal_rows(channels) or self._equal_shares(channels)):
                    if not strict:
                        equal_removals = [other for other in equal_removals if other is not equal_removal]
                        continue
                    stays = True
                    for group in open_groups:
                        group.frozen_reason = f"{where} needs equally many of the channels in each of its parts"
        for numbers in _merged_sets([equal_removal[2] for equal_removal in equal_removals], len(self.groups)):
            groups = [self.groups[number] for number in numbers]
            if any(group.frozen_reason for group in groups):
                continue
            inside = [channels for channels, _, own, _ in equal_removals if own[0] in numbers]
            table = torch.stack([self._part_of_each_channel(channels, groups, numbers) for channels in inside])
            subgroups = torch.unique(table, dim=1, return_inverse=True)[1]
            subgroups = torch.where((table < 0).all(0), -1, subgroups)
            subgroups = _renumbered(subgroups)
            for group, part in zip(groups, subgroups.split([group.count for group in groups]), strict=True):
                group.subgroups = part
                group.tied_groups = groups if len(groups) > 1 else []

    def _equal_rows(self, channels: Tensor) -> bool:
        """Whether rows of channels can lose equally many positions, if all lose the same share of their channels.

        Each row has as many removable positions; two rows share all channels or none; all have as many channels, or
        each has its channels equally often.
        """
        rows = self._removable(channels)
        if rows is None:
            return False
        different = [row[row > 0].unique(return_counts=True) for row in rows]
        together = torch.cat([channels for channels, _ in different])
        equal = len({len(channels) for channels, _ in different}) == 1
        equal = equal or all(len(times.unique()) <= 1 for _, times in different)
        return equal and len(together) == len(together.unique())

    def _removable(self, channels: Tensor) -> Tensor | None:
        """The different rows, 0 for channels that stay; None where rows have more removable positions than others."""
        may_go = torch.tensor([not group.frozen_reason for group in self.groups] + [False])
        free = may_go[self._group_of[channels]]
        if len(free.sum(1).unique()) > 1:
            return None
        rows: Tensor = torch.where(free, channels, 0).sort(1).values.unique(dim=0)
        return rows

    def _equal_shares(self, channels: Tensor) -> bool:
        """Whether rows lose equally many positions if all their parts (`_parts`) lose the same share, and some can.

        Heads of which a part is common to all (rotary embeddings of a part of the head), beside heads that are not.
        """
        rows = self._removable(channels)
        if rows is None:
            return False
        sizes = _parts(rows)[1].unique(return_counts=True)[1].tolist()
        return bool(sizes) and math.gcd(*sizes) > 1

    def _part_of_each_channel(self, channels: Tensor, groups: list[ChannelGroup], numbers: list[int]) -> Tensor:
        """The row of each channel of some groups, one after another, or the part of rows; -1 for none."""
        result = [torch.full((group.count,), -1) for group in groups]
        if not self._equal_rows(channels):
            rows = self._removable(channels)
            assert rows is not None  # asked of rows with equal shares
            for channel, part_number in zip(*_parts(rows), strict=True):
                part = result[numbers.index(int(self._group_of[channel]))]
                part[self._position_in_group[channel]] = part_number
            return torch.cat(result)
        group_of, position_in_group = self._group_of[channels], self._position_in_group[channels]
        for row, (owners, positions) in enumerate(zip(group_of, position_in_group, strict=True)):
            for part, number in zip(result, numbers, strict=True):
                part[positions[owners == number]] = row
        return torch.cat(result)


def _parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of rows, and the part that each belongs to: channels that all rows have equally often."""
    channels, places = rows.unique(return_inverse=True)
    times = torch.zeros(len(rows), len(channels), dtype=torch.int64)
    times.scatter_add_(1, places, torch.ones_like(places))
    parts = torch.unique(times, dim=1, return_inverse=True)[1]
    return channels[channels > 0], parts[channels > 0]


def _renumbered(subgroups: Tensor) -> Tensor:
    """Subgroups numbered from 0 in order of their first channel; -1 stays."""
    result = torch.full_like(subgroups, -1)
    for number, subgroup in enumerate(subgroup for subgroup in first_seen(subgroups).tolist() if subgroup >= 0):
        result[subgroups == subgroup] = number
    return result


def _merged_sets(sets: list[list[int]], count: int) -> list[list[int]]:
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


def _members(use: AxisUse, positions: Tensor, count: int, most_runs: int) -> list[Member]:
    """The members of a group in a node: one for each run of its channels, or one with index pairs."""
    member = Member(use.name, use.type, num_groups=use.num_groups, axis=use.axis)
    here = positions >= 0
    before = torch.cat([torch.tensor([-1]), positions[:-1]])
    begins = ((positions == 0) & (before != 0)).nonzero().flatten().tolist()
    runs, covered = [], 0
    for begin in begins:
        rest = (positions[begin:] != 0).nonzero()
        repeat = int(rest[0]) if len(rest) else len(positions) - begin
        expected = torch.arange(count).repeat_interleave(repeat)
        if torch.equal(positions[begin : begin + len(expected)], expected):
            runs.append(replace(member, begin=begin, repeat=repeat))
            covered += len(expected)
    if covered == int(here.sum()) and len(runs) <= most_runs:
        return runs
    indices = here.nonzero().flatten()
    pairs = tuple(zip(positions[indices].tolist(), indices.tolist(), strict=True))
    return [replace(member, begin=int(indices[0]), end=int(indices[-1]) + 1, index_pairs=pairs)]
