"""Channel pruning: from a plan to records, and from records to a pruned model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amct_ext.common.references import copy_model
from amct_ext.config.plan import Plan
from amct_ext.errors import RecordError
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.run import in_mode, preserved_random_state, preserved_state, tensors_in
from amct_ext.graph.values import Node
from amct_ext.prune.check import check_records
from amct_ext.prune.discovery import Discovery, EqualRemoval
from amct_ext.prune.equivalence import (
    RescaledRun,
    first_divergence,
    largest_error,
    run_masked,
    run_pruned,
    run_rescaled,
    selects_by_value,
)
from amct_ext.prune.gate_taylor import PruningLoss, gate_taylor
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.reconcile import find_equal_removals, size_attributes
from amct_ext.prune.removal import Removal
from amct_ext.prune.rescale import changed_multipliers
from amct_ext.prune.runs import Difference
from amct_ext.prune.selection import measure_of, select_channels
from amct_ext.prune.sizes import changed_attributes
from amct_ext.record.types import ChannelRecord

_logger = logging.getLogger("amct_ext")

_LARGEST_ERROR = 1e-3  # of outputs, relative; rounding in deep networks stays well below
_LARGEST_ROUNDING = 8  # the same in units of the outputs' precision, for half and bfloat16

_OUTPUTS_DIFFER = Difference(None, "it computes something else without them")


def plan_channels(
    discovery: Discovery, plan: Plan, model: nn.Module, pruning_loss: PruningLoss | None = None
) -> tuple[ChannelRecord, ...]:
    """One record per prunable group of what `discover` found; prune_index is empty where rounding keeps all.

    `pruning_loss`: what GATE_TAYLOR measures; without it those groups are ranked by GROUP_L2. Nothing is changed.
    Errors: InvalidDataError where a weight cannot be ranked, InputDataError for the losses.
    """
    for name, reason in discovery.unpruned_reasons().items():
        _logger.info("%s is not pruned: %s", name, reason)
    measured = [group for group in discovery.prunable if measure_of(group, plan) == "GATE_TAYLOR"]
    scores: dict[ChannelGroup, Tensor] = {}
    if measured and pruning_loss is not None:
        copy = copy_model(model)  # whatever the callable does to it, `model` stays as it is
        with preserved_random_state(copy), in_mode(copy, training=False):
            scores = dict(zip(measured, gate_taylor(copy, measured, pruning_loss), strict=True))
    chosen: dict[ChannelGroup, tuple[int, ...]] = {}
    for group in discovery.prunable:
        if group not in chosen:
            chosen |= select_channels(group, plan, model, scores)
    return tuple(group.record(chosen[group]) for group in discovery.prunable)


def apply_channels(
    model: nn.Module,
    discovery: Discovery,
    records: Sequence[ChannelRecord],
    input_data: Any,
    strict: bool = False,
    choose: Callable[[Sequence[EqualRemoval]], tuple[Discovery, Sequence[ChannelRecord]]] | None = None,
) -> tuple[ChannelRecord, ...]:
    """Remove the records' channels from `model`, in place, and return the records that are in force.

    The pruned model runs on `input_data`, in eval mode and, where the unpruned model can, in train mode. Its outputs
    must equal those of the unpruned model in which removed channels have no influence. Records that fail are dropped
    with a warning. With `strict` (records of a file) a failure is an error, as is a record that does not fit the model:
    RecordError, and the model is not changed. `choose`: finds groups and chooses channels again where the forward takes
    one size for several of them, so that they must lose equally many.
    """
    if strict:
        check_records(model, records, discovery.groups)
    if not any(node.prune_index for record in records for node in record.producers):
        return tuple(records)
    check = _RemovalCheck(model, discovery, records, parse_inputs(model, input_data))
    equal_removals: list[EqualRemoval] = []
    dropped: dict[int, str] = {}
    wanted = set(range(len(records)))
    while wanted:
        failure = check(wanted)
        if failure is None:
            break
        if strict:
            (first,) = check.culprits(wanted)
            raise RecordError(
                f"prune_record {first + 1} (producer {records[first].producers[0].name}) does not fit the model: "
                f"{failure.reason}"
            )
        more = check.equal_removals(wanted, equal_removals) if choose is not None and not dropped else []
        if choose is not None and more:
            equal_removals += more
            discovery, records = choose(equal_removals)
            check = _RemovalCheck(model, discovery, records, check.inputs)
            wanted = set(range(len(records)))
            continue
        blamed = set(_records_of(failure.node, check, wanted)) if failure.node is not None else set()
        blamed = check.with_tied(blamed or check.culprits(wanted)) & wanted
        dropped |= dict.fromkeys(blamed, failure.reason)
        wanted -= blamed
    for index, reason in sorted(dropped.items()):
        for node in records[index].producers:
            _logger.warning("%s is not pruned: the pruned model would fail or differ: %s", node.name, reason)
    return tuple(records[index] for index in sorted(wanted))


def removal_of(
    model: nn.Module, discovery: Discovery, records: Sequence[ChannelRecord], removed_mask: Tensor
) -> Removal:
    """The removal of some records' channels, with the sizes and multipliers that depend on their number."""
    return Removal(
        model, records, changed_attributes(model, discovery, removed_mask), changed_multipliers(discovery, removed_mask)
    )


def _records_of(node: Node, check: _RemovalCheck, wanted: Collection[int]) -> list[int]:
    """The records whose channels a node works on."""
    for values in (node.inputs, node.outputs):
        ids = [item.ids.flatten() for value in values if value for item in check.discovery.maps.get(value, ())]
        touched = set(check.discovery.channel_of[torch.cat(ids)].unique().tolist()) if ids else set()
        blamed = [index for index in wanted if touched & check.channels[index]]
        if blamed:
            return blamed
    return []


class _RemovalCheck:
    """Removes some records' channels and compares the result with the unpruned model; leaves it pruned on success."""

    def __init__(
        self, model: nn.Module, discovery: Discovery, records: Sequence[ChannelRecord], inputs: Inputs
    ) -> None:
        self.discovery = discovery
        self._model, self._records, self.inputs = model, records, inputs
        self.channels = [
            set(discovery.channel_of[discovery.removed_mask([record], model).nonzero().flatten()].tolist())
            for record in records
        ]
        # Dimensions of the unpruned model's outputs in train mode, once they are needed.
        self._unpruned_in_training: list[int] | Exception | None = None

    def __call__(self, wanted: Collection[int]) -> Difference | None:
        """What is wrong without some records' channels, None for nothing; on failure the model is unpruned again."""
        return self._attempt(wanted, stays=True)

    def equal_removals(self, wanted: Collection[int], known: Collection[EqualRemoval]) -> list[EqualRemoval]:
        """What else must lose equally many channels for the forward to find the sizes that it takes."""
        records = [self._records[index] for index in sorted(wanted)]
        removed_mask = self.discovery.removed_mask(records, self._model)
        attributes, removal = (
            size_attributes(self._model),
            removal_of(self._model, self.discovery, records, removed_mask),
        )
        try:
            asked = (
                []
                if removal.apply()
                else find_equal_removals(self._model, self.inputs, self.discovery, removed_mask, attributes)
            )
        finally:
            removal.undo()
        return [each for each in asked if not any(torch.equal(each.rows, other.rows) for other in known)]

    def _attempt(self, wanted: Collection[int], stays: bool) -> Difference | None:
        """What is wrong without some channels, None for nothing: then, with `stays`, the model stays pruned."""
        records = [self._records[index] for index in sorted(wanted)]
        removed_mask = self.discovery.removed_mask(records, self._model)
        removal = removal_of(self._model, self.discovery, records, removed_mask)
        failed = removal.apply()
        rescaled = RescaledRun([], Difference(None, failed))
        if not failed:
            rescaled = run_rescaled(self._model, self.inputs, self.discovery, removed_mask, removal)
        difference = rescaled.difference or self._compare(removed_mask, removal, rescaled.outputs)
        if difference is _OUTPUTS_DIFFER and (stays or any(map(selects_by_value, self.discovery.graph.nodes))):
            pruned = run_pruned(self._model, self.inputs, self.discovery, removed_mask, sums=True)[0]
            removal.undo()
            masked = run_masked(self._model, self.inputs, self.discovery, removed_mask, sums=True)[0]
            difference = first_divergence(pruned, masked, rescaled.scaled)
            if difference.node is not None and selects_by_value(difference.node):
                difference = None  # rounding moved a value across a threshold (of a detector); up to there all is equal
            if difference is None and stays:
                removal.apply()
            return difference
        if difference is not None or not stays:
            removal.undo()
        return difference

    def _compare(self, removed_mask: Tensor, removal: Removal, outputs: list[Tensor]) -> Difference | None:
        difference = self._compare_in_training([tensor.dim() for tensor in outputs], removal)
        if difference is not None:
            return difference
        removal.undo()
        try:
            masked, wanted = run_masked(self._model, self.inputs, self.discovery, removed_mask)
        except Exception as error:
            _logger.debug("no comparison with the unpruned model: %s", error)
            return None
        finally:
            removal.apply()
        if not masked.is_comparable():
            _logger.debug("no comparison with the unpruned model: its forwards differ (a cache, or random numbers)")
            return None
        return _OUTPUTS_DIFFER if largest_error(outputs, wanted) > _tolerance(outputs) else None

    def _compare_in_training(self, evaluated: list[int], removal: Removal) -> Difference | None:
        """Also compares train mode: auxiliary heads may read removed channels."""
        got = self._train()
        if got == evaluated:
            return None
        if self._unpruned_in_training is None:
            removal.undo()
            self._unpruned_in_training = self._train()
            removal.apply()
        expected = self._unpruned_in_training
        if isinstance(expected, Exception):  # one image and BatchNorm on a single pixel, say: the eval forward decides
            _logger.debug("no comparison in train mode: %s", expected)
            return None
        if isinstance(got, Exception):
            return Difference(None, f"in train mode: {type(got).__name__}: {got}")
        if got == expected:
            return None
        return Difference(None, f"its outputs would have {got} dimensions instead of {expected}")

    def _train(self) -> list[int] | Exception:
        """Dimensions of the outputs in train mode, or what went wrong."""
        try:
            with preserved_state(self._model, training=True), torch.no_grad():
                return [tensor.dim() for tensor in tensors_in(self.inputs.copied().call(self._model))]
        except Exception as error:
            return error

    def culprits(self, wanted: Collection[int]) -> set[int]:
        """Bisect: the first record (in order) whose addition makes the comparison fail."""
        part = sorted(wanted)
        good: list[int] = []
        while len(part) > 1:
            half = part[: len(part) // 2]
            if self._fails([*good, *half]):
                part = half
            else:
                good += half
                part = part[len(half) :]
        return {part[0]}

    def _fails(self, wanted: Collection[int]) -> bool:
        """Whether the comparison fails without these records' channels; the model is unpruned afterwards."""
        return self._attempt(self.with_tied(set(wanted)), stays=False) is not None

    def with_tied(self, indices: set[int]) -> set[int]:
        """These records and those of tied groups."""
        keys = {_key(record): index for index, record in enumerate(self._records)}
        result = set(indices)
        for group in self.discovery.groups:
            tied = {keys[key] for each in group.tied_groups if (key := _key(each.record(()))) in keys}
            if tied & result:
                result |= tied
        return result


def _tolerance(outputs: list[Tensor]) -> float:
    precisions = [torch.finfo(tensor.dtype).eps for tensor in outputs if tensor.is_floating_point()]
    return max(_LARGEST_ERROR, _LARGEST_ROUNDING * max(precisions, default=0))


def _key(record: ChannelRecord) -> tuple[str, int, int]:
    first = record.producers[0]
    return first.name, first.begin, first.end
