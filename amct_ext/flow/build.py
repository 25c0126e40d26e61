"""Making a compressed model, as all flows do it: prune, trace again, insert the layers, load."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from amct_ext import ops
from amct_ext.arguments import check_model, unwrap, wrap_like
from amct_ext.checkpoint.load import load_checkpoint
from amct_ext.config.json import JsonConfig
from amct_ext.config.plan import LayerTraits, Plan, after_pruning
from amct_ext.config.text import RetrainConfig
from amct_ext.errors import RecordError
from amct_ext.export.capture import shown
from amct_ext.export.write import rehearse
from amct_ext.flow.session import Session, attach, write_record
from amct_ext.flow.surgery import compressed_layers, insert_layers
from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import Graph, trace
from amct_ext.prune.channels import apply_channels, plan_channels
from amct_ext.reasons import reasons
from amct_ext.record.types import ChannelRecord, Record

_log = logging.getLogger("amct_ext")


@dataclass(frozen=True)
class Planner:
    """How a flow turns the traits of a model's layers into a plan; ``config`` only serves to say why."""

    resolve: Callable[[Mapping[str, LayerTraits]], Plan]
    config: RetrainConfig | JsonConfig


def create(model: nn.Module, input_data: Any, planner: Planner, record_file: str) -> nn.Module:
    """A compressed copy of ``model``; the record file is written once all has succeeded. Errors: see the flows."""
    inner = compress(model, input_data, planner, record_file)
    write_record(inner, with_factors=False)
    return wrap_like(model, inner)


def compress(model: nn.Module, input_data: Any, planner: Planner, record_file: str) -> nn.Module:
    """The copy that ``create`` returns, without its DistributedDataParallel wrapper; writes nothing."""
    inner = own_copy(model)
    input_data = parse_inputs(inner, input_data)
    graph = trace(inner, input_data)
    traits = graph.traits(inner)
    plan = planner.resolve(traits)
    why = reasons(graph, traits, plan, inner, planner.config)
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
    why = reasons(graph, traits, plan, inner, planner.config)
    try:
        channel = apply_channels(inner, graph, record.channel, input_data, strict=True)
    except RecordError as error:
        raise RecordError(f"{record_file}: not the record of this model: {error}") from error
    inner = _insert(inner, input_data, Session(plan, os.path.abspath(record_file), channel, reasons=why))
    _take_masks(inner, record, record_file)
    load_checkpoint(inner, pth_file, state_dict_name)
    return wrap_like(model, inner)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the float model inside ``model``. Errors: ModelError (compressed already), RuntimeError (no copy)."""
    inner = unwrap(model)
    check_model(inner)
    try:
        return copy.deepcopy(inner)
    except Exception as error:
        raise RuntimeError(
            f"{type(inner).__name__} cannot be copied, and the caller's model is never modified: {error}"
        ) from error


def _insert(model: nn.Module, input_data: Any, session: Session) -> nn.Module:
    """Insert the layers into a (pruned) model; the second trace sees the model as it is now."""
    graph = trace(model, input_data)
    session.export_note = _export_note(model, graph, input_data)
    session.plan = after_pruning(session.plan, graph.traits(model))
    model, session.conv_bn = insert_layers(model, graph, session.plan)
    compressed = dict(compressed_layers(model))
    session.order = tuple(name for name in graph.calls if name in compressed)
    attach(model, session)
    return model


def _export_note(model: nn.Module, graph: Graph, input_data: Any) -> str:
    """What there is to know of a save before the training, logged as a warning too; '' where nothing is.

    The export is tried where the trace met something that exporters may not follow; a try takes longer than all else.
    """
    if not graph.doubts:
        return ""
    places = shown(graph.doubts)
    try:
        rehearse(model, input_data)
        note = (
            f"save may trace one forward: sizes, branches and numbers that forward takes from tensors ({places}) are "
            "constants in the files then, those of input_data"
        )
    except Exception as error:  # whatever it is, save would meet it too
        note = (
            f"this model cannot be exported, so save will fail: {error}\nWhat may be in the way: {places}. Take it out "
            "of forward, or save a model without it"
        )
    _log.warning("%s: %s", type(model).__name__, note)
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
