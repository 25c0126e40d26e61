"""The functions of the quantisation flow: a JSON configuration, create, restore, save."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from amct_ext.common.files import write_atomic
from amct_ext.common.inference_mode import outside_inference_mode
from amct_ext.common.validation import check_record_name, check_types
from amct_ext.common.wrapping import unwrap
from amct_ext.config.json import read_json
from amct_ext.config.json_text import default_config, json_text
from amct_ext.config.plan import Plan, resolve_json
from amct_ext.config.text import parse_config
from amct_ext.errors import ModelError, StaleStateError
from amct_ext.flows import build, saving
from amct_ext.graph.trace import trace
from amct_ext.model_surgery.lookup import layers_by_created_name
from amct_ext.model_surgery.session import session_of
from amct_ext.record.types import Record


@outside_inference_mode
def create_quant_retrain_config(
    config_file: str, model: nn.Module, input_data: Any, config_defination: str | None = None
) -> None:
    """Write the JSON configuration of the quantisation flow: one entry per layer that can be quantised.

    ``config_defination``: configuration text file without pruning fields; None gives every layer the defaults (INT8,
    ranges searched, ARQ weights). ``config_file`` is replaced atomically, its folder made. The model is not changed.
    Errors: TypeError (argument types), ValueError (file name, configuration, pruning fields, no layer to quantise),
    RuntimeError (the model rejects the input, or is compressed already). Source: AMCT's function of the same name.
    """
    check_types(
        config_file=(config_file, str), model=(model, nn.Module), config_defination=(config_defination, str, type(None))
    )
    check_record_name(config_file, "config_file")
    config = default_config() if config_defination is None else parse_config(config_defination)
    traits, config = build.traits_to_plan(model, input_data, config)
    write_atomic(config_file, json_text(config, traits))


@outside_inference_mode
def create_quant_retrain_model(config_file: str, model: nn.Module, record_file: str, input_data: Any) -> nn.Module:
    """Return a quantisation-aware copy of ``model``, ready to be retrained.

    ``config_file``: the JSON that ``create_quant_retrain_config`` wrote. ``record_file`` is emptied (atomically, once
    everything succeeded); the eval phases of the returned model write the factors into it. The caller's model is not
    changed; the copy keeps its train/eval mode and its DistributedDataParallel wrapper. Errors: TypeError (argument
    types, types inside the JSON), ValueError (configuration, file names), RuntimeError (as for the other create
    functions), FileNotFoundError. Source: AMCT's function of the same name.
    """
    check_types(config_file=(config_file, str), model=(model, nn.Module), record_file=(record_file, str))
    check_record_name(record_file)
    return build.create(model, input_data, build.Planner.of(read_json(config_file)), record_file)


@outside_inference_mode
def restore_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    input_data: Any,
    pth_file: str,
    state_dict_name: str | None = None,
) -> nn.Module:
    """Rebuild a quantisation-aware model from the float model and its JSON, and load a checkpoint into it.

    Arguments as for ``create_quant_retrain_model``; ``pth_file`` is a checkpoint of ours or of AMCT,
    ``state_dict_name`` the entry that holds the state dict. The record file is neither read nor changed; the next eval
    phase writes the factors. The result equals the saved model bit for bit. Errors: those of create and of
    ``amct_ext.checkpoint.load`` (``read_state_dict``, ``load_state``). Source: AMCT's function of the same name.
    """
    check_types(
        config_file=(config_file, str),
        model=(model, nn.Module),
        record_file=(record_file, str),
        pth_file=(pth_file, str),
        state_dict_name=(state_dict_name, str, type(None)),
    )
    check_record_name(record_file)
    planner = build.Planner.of(read_json(config_file))
    return build.restore(model, input_data, planner, Record(), record_file, pth_file, state_dict_name)


@outside_inference_mode
def save_quant_retrain_model(
    config_file: str,
    model: nn.Module,
    record_file: str,
    save_path: str,
    input_data: Any,
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: dict[str, Any] | None = None,
) -> None:
    """Write ``<save_path>_fake_quant_model.onnx`` and ``<save_path>_deploy_model.onnx`` of a retrained model.

    ``config_file`` must be the configuration the model was made with, ``record_file`` hold the factors of its present
    state (run a forward in eval mode first). The model is not changed and is exported in eval mode whatever its mode.
    Errors: TypeError, ValueError (names, configuration), FileNotFoundError, RuntimeError (not a quantised model, a
    configuration or record of another model or state, record empty, export). Source: AMCT's function of the same name.
    """
    check_types(
        config_file=(config_file, str),
        model=(model, nn.Module),
        record_file=(record_file, str),
        save_path=(save_path, str),
    )
    names = saving.export_names(input_names, output_names, dynamic_axes)
    check_record_name(config_file, "config_file")
    check_record_name(record_file)
    inner = unwrap(model)
    plan = session_of(inner).plan
    if not saving.quantized_layers(inner):
        raise ModelError(f"no layer of the {type(inner).__name__} is quantised; save it with save_prune_retrain_model")
    if plan.prune_active:
        raise ModelError(
            f"the {type(inner).__name__} is pruned too, which its JSON cannot say; save it with "
            "save_compressed_retrain_model"
        )
    config = read_json(config_file)
    float_form = saving.to_float_form(inner, input_data)
    # The file names layers as they were called at create.
    names_then = {present: name for name, (present, _) in layers_by_created_name(inner).items()}
    traits = trace(float_form.model, float_form.inputs).traits(float_form.model)
    asked = resolve_json(config, {names_then.get(name, name): trait for name, trait in traits.items()})
    check_same_plan(plan, asked, config_file)
    saving.save_quantized(inner, record_file, save_path, input_data, names, float_form)


def check_same_plan(made: Plan, asked: Plan, source: str) -> None:
    """Raise StaleStateError (a RuntimeError) where the plan a model was made by is not the one its file asks for."""
    differences = [
        f"{name} is {getattr(asked, name)} in the file and {getattr(made, name)} in the model"
        for name in (item.name for item in fields(Plan))
        if name not in ("layers", "quant_active", "prune_active")  # compared below; no settings of the file
        if getattr(asked, name) != getattr(made, name)
    ]
    for name in dict.fromkeys([*made.layers, *asked.layers]):
        present = made.layers[name].quant if name in made.layers else None
        asked_quant = asked.layers[name].quant if name in asked.layers else None
        if present is None or asked_quant is None:
            if present is not asked_quant:
                differences.append(
                    f"layer '{name}' is {'left float' if asked_quant is None else 'quantized'} by the file and "
                    f"{'float' if present is None else 'quantized'} in the model"
                )
            continue
        differences += [
            f"layer '{name}': {part}.{item.name} is {getattr(there, item.name)} in the file and "
            f"{getattr(here, item.name)} in the model"
            for part, here, there in (
                ("data", present.data, asked_quant.data),
                ("weight", present.weight, asked_quant.weight),
            )
            for item in fields(here)
            if getattr(here, item.name) != getattr(there, item.name)
        ]
    if differences:
        shown = differences[:9] + ([f"and {len(differences) - 9} more"] if len(differences) > 9 else [])
        raise StaleStateError(
            f"{source}: not the configuration that this model was made with; give that one:\n  " + "\n  ".join(shown)
        )
