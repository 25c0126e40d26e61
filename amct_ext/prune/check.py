"""Checks of channel records from a file against a model, before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from amct_ext.common.layer_kinds import (
    FILTER_PRUNABLE,
    LayerKind,
    computed_parameter,
    is_depthwise,
    kind_of,
    layer_type,
)
from amct_ext.errors import RecordError
from amct_ext.prune.removal import LAYER_OPERATORS
from amct_ext.record.types import ChannelRecord, PruneNode


def check_records(model: nn.Module, records: Sequence[ChannelRecord]) -> None:
    """Raise RecordError where a record does not fit the model or contradicts itself; consumers like Add are skipped."""
    modules = dict(model.named_modules())
    produced: dict[str, int] = {}
    for number, record in enumerate(records, 1):
        if not record.producers:
            raise RecordError(f"prune_record {number} has no producer: it does not say whose channels are removed")
        first = record.producers[0]
        where = f"prune_record {number} (producer {first.name})"
        for node in record.producers:
            module, kind = _layer(modules, node, where)
            if not kind.filter_prunable or is_depthwise(module):
                wanted = " and ".join(FILTER_PRUNABLE)
                raise RecordError(f"{where}: {node.name} is a {kind.name}: only {wanted} can be producers")
            if produced.setdefault(node.name, number) != number:
                raise RecordError(f"{where}: {node.name} is a producer of prune_record {produced[node.name]} already")
            channels = int(getattr(module, kind.widths[1]))
            _check_range(node, channels, where)
            if node.end - node.begin != channels:
                raise RecordError(
                    f"{where}: {node.name} has {channels} output channels, of which the record knows "
                    f"only {node.begin}..{node.end}: it belongs to another model"
                )
            if node.prune_index != first.prune_index or node.end != first.end:
                raise RecordError(f"{where}: {node.name} and {first.name} are coupled but lose different channels")
            if len(node.prune_index) >= node.end - node.begin:
                raise RecordError(f"{where}: {node.name} would lose all its channels; at least one has to stay")
            _check_blocks(module, node, channels, where)
        for node in record.consumers:
            if node.type in LAYER_OPERATORS:
                module, kind = _layer(modules, node, where)
                channels = int(getattr(module, kind.widths[0]))
                _check_range(node, channels, where)
                _check_share(node, first, where)
                _check_blocks(module, node, channels, where)


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
    outside = [place for place in node.prune_index if not node.begin <= place < node.end]
    if outside:
        raise RecordError(f"{where}: prune_index {outside[0]} of {node.name} lies outside {node.begin}..{node.end - 1}")
    if len(set(node.prune_index)) != len(node.prune_index):
        raise RecordError(f"{where}: prune_index of {node.name} names a channel twice")


def _check_share(node: PruneNode, producer: PruneNode, where: str) -> None:
    """A consumer loses as many places per channel as it has places per channel."""
    channels = producer.end - producer.begin
    repeat, rest = divmod(node.end - node.begin, channels)
    if rest or len(node.prune_index) != repeat * len(producer.prune_index):
        raise RecordError(
            f"{where}: {node.name} loses {len(node.prune_index)} of {node.end - node.begin} channels, "
            f"{producer.name} {len(producer.prune_index)} of {channels}: that does not fit together"
        )


def _check_blocks(module: nn.Module, node: PruneNode, channels: int, where: str) -> None:
    groups = int(getattr(module, "groups", 1))
    if groups == 1 or is_depthwise(module):
        return
    size = channels // groups
    counts = [0] * groups
    for place in node.prune_index:
        counts[place // size] += 1
    if len(set(counts)) > 1:
        raise RecordError(f"{where}: the {groups} groups of {node.name} must lose equally many channels, not {counts}")
