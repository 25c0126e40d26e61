"""Channel pruning: from a plan to records, and from records to a smaller model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.references import copy_model
from amct_ext.config.plan import Plan
from amct_ext.errors import RecordError
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.run import in_mode, preserved_random_state, preserved_state, tensors_in
from amct_ext.graph.trace import Graph
from amct_ext.prune.check import check_records
from amct_ext.prune.discover import Discovery
from amct_ext.prune.gate_taylor import PruningLoss, gate_taylor
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.removal import Removal
from amct_ext.prune.selection import measure_of, select_channels
from amct_ext.record.types import ChannelRecord

_logger = logging.getLogger("amct_ext")


def plan_channels(
    found: Discovery, plan: Plan, model: nn.Module, pruning_loss: PruningLoss | None = None
) -> tuple[ChannelRecord, ...]:
    """One record per prunable group of what `discover` found; prune_index is empty where rounding keeps all.

    `pruning_loss`: what GATE_TAYLOR measures; without it those groups are ranked by GROUP_L2. Nothing is changed.
    Errors: InvalidDataError where a weight cannot be ranked, InputDataError for the losses.
    """
    for name, reason in found.why_not().items():
        _logger.info("%s is not pruned: %s", name, reason)
    measured = [group for group in found.prunable if measure_of(group, plan) == "GATE_TAYLOR"]
    scores: dict[ChannelGroup, Tensor] = {}
    if measured and pruning_loss is not None:
        copy = copy_model(model)  # whatever the callable does to it, `model` stays as it is
        with preserved_random_state(copy), in_mode(copy, training=False):
            scores = dict(zip(measured, gate_taylor(copy, measured, pruning_loss), strict=True))
    return tuple(group.record(select_channels(group, plan, model, scores.get(group))) for group in found.prunable)


def apply_channels(
    model: nn.Module,
    graph: Graph,
    records: Sequence[ChannelRecord],
    input_data: Any,
    strict: bool = False,
) -> tuple[ChannelRecord, ...]:
    """Remove the records' channels from `model`, in place, and return the records that are in force.

    The smaller model is tried on `input_data`, in eval mode and, where the whole model could do that, in train mode;
    it must run and return as many tensors. A record that breaks it is found by halving and dropped with a warning. With
    `strict` (records of a file) that is an error, as is a record that does not fit the model: RecordError, and the
    model stays whole.
    """
    if strict:
        check_records(model, records)
    if not any(node.prune_index for record in records for node in record.producers):
        return tuple(records)
    trial = _Trial(model, graph, input_data)
    kept: list[int] = []
    dropped: dict[int, str] = {}
    current = _add(model, records, list(range(len(records))), kept, dropped, trial)
    if strict and dropped:
        if current is not None:
            current.undo()
        index, reason = min(dropped.items())
        first = records[index].producers[0].name
        raise RecordError(f"prune_record {index + 1} (producer {first}) does not fit the model: {reason}")
    for index, reason in sorted(dropped.items()):
        for node in records[index].producers:
            _logger.warning("%s is not pruned: the model would fail without its channels: %s", node.name, reason)
    return tuple(records[index] for index in sorted(kept))


def _add(
    model: nn.Module,
    records: Sequence[ChannelRecord],
    wanted: list[int],
    kept: list[int],
    dropped: dict[int, str],
    trial: Callable[[], str],
) -> Removal | None:
    """Bring the wanted records into force as far as the model stands it; returns what is in force at the end."""
    current: Removal | None = None
    pending = [wanted]
    while pending:
        part = pending.pop(0)
        if current is not None:
            current.undo()
        candidate = Removal(model, [records[index] for index in sorted(kept + part)])
        failure = candidate.apply() or trial()
        if not failure:
            kept.extend(part)
            current = candidate
            continue
        candidate.undo()
        if current is not None:
            current.apply()
        if len(part) == 1:
            dropped[part[0]] = failure
        else:
            middle = len(part) // 2
            pending[:0] = [part[:middle], part[middle:]]
    return current


class _Trial:
    """Runs the model and says what is wrong, '' for nothing."""

    def __init__(self, model: nn.Module, graph: Graph, input_data: Any) -> None:
        self._model = model
        self._inputs = parse_inputs(model, input_data)
        # Sizes are not compared: how many boxes a detector returns depends on the weights.
        self._dims = {False: [len(value.shape) for value in graph.outputs]}
        # Heads that only run in training read channels that an eval forward does not show; a model that cannot train on
        # this input (one image and BatchNorm on a single pixel) is judged by its eval forward alone.
        try:
            self._dims[True] = self._run(training=True)
        except Exception as error:
            _logger.debug("no trial in train mode: %s", error)

    def __call__(self) -> str:
        for training, dims in self._dims.items():
            try:
                got = self._run(training)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            if got != dims:
                return f"its outputs would have {got} dimensions instead of {dims}"
        return ""

    def _run(self, training: bool) -> list[int]:
        with preserved_state(self._model, training), torch.no_grad():
            return [tensor.dim() for tensor in tensors_in(self._inputs.copied().call(self._model))]
