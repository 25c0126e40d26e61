"""Making a compressed model, as all flows do it: prune, trace again, insert the layers, load."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from amct_ext import ops
from amct_ext.checkpoint.load import load_state, read_state_dict
from amct_ext.common.layer_kinds import keeps_forward
from amct_ext.common.references import copy_model
from amct_ext.common.wrapping import unwrap, wrap_like
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import Plan, after_pruning
from amct_ext.config.text import FilterPrune, RetrainConfig, SparsePrune
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError, RecordError
from amct_ext.explain.reasons import LayerReasons, reasons
from amct_ext.export.capture import shown
from amct_ext.export.write import rehearse
from amct_ext.flows.check import check_model
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.layers.classes import standard_class
from amct_ext.model_surgery.fast_path import separate_encoders
from amct_ext.model_surgery.hooks import attach
from amct_ext.model_surgery.recording import start_record
from amct_ext.model_surgery.session import Session, session_of
from amct_ext.model_surgery.swap import compressed_layers, insert_layers, planned_layers, unfollowed
from amct_ext.prune.channels import apply_channels, plan_channels
from amct_ext.record.types import ChannelRecord, Record

logger = logging.getLogger("amct_ext")
_SHOWN = 9  # layers named in a message


@dataclass(frozen=True)
class Planner:
    """How a flow turns the traits of a model's layers into a plan; ``config`` only serves to say why."""

    resolve: Callable[[Mapping[str, LayerTraits]], Plan]
    config: RetrainConfig | JsonConfig


def create(model: nn.Module, input_data: Any, planner: Planner, record_file: str) -> nn.Module:
    """A compressed copy of ``model``; the record file is written once all has succeeded. Errors: see the flows."""
    inner = compress(model, input_data, planner, record_file)
    _check_pruned(session_of(inner), planner.config.source)
    start_record(inner)
    return wrap_like(model, inner)


def compress(model: nn.Module, input_data: Any, planner: Planner, record_file: str) -> nn.Module:
    """The copy that ``create`` returns, without its DistributedDataParallel wrapper; writes nothing."""
    inner = own_copy(model)
    input_data = parse_inputs(inner, input_data)
    graph = trace(inner, input_data)
    traits = graph.traits(inner)
    plan = planner.resolve(traits)
    why = reasons(graph, traits, plan, inner, planner.config) | _unreached(model, graph, traits)
    _say_left_alone(graph)
    channel: tuple[ChannelRecord, ...] = ()
    if plan.prune_active:
        records = plan_channels(graph, plan, inner)
        channel = apply_channels(inner, graph, records, input_data)
    return _insert(inner, input_data, Session(plan, os.path.abspath(record_file), channel, reasons=why))


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
    inner = own_copy(model)
    input_data = parse_inputs(inner, input_data)
    graph = trace(inner, input_data)
    # Eligibility is judged on the unpruned model, as it was at create.
    traits = graph.traits(inner)
    plan = planner.resolve(traits)
    why = reasons(graph, traits, plan, inner, planner.config) | _unreached(model, graph, traits)
    state = read_state_dict(pth_file, state_dict_name)
    leave = _left_float(inner, plan, state)
    try:
        channel = apply_channels(inner, graph, record.channel, input_data, strict=True)
    except RecordError as error:
        raise RecordError(f"{record_file}: not the record of this model: {error}") from error
    inner = _insert(inner, input_data, Session(plan, os.path.abspath(record_file), channel, reasons=why), leave)
    _take_masks(inner, record, record_file)
    asked = [layer.name for layer in plan.layers.values() if isinstance(layer.prune, FilterPrune)]
    if not any(layer.quant for layer in plan.layers.values()) and all(why[name].not_pruned for name in asked):
        _check_pruned(session_of(inner), planner.config.source)  # else a record without channels is AMCT's choice
    load_state(inner, state, pth_file)
    return wrap_like(model, inner)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the float model inside ``model``. Errors: ModelError (compressed already), RuntimeError (no copy)."""
    inner = unwrap(model)
    check_model(inner)
    try:
        return separate_encoders(copy_model(inner))
    except Exception as error:
        raise RuntimeError(
            f"{type(inner).__name__} cannot be copied, and the caller's model is never modified: {error}"
        ) from error


def _say_left_alone(graph: Graph) -> None:
    for name, reason in graph.left_alone.items():
        logger.warning("layer '%s' is left as it is: %s", name, reason)


def _unreached(model: nn.Module, graph: Graph, traits: Mapping[str, LayerTraits]) -> dict[str, LayerReasons]:
    """Reasons for layers that are used without being called.

    Those of which the caller's own ran in the forward of the copy are also warned of: the model holds them in a way
    that no copy can follow (a global variable, a class attribute, a closure over objects).
    """
    foreign = {id(parameter) for parameter in graph.foreign}
    read = {name.rpartition(".")[0] for name in graph.parameter_readers()}
    reason = "the forward uses its parameters without calling the layer (layer.forward(x), or a function of the weight)"
    layers = dict(unwrap(model).named_modules())
    uncalled = [name for name in traits if name in read and name not in graph.calls and keeps_forward(layers[name])]
    found = {name: LayerReasons(reason, reason) for name in uncalled}
    for name, layer in layers.items():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if name in traits and name not in graph.calls and own & foreign:
            reason = "the forward runs the caller's own layer, held by something that is no attribute of the model"
            logger.warning("layer '%s' is left float and is not trained by the copy: %s", name, reason)
            found[name] = LayerReasons(reason, reason)
    return found


def _left_float(model: nn.Module, plan: Plan, state: Mapping[str, Any]) -> dict[str, str]:
    """Layers that the plan compresses and a checkpoint holds as float, where only their class tells them apart.

    AMCT matches exact classes and so leaves a subclass of Conv2d, say, float; a job that it began stays as it is.
    """
    found = {}
    for name in (layer.name for layer in planned_layers(plan)):
        module = model.get_submodule(name)
        if type(module) is standard_class(module):
            continue
        own = (f"{name}.weight_quant.", f"{name}.sparsity.")
        kept = all(f"{name}.{key}" in state for key in module._parameters if module._parameters[key] is not None)
        if kept and not any(key.startswith(own) for key in state):
            found[name] = "the checkpoint holds it as a float layer (AMCT compresses exact classes only)"
    return found


def _insert(
    model: nn.Module, input_data: Any, session: Session, leave: Mapping[str, str] = MappingProxyType({})
) -> nn.Module:
    """Insert the layers into a (pruned) model; the second trace sees the model as it is now."""
    graph = trace(model, input_data)
    session.export_note = _export_note(model, graph, input_data)
    session.plan = after_pruning(session.plan, graph.traits(model))
    planned = [layer.name for layer in planned_layers(session.plan) if layer.name not in leave]
    leave = {**leave, **unfollowed(model, parse_inputs(model, input_data), planned)}
    model, session.conv_bn, left = insert_layers(model, graph, session.plan, leave)
    for name, reason in left.items():
        sparse = isinstance(session.plan.layers[name].prune, SparsePrune)
        old = session.reasons.get(name, LayerReasons())
        session.reasons[name] = LayerReasons(reason, reason if sparse else old.not_pruned)
    compressed = dict(compressed_layers(model))
    session.order = tuple(name for name in graph.calls if name in compressed)
    attach(model, session)
    return model


def _check_pruned(session: Session, source: str) -> None:
    """Raise ConfigError where pruning is asked for and no group of channels may lose any, nor a layer is 2:4 sparse."""
    layers = session.plan.layers.values()
    asked = [layer.name for layer in layers if isinstance(layer.prune, FilterPrune)]
    if not asked or any(isinstance(layer.prune, SparsePrune) for layer in layers):
        return
    if session.channel:
        if not any(node.prune_index for record in session.channel for node in record.producers):
            logger.warning("%s: prune_ratio and rounding (ascend_optimized: multiples of 16) keep all channels", source)
        return
    dropped = "the model fails without its channels (see the log)"
    lines = [f"{name}: {session.reasons[name].not_pruned or dropped}" for name in asked]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(lines) - _SHOWN} more (amct_ext.explain lists them)"]
    raise ConfigError(
        f"{source}: channel pruning is asked for, but no layer can lose channels, nothing is left to prune:\n  "
        + "\n  ".join(lines)
    )


def _export_note(model: nn.Module, graph: Graph, input_data: Any) -> str:
    """What there is to know of a save before the training, logged as a warning too; '' where nothing is.

    The export is tried where the trace met something that exporters may not follow; a try takes longer than all else.
    """
    if not graph.doubts:
        return ""
    places = shown(graph.doubts)
    try:
        rehearse(model, input_data)
        fixed = shown([doubt for doubt in graph.doubts if doubt.fixes])
        if not fixed:
            return ""
        note = (
            f"save may trace one forward: sizes, branches and numbers that forward takes from tensors ({fixed}) are "
            "constants in the files then, those of input_data"
        )
    except Exception as error:  # whatever it is, save would meet it too
        note = (
            f"this model cannot be exported, so save will fail: {error}\nWhat may be in the way: {places}. Take it out "
            "of forward, or save a model without it"
        )
    logger.warning("%s: %s", type(model).__name__, note)
    return note


def _take_masks(model: nn.Module, record: Record, record_file: str) -> None:
    """Set the 2:4 masks from the record, for checkpoints without them. Errors: RecordError, all mismatches listed."""
    recorded = {entry.name: entry for entry in record.sparse}
    layers = {name: layer for name, layer in compressed_layers(model) if layer.sparsity is not None}
    problems = [f"no 2:4 entry for layer '{name}'" for name in layers if name not in recorded]
    problems += [
        f"2:4 entry for '{name}', which the configuration does not make sparse"
        for name in recorded
        if name not in layers
    ]
    problems += [
        f"mask_shape {recorded[name].mask_shape} of '{name}', whose weight is {tuple(layer.weight.shape)}"
        for name, layer in layers.items()
        if name in recorded and recorded[name].mask_shape != tuple(layer.weight.shape)
    ]
    if problems:
        raise RecordError(f"{record_file}: not the record of this model and configuration:\n  " + "\n  ".join(problems))
    for name, layer in layers.items():
        words = recorded[name].mask
        if words is not None:
            assert layer.sparsity is not None
            layer.sparsity.mask.copy_(ops.unpack_mask(torch.tensor(words, dtype=torch.int64), list(layer.weight.shape)))
