"""`verify_pruning`: compares a pruned network with the unpruned one in which removed channels have no influence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.wrapping import unwrap
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune
from amct_ext.errors import ModelError
from amct_ext.flows.build import float_copy
from amct_ext.graph.double import InDouble
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.trace import trace
from amct_ext.model_surgery.session import session_of
from amct_ext.prune.channels import removal_of
from amct_ext.prune.check import check_records
from amct_ext.prune.equivalence import RescaledRun, largest_error, run_masked, run_rescaled
from amct_ext.prune.runs import Difference
from amct_ext.prune.walk import discover
from amct_ext.record.types import ChannelRecord

_logger = logging.getLogger("amct_ext")

_DOUBTFUL = 1e-5  # error from which on float64 decides


@dataclass(frozen=True)
class PruningComparison:
    """A pruned network beside the unpruned one in which the removed channels have no influence.

    error: max |difference| / max |output|, the largest over all outputs. Rounding alone gives about 1e-6; where
    it is more than 1e-5, both networks are run in float64, if they can, and it is the difference there.
    removed, channels: of the output channels of all layers that lose any. parameters_left: share.
    """

    error: float
    removed: int
    channels: int
    parameters_left: float

    def __str__(self) -> str:
        return (
            f"{self.removed} of {self.channels} channels removed, {self.parameters_left:.1%} of the parameters left; "
            f"outputs differ from the unpruned network's without these channels by {self.error:.1e} of the largest"
        )


@outside_inference_mode
def verify_pruning(original: nn.Module, pruned: nn.Module, input_data: Any) -> PruningComparison:
    """Compare a pruned network with the unpruned one in which the removed channels have no influence.

    ``original``: the float model that create or restore was given. ``pruned``: what it returned, trained since or not:
    its record says which channels are removed, and both networks are run with the weights of ``original``, in eval
    mode. In the unpruned one, layers read zeros in removed channels, and norms over channels take their statistics
    without them. Neither model is changed. Errors: ModelError (``pruned`` was not made by create or restore, or has
    other shapes than its record says; the forward draws random numbers for the channels), RecordError (the record does
    not fit ``original``), InputDataError.
    """
    inner = unwrap(pruned)
    records = session_of(inner).channel_records
    smaller, comparison = compare_records(original, records, input_data)
    shapes = {name: tuple(parameter.shape) for name, parameter in inner.named_parameters()}
    for name, parameter in smaller.named_parameters():
        if shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape):
            raise ModelError(
                f"{name} has shape {list(shapes[name])}, by the record it is {list(parameter.shape)}: was the model "
                "changed after create?"
            )
    return comparison


def compare_records(
    original: nn.Module, records: Sequence[ChannelRecord], input_data: Any
) -> tuple[nn.Module, PruningComparison]:
    """The copy of `original` without the records' channels, and how it compares. Errors: as of verify_pruning."""
    model = float_copy(original)
    inputs = parse_inputs(model, input_data)
    error = _removal_error(model, records, inputs)
    unpruned, left = (sum(parameter.numel() for parameter in each.parameters()) for each in (original, model))
    nodes = {(node.name, node.begin): node for record in records for node in record.producers if node.prune_index}
    removed = sum(len(node.prune_index) for node in nodes.values())
    channels = sum(node.end - node.begin for node in nodes.values())
    if error > _DOUBTFUL:
        error = _error_in_double(original, records, inputs, error)
    return model, PruningComparison(error, removed, channels, left / unpruned)


def _removal_error(model: nn.Module, records: Sequence[ChannelRecord], inputs: Inputs) -> float:
    """Remove the records' channels; returns the error against the unpruned model without them."""
    graph = trace(model, inputs)
    layers = {name: LayerPlan(name, trait.type, None, FilterPrune(0.5)) for name, trait in graph.traits(model).items()}
    plan = Plan(1, layers, fp16=False, write_shift_bit=False, quant_active=False, prune_active=True)
    discovery = discover(graph, plan, model)
    check_records(model, records, discovery.groups)
    removed_mask = discovery.removed_mask(records, model)
    masked, wanted = run_masked(model, inputs, discovery, removed_mask)
    if not masked.is_comparable():
        raise ModelError(
            "the outputs cannot be compared: the second forward runs other operators than the first (it keeps "
            "something), or draws random numbers for removed channels"
        )
    removal = removal_of(model, discovery, records, removed_mask)
    failed = removal.apply()
    rescaled = (
        RescaledRun([], Difference(None, failed))
        if failed
        else run_rescaled(model, inputs, discovery, removed_mask, removal)
    )
    if rescaled.difference is not None:
        raise ModelError(f"the record's channels cannot be removed: {rescaled.difference.reason}")
    return largest_error(rescaled.outputs, wanted)


def _error_in_double(original: nn.Module, records: Sequence[ChannelRecord], inputs: Inputs, otherwise: float) -> float:
    """The error without the rounding of the model's own precision; `otherwise` where it does not run in float64."""
    try:
        model = float_copy(original).double()
        wide = inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        with InDouble():
            return _removal_error(model, records, wide)
    except Exception as error:
        _logger.debug("no comparison in float64: %s", error)
        return otherwise
