"""What the ratio search and AMCT's plug-ins hand each other: layers with their cost, records with scores, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.errors import InputDataError, InvalidDataError, RecordError
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.prune.cost import LayerCost
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.selection import removal_count
from amct_ext.record.attributes import read_attribute, write_attribute
from amct_ext.record.text import channel_messages, read_channel

Sample = tuple[Inputs, Tensor]
PruneConfig = tuple[float, bool, float]  # compress_ratio, ascend_optimized, max_prune_ratio
_SCORES, _COST = "sensitivity", "bitops"
_INDEX_PAIRS = "channel_index_pairs"  # channel, index, channel, index, ... of a node that has them in another order


@dataclass(frozen=True)
class SearchNode:
    """A layer that ran: its qualified name and its ONNX operator."""

    name: str
    type: str


@dataclass(frozen=True)
class SearchGraph:
    """The float model of a search, a copy in eval mode, and its layers in execution order."""

    model: nn.Module
    nodes: tuple[SearchNode, ...]


def split_samples(model: nn.Module, input_data: Any, wanted: int) -> list[Sample]:
    """The first `wanted` samples of [data, label], one by one. Errors: InputDataError."""
    if len(input_data) != 2:
        raise InputDataError(f"input_data must be [data, label], not a list of {len(input_data)}")
    data, label = input_data
    inputs = parse_inputs(model, data)
    tensors = inputs.tensors()
    if not all(isinstance(item, Tensor) and item.dim() > 0 for item in (*tensors, label)):
        raise InputDataError("input_data must hold tensors with samples along axis 0: [data, label]")
    have = min(len(item) for item in (*tensors, label))
    if have < wanted:
        raise InputDataError(f"test_iteration is {wanted}, but input_data holds {have} sample(s)")
    return [(take_samples(inputs, slice(i, i + 1)), label[i : i + 1]) for i in range(wanted)]


def take_samples(inputs: Inputs, samples: slice) -> Inputs:
    """Some of the samples along axis 0 of every tensor."""
    return inputs.map(lambda item: item[samples])


def graph_info(works: Mapping[str, LayerCost]) -> dict[str, dict[str, Any]]:
    """AMCT's table of layers. "work" is an entry of ours: the `LayerCost` for exact costs."""
    return {
        name: {"cin": work.inputs, "cout": work.outputs, "ori_cout": work.outputs, _COST: work.original, "work": work}
        for name, work in works.items()
    }


def search_records(groups: Sequence[ChannelGroup]) -> Any:
    """AMCT's messages of the groups, no channel removed yet."""
    messages = channel_messages(group.record(()) for group in groups)
    for message, group in zip(messages, groups, strict=True):
        nodes, members = [*message.producer, *message.consumer], [*group.producers, *group.consumers]
        for node, member in zip(nodes, members, strict=True):
            if member.index_pairs:
                write_attribute(node, _INDEX_PAIRS, "INTS", [number for pair in member.index_pairs for number in pair])
    return messages


def read_group(record: Any) -> ChannelGroup:
    """The group of a message of `search_records`."""
    group = ChannelGroup.of(read_channel(record))
    for nodes, members in ((record.producer, group.producers), (record.consumer, group.consumers)):
        for number, node in enumerate(nodes):
            numbers = read_attribute(node, _INDEX_PAIRS, "INTS", lambda: "search_records")
            if numbers:
                pairs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
                members[number] = replace(members[number], index_pairs=pairs, end=max(numbers[1::2]) + 1)
    return group


def write_scores(record: Any, scores: Tensor) -> None:
    """Store a score per channel in a record."""
    write_attribute(record.producer[0], _SCORES, "FLOATS", scores.tolist())


def read_scores(record: Any, group: ChannelGroup) -> Tensor:
    """The scores in a record. Errors: ValueError (none, or another number), InvalidDataError (NaN or Inf)."""
    first = record.producer[0]
    try:
        values = read_attribute(first, _SCORES, "FLOATS", lambda: "search_records")
    except RecordError as error:
        raise ValueError(f"the sensitivity must be a list of floats: {error}") from error
    if values is None or len(values) != group.count:
        found = "none" if values is None else len(values)
        raise ValueError(
            f"the sensitivity of {first.name}: get_sensitivity must write {group.count} scores, one per channel, as "
            f"attribute '{_SCORES}' (FLOATS) of each record's first producer; it wrote {found}"
        )
    scores = torch.tensor(list(values))
    if not bool(torch.isfinite(scores).all()):
        raise InvalidDataError(f"the sensitivity of {first.name} holds NaN or Inf: check weights and data")
    return scores


def write_costs(info: Mapping[str, Mapping[str, Any]], records: Any) -> None:
    """Store in each record how many bit operations one of its channels takes at the present widths."""
    for record in records:
        group = read_group(record)
        cost = sum(info[m.name][_COST] / info[m.name]["cout"] for m in group.producers if m.name in info)
        cost += sum(
            m.per_channel(group.count) * info[m.name][_COST] / info[m.name]["cin"]
            for m in group.consumers
            if m.name in info
        )
        write_attribute(record.producer[0], _COST, "FLOAT", cost)


def update_graph_info(lost: Mapping[int, int], info: dict[str, dict[str, Any]], records: Any) -> None:
    """Narrow the layers of `info` by the channels that records lost (record number -> count), costs in proportion."""
    for index, count in lost.items():
        group = read_group(records[index])
        sides = [(member, "cout", "already_removed_outputs") for member in group.producers]
        sides += [(member, "cin", "already_removed_inputs") for member in group.consumers]
        for member, side, given in sides:
            entry = info.get(member.name)
            if entry is None:
                continue
            fewer = round(count * member.per_channel(group.count))
            entry[_COST] *= (entry[side] - fewer) / entry[side]
            entry[side] -= fewer
            if "work" in entry:
                entry["work"] = replace(entry["work"], **{given: getattr(entry["work"], given) + fewer})
    write_costs(info, records)


def removable(group: ChannelGroup, ascend_optimized: bool, max_prune_ratio: float) -> tuple[int, ...]:
    """How many channels may be removed, ascending from 0: only counts that create reproduces from their ratio."""
    n, num_subgroups = group.count, group.num_equal_subgroups or 1
    fewest = n * (1 - max_prune_ratio) - 1e-6 * n
    return 0, *(
        count
        for count in range(1, n)
        if n - count >= fewest and removal_count(n, count / n, ascend_optimized, num_subgroups) == count
    )
