"""`verify_pruning`: does a pruned network compute what the whole one does without the removed channels?"""

from __future__ import annotations

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
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import trace
from amct_ext.model_surgery.session import session_of
from amct_ext.prune.channels import removal_of
from amct_ext.prune.check import check_records
from amct_ext.prune.discover import discover
from amct_ext.prune.trial import largest_error, run_masked
from amct_ext.record.types import ChannelRecord


@dataclass(frozen=True)
class PruningProof:
    """How far the outputs of a pruned network are from those of the whole network without the removed channels.

    error: the largest difference over the largest magnitude of the same output; rounding alone gives about 1e-6.
    removed, channels: of the output channels of all layers that lose any. parameters_left: share.
    """

    error: float
    removed: int
    channels: int
    parameters_left: float

    def __str__(self) -> str:
        return (
            f"{self.removed} of {self.channels} channels removed, {self.parameters_left:.1%} of the parameters left; "
            f"outputs differ from those of the whole network without these channels by {self.error:.1e} of the largest"
        )


@outside_inference_mode
def verify_pruning(original: nn.Module, pruned: nn.Module, input_data: Any) -> PruningProof:
    """Compare a pruned network with the whole one in which the removed channels have no influence.

    ``original``: the float model that create or restore was given. ``pruned``: what it returned, trained since or not:
    its record says which channels are gone, and both networks are run with the weights of ``original``, in eval mode.
    In the whole one, layers that read a removed channel see zeros in it, and norms over channels leave it out of their
    statistics. Neither model is changed. Errors: ModelError (``pruned`` was not made by create or restore, or has other
    shapes than its record says), RecordError (the record does not fit ``original``), InputDataError.
    """
    inner = unwrap(pruned)
    records = session_of(inner).channel
    smaller, proof = prove_records(original, records, input_data)
    shapes = {name: tuple(parameter.shape) for name, parameter in inner.named_parameters()}
    for name, parameter in smaller.named_parameters():
        if shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape):
            raise ModelError(
                f"{name} has shape {list(shapes[name])}, by the record it is {list(parameter.shape)}: was the model "
                "changed after create?"
            )
    return proof


def prove_records(
    original: nn.Module, records: Sequence[ChannelRecord], input_data: Any
) -> tuple[nn.Module, PruningProof]:
    """The copy of `original` without the records' channels, and how it compares. Errors: as of verify_pruning."""
    model = float_copy(original)
    inputs = parse_inputs(model, input_data)
    graph = trace(model, inputs)
    layers = {name: LayerPlan(name, trait.type, None, FilterPrune(0.5)) for name, trait in graph.traits(model).items()}
    plan = Plan(1, layers, fp16=False, write_shift_bit=False, quant_active=False, prune_active=True)
    found = discover(graph, plan, model)
    check_records(model, records, found.groups)
    gone = found.removed(records, model)
    _, wanted = run_masked(model, inputs, found, gone)
    whole = sum(parameter.numel() for parameter in model.parameters())
    nodes = {(node.name, node.begin): node for record in records for node in record.producers if node.prune_index}
    failed = removal_of(model, found, records, gone).apply()
    if failed:
        raise ModelError(f"the record's channels cannot be removed: {failed}")
    got = inputs.evaluate(model)
    left = sum(parameter.numel() for parameter in model.parameters())
    removed = sum(len(node.prune_index) for node in nodes.values())
    channels = sum(node.end - node.begin for node in nodes.values())
    return model, PruningProof(largest_error(got, wanted), removed, channels, left / whole)
