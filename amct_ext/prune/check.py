"""Checks of channel records from a file against a model, before anything is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from amct_ext.common.layer_kinds import BATCH_NORMS, computed_parameter, is_depthwise, layer_type
from amct_ext.errors import RecordError
from amct_ext.prune.removal import LAYER_OPERATORS
from amct_ext.record.types import ChannelRecord, PruneNode

_OPERATORS = {
    "Conv2d": ("Conv",),
    "Linear": ("Gemm", "MatMul"),
    "ConvTranspose2d": ("ConvTranspose",),
    **dict.fromkeys(BATCH_NORMS, ("BatchNormalization",)),
}


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
            module = _module(modules, node, where)
            if layer_type(module) not in ("Conv2d", "Linear") or is_depthwise(module):
                raise RecordError(f"{where}: {node.name} is a {_kind(module)}: only Conv2d and Linear can be producers")
            if produced.setdefault(node.name, number) != number:
                raise RecordError(f"{where}: {node.name} is a producer of prune_record {produced[node.name]} already")
            _check_range(node, _channels(module, "out"), where)
            if node.end - node.begin != _channels(module, "out"):
                raise RecordError(
                    f"{where}: {node.name} has {_channels(module, 'out')} output channels, of which the record knows "
                    f"only {node.begin}..{node.end}: it belongs to another model"
                )
            if node.prune_index != first.prune_index or node.end != first.end:
                raise RecordError(f"{where}: {node.name} and {first.name} are coupled but lose different channels")
            if len(node.prune_index) >= node.end - node.begin:
                raise RecordError(f"{where}: {node.name} would lose all its channels; at least one has to stay")
            _check_blocks(module, node, "out", where)
        for node in record.consumers:
            if node.type in LAYER_OPERATORS:
                module = _module(modules, node, where)
                _check_range(node, _channels(module, "in"), where)
                _check_share(node, first, where)
                _check_blocks(module, node, "in", where)


def _module(modules: dict[str, nn.Module], node: PruneNode, where: str) -> nn.Module:
    module = modules.get(node.name)
    if module is None:
        raise RecordError(f"{where}: the model has no layer {node.name}: the record belongs to another model")
    operators = _OPERATORS.get(str(layer_type(module)), ())
    if node.type not in operators:
        wanted = " or ".join(operators) or "none that channels can be removed from"
        raise RecordError(f"{where}: type of {node.name} is {node.type}, but it is a {_kind(module)} ({wanted})")
    computed = computed_parameter(module)
    if computed:
        raise RecordError(f"{where}: the {computed} of {node.name} is computed (parametrisation or weight norm)")
    return module


def _kind(module: nn.Module) -> str:
    return layer_type(module) or type(module).__name__


def _channels(module: Any, side: str) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features if side == "out" else module.in_features
    if layer_type(module) in BATCH_NORMS:
        return int(module.num_features)
    return int(module.out_channels if side == "out" else module.in_channels)


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


def _check_blocks(module: nn.Module, node: PruneNode, side: str, where: str) -> None:
    groups = int(getattr(module, "groups", 1))
    if groups == 1 or is_depthwise(module):
        return
    size = _channels(module, side) // groups
    counts = [0] * groups
    for place in node.prune_index:
        counts[place // size] += 1
    if len(set(counts)) > 1:
        raise RecordError(f"{where}: the {groups} groups of {node.name} must lose equally many channels, not {counts}")
