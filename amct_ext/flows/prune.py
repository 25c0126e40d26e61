"""The functions of the pruning flow: channel pruning and 2:4 sparsity without quantisation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.validation import check_callable, check_record_name, check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.config.plan import Plan, resolve
from amct_ext.config.text import parse_config
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError, ModelError
from amct_ext.flows import build, saving
from amct_ext.prune.gate_taylor import PruningLoss
from amct_ext.record.text import read_record

logger = logging.getLogger("amct_ext")


@outside_inference_mode
def create_prune_retrain_model(
    model: nn.Module,
    input_data: Any,
    config_defination: str,
    record_file: str,
    *,
    pruning_loss: PruningLoss | None = None,
) -> nn.Module:
    """Return a pruned and/or 2:4-sparse copy of ``model``, ready to be retrained.

    ``config_defination``: configuration text file; its quantisation fields are checked and otherwise ignored.
    ``record_file``: written (atomically, once everything succeeded) with the channel groups and 2:4 masks.

    ``pruning_loss``: for `importance: GATE_TAYLOR`. Given the float model (a copy in eval mode), it yields scalar
    losses, one per batch: ``lambda model: (loss(model(x), y) for x, y in batches)``. In a distributed job all ranks
    give one, and the mean of their measures counts.

    The caller's model is not changed; the copy keeps its train/eval mode and its DistributedDataParallel wrapper.

    Errors: TypeError (argument types), ValueError (configuration, record name, nothing to prune, GATE_TAYLOR without a
    loss), RuntimeError (the model rejects the input, or is compressed already; losses that are no finite scalars of the
    model). Source: AMCT's function of the same name; `pruning_loss` is ours.
    """
    check_types(model=(model, nn.Module), config_defination=(config_defination, str), record_file=(record_file, str))
    check_record_name(record_file)
    check_callable(pruning_loss=pruning_loss)
    planner = _planner(config_defination, pruning_loss is not None)
    return build.create(model, input_data, planner, record_file, pruning_loss)


@outside_inference_mode
def restore_prune_retrain_model(
    model: nn.Module,
    input_data: Any,
    record_file: str,
    config_defination: str,
    pth_file: str,
    state_dict_name: str | None = None,
) -> nn.Module:
    """Rebuild a pruned model from the float model, its record and configuration, and load a checkpoint into it.

    The record comes before the configuration here, as in AMCT. Channels are removed as the record says, whatever the
    ratios of the configuration; the configuration says which layers are 2:4 sparse. ``pth_file`` is a checkpoint of
    ours or of AMCT, ``state_dict_name`` the entry that holds the state dict. Nothing is written. Errors: those of
    create; FileNotFoundError; RecordError (a RuntimeError) where the record is damaged or of another model; those of
    ``amct_ext.checkpoint.load`` (``read_state_dict``, ``load_state``). Source: AMCT's function of the same name.
    """
    check_types(
        model=(model, nn.Module),
        record_file=(record_file, str),
        config_defination=(config_defination, str),
        pth_file=(pth_file, str),
        state_dict_name=(state_dict_name, str, type(None)),
    )
    check_record_name(record_file)
    planner = _planner(config_defination)
    record = read_record(record_file)
    if not (record.channel or record.sparse):
        logger.warning("%s: no prune_record, so no channels are removed", record_file)
    return build.restore(model, input_data, planner, record, record_file, pth_file, state_dict_name)


@outside_inference_mode
def save_prune_retrain_model(
    model: nn.Module,
    save_path: str,
    input_data: Any,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: dict[str, Any] | None = None,
) -> None:
    """Write the float graph of a pruned model as ``<save_path>_fake_quant_model.onnx`` and ``..._deploy_model.onnx``.

    2:4 masks are multiplied into the weights. Neither record nor configuration is needed. The model is not changed and
    is exported in eval mode whatever its mode. Errors: TypeError, ValueError (save_path), RuntimeError (names and axes,
    a model that is quantised too or cannot be copied, export). Source: AMCT's function of the same name.
    """
    check_types(model=(model, nn.Module), save_path=(save_path, str))
    names = saving.export_names(input_names, output_names, dynamic_axes)
    inner = unwrap(model)
    quantized = saving.quantized_layers(inner)
    if quantized:
        raise ModelError(
            f"the model is quantised ('{quantized[0]}' and {len(quantized) - 1} more), which a plain graph would lose; "
            "save it with save_compressed_retrain_model or save_quant_retrain_model"
        )
    saving.save_float(inner, save_path, input_data, names)


def _planner(config_defination: str, has_loss: bool = False) -> build.Planner:
    config = parse_config(config_defination)

    def prune_only(traits: Mapping[str, LayerTraits]) -> Plan:
        plan = resolve(config, traits, has_loss)
        layers = {name: replace(layer, quant=None) for name, layer in plan.layers.items()}
        if all(layer.prune is None for layer in layers.values()):
            reason = "every layer is skipped" if plan.prune_active else "there is no prune_config"
            raise ConfigError(f"{config.locations.source}: {reason}, nothing is left to prune")
        return replace(plan, layers=layers, quant_active=False)

    return build.Planner(prune_only, config)
