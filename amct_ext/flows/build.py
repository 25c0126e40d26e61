"""Making a compressed model, as all flows do it: trace, plan, prune, insert the layers, load.

It stands in flows, not in model_surgery: restore needs checkpoint, which reads the names of inserted layers and so
stands above model_surgery.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from amct_ext.checkpoint.load import load_state, read_state_dict
from amct_ext.common.references import copy_model
from amct_ext.common.wrapping import unwrap, wrap_like
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import Plan, after_pruning, resolve, resolve_json
from amct_ext.config.plan_checks import quant_active
from amct_ext.config.profile import goes_beyond_amct
from amct_ext.config.text import FilterPrune, RetrainConfig
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError, RecordError
from amct_ext.explain.reasons import layer_reasons
from amct_ext.flows.create_checks import (
    check_called_once,
    check_pruned,
    check_pruning_loss,
    export_note,
    log_coverage,
    uncalled_layers,
    warn_of_excluded,
    warn_of_merging,
)
from amct_ext.flows.uncompressed_check import check_model
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.graph.weight_use import weight_uses
from amct_ext.layers.attention import InProjection
from amct_ext.layers.classes import standard_class
from amct_ext.model_surgery.fast_path import disable_fast_path
from amct_ext.model_surgery.hooks import attach
from amct_ext.model_surgery.lookup import compressed_layers, planned_layers
from amct_ext.model_surgery.record_factors import load_masks, start_record
from amct_ext.model_surgery.session import Findings, Session, session_of
from amct_ext.model_surgery.split_attention import split_attention
from amct_ext.model_surgery.split_rnn import split_recurrent
from amct_ext.model_surgery.swap import insert_layers, unreplaceable
from amct_ext.prune.channels import apply_channels, plan_channels
from amct_ext.prune.discovery import Discovery, EqualRemoval
from amct_ext.prune.gate_taylor import PruningLoss
from amct_ext.prune.permute import asks_for_permutation, permute_channels
from amct_ext.prune.walk import discover
from amct_ext.record.types import ChannelRecord, Record


@dataclass(frozen=True)
class Planner:
    """How a flow turns the traits of a model's layers into a plan; ``config`` is what it reads.

    splits_recurrent: LSTM and GRU layers may be split, so that all of them can be quantised. has_loss: create was given
    one to rank channels by.
    """

    resolve: Callable[[Mapping[str, LayerTraits]], Plan]
    config: RetrainConfig | JsonConfig
    splits_recurrent: bool = False
    has_loss: bool = False

    @property
    def profile(self) -> str:
        """The configuration's profile."""
        return (self.config.settings if isinstance(self.config, JsonConfig) else self.config).profile

    @classmethod
    def of(cls, config: RetrainConfig | JsonConfig, has_loss: bool = False) -> Planner:
        """The planner that does what a configuration (text or JSON) says."""
        if isinstance(config, JsonConfig):
            return cls(lambda traits: resolve_json(config, traits), config, True)
        return cls(lambda traits: resolve(config, traits, has_loss), config, True, has_loss)


@dataclass(frozen=True)
class Analysis:
    """A float copy of a model, and what create and restore alike decide by, before channels are removed."""

    model: nn.Module
    inputs: Inputs
    graph: Graph
    plan: Plan
    discovery: Discovery  # of coupled channels; none where the plan prunes nothing
    findings: Findings


def create(
    model: nn.Module, input_data: Any, planner: Planner, record_file: str, pruning_loss: PruningLoss | None = None
) -> nn.Module:
    """A compressed copy of ``model``; the record file is written once all has succeeded. Errors: see the flows."""
    analysis = _analyze(model, input_data, planner)
    check_pruning_loss(analysis.discovery.prunable, analysis.plan, pruning_loss, planner.config.source)
    inner = _compress(analysis, record_file, pruning_loss)
    check_pruned(session_of(inner), planner.config.source)
    log_coverage(inner)
    start_record(inner)
    return wrap_like(model, inner)


def compress(model: nn.Module, input_data: Any, planner: Planner, record_file: str) -> nn.Module:
    """What ``create`` would return, without its wrapper and without a loss: other channels may go; writes nothing."""
    return _compress(_analyze(model, input_data, planner), record_file)


def _compress(analysis: Analysis, record_file: str, pruning_loss: PruningLoss | None = None) -> nn.Module:
    warn_of_excluded(analysis.graph)
    warn_of_merging(analysis.model, analysis.plan)
    plan, model = analysis.plan, analysis.model

    def choose(equal_removals: Sequence[EqualRemoval]) -> tuple[Discovery, Sequence[ChannelRecord]]:
        found = discover(analysis.graph, plan, model, equal_removals)
        return found, plan_channels(found, plan, model, pruning_loss)

    records = plan_channels(analysis.discovery, plan, model, pruning_loss)
    channel = apply_channels(model, analysis.discovery, records, analysis.inputs, choose=choose)
    if asks_for_permutation(analysis.plan):
        graph = trace(analysis.model, analysis.inputs) if channel else analysis.graph
        permute_channels(analysis.model, graph, analysis.plan, analysis.inputs)
    return _build_compressed(analysis, record_file, channel)


def restore(
    model: nn.Module,
    input_data: Any,
    planner: Planner,
    record: Record,
    record_file: str,
    pth_file: str,
    state_dict_name: str | None,
) -> nn.Module:
    """The compressed copy of ``model`` that ``record`` describes, with a checkpoint's state. Nothing is written."""
    analysis = _analyze(model, input_data, planner)
    state = read_state_dict(pth_file, state_dict_name, analysis.model.state_dict())
    excluded = _float_in_checkpoint(analysis.model, analysis.plan, state)
    try:
        channel = apply_channels(analysis.model, analysis.discovery, record.channel, analysis.inputs, strict=True)
    except RecordError as error:
        raise RecordError(f"{record_file}: not the record of this model: {error}") from error
    inner = _build_compressed(analysis, record_file, channel, excluded)
    load_masks(inner, record, record_file)
    # A record without channels is accepted, as in AMCT, where the plan compresses in another way.
    if not _compresses_anything(session_of(inner)):
        check_pruned(session_of(inner), planner.config.source)
    load_state(inner, state, pth_file)
    return wrap_like(model, inner)


def _float_in_checkpoint(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Layers that the plan compresses and a checkpoint holds as float: subclasses that AMCT leaves float.

    AMCT matches exact classes and so leaves a subclass of Conv2d, say, float; a job that it began stays as it is.
    """
    found = {}
    for name in (layer.name for layer in planned_layers(plan)):
        module = model.get_submodule(name)
        if type(module) is standard_class(module):
            continue
        own = (f"{name}.weight_quant.", f"{name}.sparsity.")
        present = [key for key in module._parameters if module._parameters[key] is not None]
        # the entries of an InProjection are those of the attention around it
        kept = isinstance(module, InProjection) or all(f"{name}.{key}" in state for key in present)
        if kept and not any(key.startswith(own) for key in state):
            found[name] = "the checkpoint holds it as a float layer (AMCT compresses exact classes only)"
    return found


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of the float model inside ``model``. Errors: ModelError (compressed already), RuntimeError (no copy)."""
    inner = unwrap(model)
    check_model(inner)
    try:
        return disable_fast_path(copy_model(inner))
    except Exception as error:
        raise RuntimeError(
            f"{type(inner).__name__} cannot be copied, and the caller's model is never modified: {error}"
        ) from error


def traits_to_plan(
    model: nn.Module, input_data: Any, config: RetrainConfig
) -> tuple[dict[str, LayerTraits], RetrainConfig]:
    """Traits of the layers that a plan by ``config`` decides on, and ``config`` in the names of these layers."""
    inner = float_copy(model)
    inputs = parse_inputs(inner, input_data)
    inner = split_attention(inner, inputs)
    inner, graph, config = split_recurrent(inner, trace(inner, inputs), inputs, config)
    return graph.traits(inner, goes_beyond_amct(config.profile)), config


def _analyze(model: nn.Module, input_data: Any, planner: Planner) -> Analysis:
    inner = float_copy(model)
    inputs = parse_inputs(inner, input_data)
    if isinstance(planner.config, JsonConfig) or quant_active(planner.config):
        inner = split_attention(inner, inputs)
    graph = trace(inner, inputs)
    if planner.splits_recurrent:
        inner, graph, planner = _split_recurrent(inner, graph, inputs, planner)
    traits = graph.traits(inner, goes_beyond_amct(planner.profile))
    try:
        plan = planner.resolve(traits)
    except ConfigError:
        check_called_once(graph, inputs)
        raise
    discovery = discover(graph, plan, inner) if plan.prune_active else Discovery(graph)
    findings = Findings(planner.config, traits, discovery.unpruned_reasons(), uncalled_layers(model, graph, traits))
    return Analysis(inner, inputs, graph, plan, discovery, findings)


def _split_recurrent(
    model: nn.Module, graph: Graph, inputs: Inputs, planner: Planner
) -> tuple[nn.Module, Graph, Planner]:
    config = planner.config
    if isinstance(config, JsonConfig):
        model, graph, settings = split_recurrent(model, graph, inputs, config.settings)
        return model, graph, Planner.of(replace(config, settings=settings))
    model, graph, config = split_recurrent(model, graph, inputs, config)
    return model, graph, Planner.of(config, planner.has_loss)


def _build_compressed(
    analysis: Analysis,
    record_file: str,
    channel: tuple[ChannelRecord, ...],
    excluded: Mapping[str, str] = MappingProxyType({}),
) -> nn.Module:
    """Insert the layers into the (pruned) model. The graph is that of the unpruned one: only sizes differ."""
    model, inputs, graph = analysis.model, analysis.inputs, analysis.graph
    session = Session(analysis.plan, os.path.abspath(record_file), channel, analysis.findings)
    session.export_note = export_note(model, graph, inputs)
    session.weight_uses = weight_uses(graph.nodes, model)
    session.plan = after_pruning(session.plan, graph.traits(model))
    planned = [layer.name for layer in planned_layers(session.plan) if layer.name not in excluded]
    excluded = {**excluded, **unreplaceable(model, parse_inputs(model, inputs), planned)}
    model, session.conv_bn, session.excluded = insert_layers(model, graph, session.plan, excluded)
    compressed = dict(compressed_layers(model))
    session.order = tuple(name for name in graph.layer_order() if name in compressed)
    attach(model, session)
    return model


def _compresses_anything(session: Session) -> bool:
    """Whether a layer is quantised, or one that the plan prunes may lose channels."""
    layers = session.plan.layers.values()
    asked = [layer.name for layer in layers if isinstance(layer.prune, FilterPrune)]
    return any(layer.quant for layer in layers) or not all(layer_reasons(session, name).not_pruned for name in asked)
