"""Checks of channel records from a file against a model, before anything is removed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from amct_ext.common.layer_kinds import (
    FILTER_PRUNABLE,
    LayerKind,
    computed_parameter,
    is_depthwise,
    kind_of,
    layer_type,
)
from amct_ext.errors import RecordError
from amct_ext.prune.groups import INITIALIZER, ChannelGroup, Member
from amct_ext.prune.removal import LAYER_OPERATORS
from amct_ext.record.types import ChannelRecord, PruneNode


def check_records(model: nn.Module, records: Sequence[ChannelRecord], groups: Iterable[ChannelGroup] = ()) -> None:
    """Raise RecordError where a record does not fit the model or contradicts itself; consumers like Add are skipped.

    `groups`: those found in the model. Only they may hold a part of a layer's output channels.
    """
    modules = dict(model.named_modules())
    groups = tuple(groups)
    parts = {(m.name, m.begin, m.begin + group.count * m.repeat) for group in groups for m in group.producers}
    listed = {
        (group.producers[0].name, group.producers[0].begin, m.name, m.begin, m.end): m
        for group in groups
        for m in group.consumers
        if m.index_pairs
    }
    read: dict[str, set[int]] = {}
    produced: dict[str, list[tuple[int, int, int]]] = {}
    removed: dict[str, set[int]] = {}
    for number, record in enumerate(records, 1):
        if not record.producers:
            raise RecordError(f"prune_record {number} has no producer: it does not say whose channels are removed")
        first = record.producers[0]
        where = f"prune_record {number} (producer {first.name})"
        for node in record.producers:
            module, kind = _layer(modules, node, where)
            if not kind.filter_prunable or is_depthwise(module):
                wanted = ", ".join(FILTER_PRUNABLE)
                raise RecordError(f"{where}: {node.name} is a {kind.name}: only {wanted} can be producers")
            for before, begin, end in produced.setdefault(node.name, []):
                if node.begin < end and begin < node.end:
                    raise RecordError(f"{where}: {node.name} is a producer of prune_record {before} already")
            produced[node.name].append((number, node.begin, node.end))
            removed.setdefault(node.name, set()).update(node.prune_index)
            channels = int(getattr(module, kind.widths[1]))
            _check_range(node, channels, where)
            if node.end - node.begin != channels and (node.name, node.begin, node.end) not in parts:
                raise RecordError(
                    f"{where}: {node.name} has {channels} output channels, of which the record knows "
                    f"only {node.begin}..{node.end}: it belongs to another model"
                )
            width = node.end - node.begin
            relative = [[index - each.begin for index in each.prune_index] for each in (node, first)]
            if width == first.end - first.begin and relative[0] != relative[1]:
                raise RecordError(f"{where}: {node.name} and {first.name} are coupled but lose different channels")
            _check_share(node, first, where)
            if len(removed[node.name]) >= channels:
                raise RecordError(f"{where}: {node.name} would lose all its channels; at least one has to stay")
        for node in record.consumers:
            if node.type in LAYER_OPERATORS:
                module, kind = _layer(modules, node, where)
                channels = int(getattr(module, kind.widths[0]))
                _check_range(node, channels, where)
                read.setdefault(node.name, set()).update(node.prune_index)
            elif node.type == INITIALIZER:
                _check_initializer(model, node, where)
            else:
                continue
            member = listed.get((first.name, first.begin, node.name, node.begin, node.end))
            if member is None:
                _check_share(node, first, where)
            else:
                _check_places(node, first, member, where)
    for sides, side in ((removed, 1), (read, 0)):
        for name, indices in sides.items():
            _check_blocks(modules[name], name, indices, side)


def _layer(modules: dict[str, nn.Module], node: PruneNode, where: str) -> tuple[nn.Module, LayerKind]:
    module = modules.get(node.name)
    if module is None:
        raise RecordError(f"{where}: the model has no layer {node.name}: the record belongs to another model")
    kind = kind_of(module)
    operators = kind.onnx if kind is not None and kind.input_prunable else ()
    if kind is None or node.type not in operators:
        wanted = " or ".join(operators) or "none that channels can be removed from"
        name = layer_type(module) or type(module).__name__
        raise RecordError(f"{where}: type of {node.name} is {node.type}, but it is a {name} ({wanted})")
    computed = computed_parameter(module)
    if computed:
        raise RecordError(f"{where}: the {computed} of {node.name} is computed (parametrisation or weight norm)")
    return module, kind


def _check_range(node: PruneNode, channels: int, where: str) -> None:
    if not 0 <= node.begin < node.end <= channels:
        raise RecordError(
            f"{where}: {node.name} has {channels} channels, the record speaks of {node.begin}..{node.end}: "
            "it belongs to another model"
        )
    outside = [index for index in node.prune_index if not node.begin <= index < node.end]
    if outside:
        raise RecordError(f"{where}: prune_index {outside[0]} of {node.name} lies outside {node.begin}..{node.end - 1}")
    if len(set(node.prune_index)) != len(node.prune_index):
        raise RecordError(f"{where}: prune_index of {node.name} names a channel twice")


def _check_share(node: PruneNode, producer: PruneNode, where: str) -> None:
    """A node loses the same share of its indices as the producer."""
    channels, indices = producer.end - producer.begin, node.end - node.begin
    if len(node.prune_index) * channels != len(producer.prune_index) * indices:
        raise RecordError(
            f"{where}: {node.name} loses {len(node.prune_index)} of {indices} channels, "
            f"{producer.name} {len(producer.prune_index)} of {channels}: that does not fit together"
        )


def _check_places(node: PruneNode, producer: PruneNode, member: Member, where: str) -> None:
    """A node that has the channels in another order, or a part of them, loses those of the producer."""
    wanted = member.indices(index - producer.begin for index in producer.prune_index)
    if tuple(node.prune_index) != wanted:
        raise RecordError(
            f"{where}: {node.name} loses {list(node.prune_index)}, but the channels of {producer.name} are its "
            f"{list(wanted)}"
        )


def _check_initializer(model: nn.Module, node: PruneNode, where: str) -> None:
    owner, _, key = node.name.rpartition(".")
    try:
        tensor = getattr(model.get_submodule(owner), key, None)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise RecordError(
            f"{where}: the model has no parameter or buffer {node.name}: the record belongs to another model"
        )
    axis = node.axis or 0
    if axis >= tensor.dim():
        raise RecordError(f"{where}: {node.name} has {tensor.dim()} axes, the record speaks of axis {axis}")
    _check_range(node, tensor.shape[axis], where)


def _check_blocks(module: nn.Module, name: str, indices: Collection[int], side: int) -> None:
    kind, groups = kind_of(module), int(getattr(module, "groups", 1))
    if kind is None or groups == 1 or is_depthwise(module):
        return
    size = int(getattr(module, kind.widths[side])) // groups
    counts = [0] * groups
    for index in indices:
        counts[index // size] += 1
    if len(set(counts)) > 1:
        raise RecordError(
            f"the {groups} groups of {name} must lose equally many channels, not {counts}: the record does not fit it"
        )
