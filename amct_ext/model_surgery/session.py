"""What a compressed model knows about itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import Plan
from amct_ext.config.text import RetrainConfig
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ModelError
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.weight_use import WeightUses
from amct_ext.layers.activation import quantizer as activation_quantizer
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.model_surgery.batchnorm_links import link_batchnorms
from amct_ext.model_surgery.lookup import compressed_layers, compressed_modules
from amct_ext.record.types import ChannelRecord

ATTRIBUTE = "amct_ext_session"
StateVersions = tuple[tuple[int, int], ...]  # identity and version of tensors


@dataclass(frozen=True)
class Findings:
    """What create or restore found in the float model; `explain` derives the reasons of each layer from it.

    `config`: the configuration that the plan was made of. `unpruned_reasons`: layers whose channels the plan would
    prune but that must stay whole -> why. `uncalled`: layers whose parameters are used without calling the layer ->
    why.
    """

    config: RetrainConfig | JsonConfig
    traits: Mapping[str, LayerTraits]
    unpruned_reasons: Mapping[str, str]
    uncalled: Mapping[str, str]


@dataclass
class Session:
    """Facts of one compressed model; plain data, copied and pickled with the model.

    A copy (teacher, average, a model handed to another framework) has no record file until it is given one; a pickle
    keeps it.
    """

    plan: Plan
    record_file: str | None
    channel_records: tuple[ChannelRecord, ...]
    findings: Findings
    conv_bn: dict[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()  # compressed layers in execution order
    excluded: dict[str, str] = field(default_factory=dict)  # planned layers that stayed float -> why
    evaluated_state: StateVersions | None = None  # the state that the last evaluation began with
    recorded_state: StateVersions | None = None  # what the record was made of; None: not of the present state
    written_content: bytes | None = None  # content of the record file, when this model last wrote it
    export_note: str = ""  # what create found out about saving this model
    tracker: ForwardTracker = field(default_factory=ForwardTracker)
    weight_uses: WeightUses = field(default_factory=WeightUses)  # of the float model, after pruning
    output_search_pending: bool = False  # range_search: OUTPUT has yet to choose between clips
    gptq_pending: bool = False  # GPTQ has yet to change weights
    calibration_inputs: list[Inputs] = field(default_factory=list)  # of the last forwards, for the output search

    def __getstate__(self) -> dict[str, object]:
        # identities of this process, and what belongs to a calibration under way
        return vars(self) | {"evaluated_state": None, "recorded_state": None, "calibration_inputs": []}

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        new = copy.copy(self)
        memo[id(self)] = new
        new.record_file = new.written_content = None
        new.calibration_inputs = []
        new.tracker = copy.deepcopy(self.tracker, memo)
        return new


def session_of(model: nn.Module) -> Session:
    """The session of a compressed model. Errors: ModelError (a RuntimeError) for any other model."""
    session: Session | None = vars(model).get(ATTRIBUTE)
    if session is None:
        inside = [name for name, module in model.named_modules() if ATTRIBUTE in vars(module)]
        found = f" (its submodule '{inside[0]}' was)" if inside else ""
        raise ModelError(
            f"{type(model).__name__} was not made by create_* or restore_* of amct_ext{found}; pass what they returned"
        )
    return session


def present_pairs(model: nn.Module) -> dict[str, str]:
    """The (conv -> BN) pairs, convolutions by their present names; without those that are no longer in the model."""
    return link_batchnorms(model, session_of(model).conv_bn)


def added_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that compressed layers add to the float model."""
    children = (
        (f"{name}.{own}", getattr(layer, own))
        for name, layer in compressed_layers(model)
        for own in layer.added_children
    )
    return [f"{prefix}.{key}" for prefix, child in children if child is not None for key, _ in child.named_buffers()]


def activation_quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    """The activation quantisers of all compressed layers, each once, in registration order of the layers."""
    return [quantizer for layer in compressed_modules(model) for quantizer in layer.own_quantizers]


def raise_if_invalid(model: nn.Module) -> None:
    """Raise InvalidDataError for a layer whose input held NaN/Inf since the last check."""
    quantizers = activation_quantizers(model)
    if quantizers and not quantizers[0].invalid.is_meta and bool(torch.stack([q.invalid for q in quantizers]).any()):
        activation_quantizer.raise_if_invalid(quantizers)
    for quantizer in quantizers:
        quantizer.log_range()  # of a calibration in a compiled graph
