"""The last step of every flow: a retrained model to ONNX files, by way of its plain float form."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from amct_ext.arguments import check_types
from amct_ext.errors import ModelError, RecordError
from amct_ext.export import write
from amct_ext.flow.session import check_record, detach, present_pairs, raise_if_invalid, session_of
from amct_ext.flow.surgery import compressed_layers, fold_layers, placed_layers
from amct_ext.graph.layer_types import computed_parameter
from amct_ext.record.types import Record
from amct_ext.references import copy_model

_log = logging.getLogger(__name__)


def export_names(input_names: Any, output_names: Any, dynamic_axes: Any) -> dict[str, Any]:
    """The naming arguments that all save functions share, for the exporter. Errors: TypeError."""
    check_types(
        input_names=(input_names, list, type(None)),
        output_names=(output_names, list, type(None)),
        dynamic_axes=(dynamic_axes, dict, type(None)),
    )
    return {"input_names": input_names, "output_names": output_names, "dynamic_axes": dynamic_axes}


def quantised_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are quantised."""
    return [name for name, layer in compressed_layers(model) if layer.weight_quant is not None]


def float_copy(model: nn.Module) -> nn.Module:
    """A plain float copy in eval mode, compressed layers folded back, 2:4 masks multiplied in. Errors: ModelError."""
    for name, layer in compressed_layers(model):
        computed = computed_parameter(layer)
        if computed:
            raise ModelError(
                f"layer '{name}': since create its {computed} is computed (parametrisation, weight norm or pruning); "
                "take that off before saving, which leaves the layer its present values: remove_parametrizations of "
                "torch.nn.utils.parametrize, torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove"
            )
        around = model.get_submodule(name.rpartition(".")[0])
        if name != layer.layer_name and getattr(around, "merged", True) is False:
            raise ModelError(
                f"layer '{layer.layer_name}' is inside an adapter ({type(around).__name__}) that is not merged; merge "
                "it into the layer's weight (merge() or merge_and_unload() in peft), evaluate the model, then save"
            )
    try:
        duplicate = copy_model(model).eval()
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied, so it cannot be exported: {error}") from error
    plain = fold_layers(duplicate)
    detach(plain)  # a forward of the copy must not write the record
    return plain


def save_quantised(
    model: nn.Module, plain: nn.Module, record_file: str, save_path: str, input_data: Any, names: dict[str, Any]
) -> None:
    """Write both files of a quantised model; `plain` is its float copy.

    Errors: FileNotFoundError; RecordError (record without factors, or damaged); StaleStateError (factors of another
    state of the model); InvalidDataError; those of the export.
    """
    session = session_of(model)
    raise_if_invalid(model)
    record = Record.read(record_file)
    if not record.quant:
        waiting = [name for name, layer in compressed_layers(model) if not layer.ready]
        todo = (
            f"'{waiting[0]}' and {len(waiting) - 1} other layer(s) are not calibrated; train the model, or call "
            "amct_ext.calibrate(model, batches), then run a forward in eval mode"
            if waiting
            else f"run a forward in eval mode, or call amct_ext.update_record(model, {record_file!r})"
        )
        raise RecordError(f"{record_file}: no quantisation factors recorded: {todo}")
    check_record(model, record, record_file)
    placed = placed_layers(model)
    for name, layer in compressed_layers(model):
        if placed[layer.layer_name][1] is not layer:
            raise ModelError(
                f"layer '{name}' is a copy of the compressed layer '{layer.layer_name}' and has no factors of its own; "
                "put it into the model before create, or a float layer in its place"
            )
    for name in session.order:
        if name not in placed:
            _log.warning("layer '%s', compressed at create, is no longer in the model and not in the files", name)
    quant = tuple(replace(entry, key=placed[entry.key][0]) for entry in record.quant)
    pairs = present_pairs(model)
    write.export_quantized(
        plain, input_data, quant, pairs, save_path, **names, write_shift=session.plan.write_shift_bit
    )
