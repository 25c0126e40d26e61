"""Channel pruning: from a plan to records, and from records to a smaller model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
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
from amct_ext.prune.discovery import Discovery
from amct_ext.prune.gate_taylor import PruningLoss, gate_taylor
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.removal import Removal
from amct_ext.prune.rescale import changed_factors
from amct_ext.prune.selection import measure_of, select_channels
from amct_ext.prune.sizes import changed_attributes
from amct_ext.prune.trial import Difference, Fitted, largest_error, parting, run_fitted, run_masked, run_pruned
from amct_ext.record.types import ChannelRecord

_logger = logging.getLogger("amct_ext")

_LARGEST_ERROR = 1e-3  # of outputs, relative; rounding in deep networks stays well below
_LARGEST_ROUNDING = 8  # the same in units of the outputs' precision, for half and bfloat16

_UNLIKE = Difference(None, "it computes something else without them")


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
    chosen: dict[ChannelGroup, tuple[int, ...]] = {}
    for group in found.prunable:
        if group not in chosen:
            chosen |= select_channels(group, plan, model, scores)
    return tuple(group.record(chosen[group]) for group in found.prunable)


def apply_channels(
    model: nn.Module,
    found: Discovery,
    records: Sequence[ChannelRecord],
    input_data: Any,
    strict: bool = False,
) -> tuple[ChannelRecord, ...]:
    """Remove the records' channels from `model`, in place, and return the records that are in force.

    The smaller model is tried on `input_data`, in eval mode and, where the whole model could do that, in train mode. It
    must run, and compute what the whole model does when readers ignore the removed channels and statistics leave them
    out. Records that break this are dropped with a warning. With `strict` (records of a file) that is an error, as is a
    record that does not fit the model: RecordError, and the model stays whole.
    """
    if strict:
        check_records(model, records, found.groups)
    if not any(node.prune_index for record in records for node in record.producers):
        return tuple(records)
    trial = _Trial(model, found, records, parse_inputs(model, input_data))
    dropped: dict[int, str] = {}
    wanted = set(range(len(records)))
    while wanted:
        failure = trial(wanted)
        if failure is None:
            break
        if strict:
            (first,) = trial.culprits(wanted)
            raise RecordError(
                f"prune_record {first + 1} (producer {records[first].producers[0].name}) does not fit the model: "
                f"{failure.reason}"
            )
        blamed = set(_records_of(failure.node, trial, wanted)) if failure.node is not None else set()
        blamed = trial.with_linked(blamed or trial.culprits(wanted)) & wanted
        dropped |= dict.fromkeys(blamed, failure.reason)
        wanted -= blamed
    for index, reason in sorted(dropped.items()):
        for node in records[index].producers:
            _logger.warning("%s is not pruned: the pruned model would fail or differ: %s", node.name, reason)
    return tuple(records[index] for index in sorted(wanted))


def removal_of(model: nn.Module, found: Discovery, records: Sequence[ChannelRecord], gone: Tensor) -> Removal:
    """What removes some records' channels, `gone`, from the whole model, and adapts what depends on their number."""
    return Removal(model, records, changed_attributes(model, found, gone), changed_factors(found, gone))


def _records_of(node: Node, trial: _Trial, wanted: Collection[int]) -> list[int]:
    """The records whose channels a node works on."""
    for values in (node.inputs, node.outputs):
        ids = [item.ids.flatten() for value in values if value for item in trial.found.maps.get(value, ())]
        touched = set(trial.found.classes[torch.cat(ids)].unique().tolist()) if ids else set()
        blamed = [index for index in wanted if touched & trial.channels[index]]
        if blamed:
            return blamed
    return []


class _Trial:
    """Removes some of the records' channels from a model, which stays cut where nothing is wrong with it."""

    def __init__(self, model: nn.Module, found: Discovery, records: Sequence[ChannelRecord], inputs: Inputs) -> None:
        self.found = found
        self._model, self._records, self._inputs = model, records, inputs
        self.channels = [
            set(found.classes[found.removed([record], model).nonzero().flatten()].tolist()) for record in records
        ]
        self._whole_in_training: list[int] | Exception | None = None  # dimensions of the outputs, once they are asked

    def __call__(self, wanted: Collection[int]) -> Difference | None:
        """What is wrong without the channels of some records, and then the model is whole again; None for nothing."""
        return self._attempt(wanted, stays=True)

    def _attempt(self, wanted: Collection[int], stays: bool) -> Difference | None:
        """What is wrong without some channels. The model stays cut where nothing is and `stays`."""
        records = [self._records[index] for index in sorted(wanted)]
        gone = self.found.removed(records, self._model)
        removal = removal_of(self._model, self.found, records, gone)
        failed = removal.apply()
        fitted = Fitted([], Difference(None, failed))
        if not failed:
            fitted = run_fitted(self._model, self._inputs, self.found, gone, removal)
        difference = fitted.difference or self._compare(gone, removal, fitted.outputs)
        if difference is _UNLIKE and stays:
            pruned = run_pruned(self._model, self._inputs, self.found, gone, sums=True)[0]
            removal.undo()
            masked = run_masked(self._model, self._inputs, self.found, gone, sums=True)[0]
            return parting(pruned, masked, fitted.scaled)
        if difference is not None or not stays:
            removal.undo()
        return difference

    def _compare(self, gone: Tensor, removal: Removal, outputs: list[Tensor]) -> Difference | None:
        difference = self._compare_in_training([tensor.dim() for tensor in outputs], removal)
        if difference is not None:
            return difference
        removal.undo()
        try:
            masked, wanted = run_masked(self._model, self._inputs, self.found, gone)
        except Exception as error:
            _logger.debug("no comparison with the whole model: %s", error)
            return None
        finally:
            removal.apply()
        if not masked.is_comparable():
            _logger.debug("no comparison with the whole model: its forwards differ (a cache, or random numbers)")
            return None
        return _UNLIKE if largest_error(outputs, wanted) > _tolerance(outputs) else None

    def _compare_in_training(self, evaluated: list[int], removal: Removal) -> Difference | None:
        """Heads that only run in training read channels that an eval forward does not show."""
        got = self._train()
        if got == evaluated:
            return None
        if self._whole_in_training is None:
            removal.undo()
            self._whole_in_training = self._train()
            removal.apply()
        whole = self._whole_in_training
        if isinstance(whole, Exception):  # one image and BatchNorm on a single pixel, say: the eval forward decides
            _logger.debug("no trial in train mode: %s", whole)
            return None
        if isinstance(got, Exception):
            return Difference(None, f"in train mode: {type(got).__name__}: {got}")
        return None if got == whole else Difference(None, f"its outputs would have {got} dimensions instead of {whole}")

    def _train(self) -> list[int] | Exception:
        """Dimensions of the outputs in train mode, or what went wrong."""
        try:
            with preserved_state(self._model, training=True), torch.no_grad():
                return [tensor.dim() for tensor in tensors_in(self._inputs.copied().call(self._model))]
        except Exception as error:
            return error

    def culprits(self, wanted: Collection[int]) -> set[int]:
        """A record without which those before it do no harm; found by halving."""
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
        """Whether the model fails without these records' channels; it is whole afterwards."""
        return self._attempt(self.with_linked(set(wanted)), stays=False) is not None

    def with_linked(self, indices: set[int]) -> set[int]:
        """Records and those whose groups must lose channels with theirs."""
        keys = {_key(record): index for index, record in enumerate(self._records)}
        result = set(indices)
        for group in self.found.groups:
            linked = {keys[key] for each in group.linked if (key := _key(each.record(()))) in keys}
            if linked & result:
                result |= linked
        return result


def _tolerance(outputs: list[Tensor]) -> float:
    precisions = [torch.finfo(tensor.dtype).eps for tensor in outputs if tensor.is_floating_point()]
    return max(_LARGEST_ERROR, _LARGEST_ROUNDING * max(precisions, default=0))


def _key(record: ChannelRecord) -> tuple[str, int, int]:
    first = record.producers[0]
    return first.name, first.begin, first.end
