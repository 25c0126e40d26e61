"""The last step of every flow: a retrained model to ONNX files, by way of its float form."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import nn

from amct_ext.common.layer_kinds import computed_parameter
from amct_ext.common.references import copy_model
from amct_ext.common.validation import check_types
from amct_ext.errors import InputDataError, ModelError, RecordError
from amct_ext.export import write
from amct_ext.export.axes import check_axes
from amct_ext.export.precision import precision_of, widened
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.graph.run import preserved_state, tensors_in
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.model_surgery.hooks import detach
from amct_ext.model_surgery.lookup import compressed_layers, layers_by_created_name
from amct_ext.model_surgery.record_factors import check_record
from amct_ext.model_surgery.session import present_pairs, raise_if_invalid, session_of
from amct_ext.model_surgery.swap import fold_layers
from amct_ext.record.text import read_record

logger = logging.getLogger(__name__)


class ExportNames(TypedDict):
    """The naming arguments that all save functions share."""

    input_names: list[str] | None
    output_names: list[str] | None
    dynamic_axes: dict[str, Any] | None


def export_names(
    input_names: list[str] | None, output_names: list[str] | None, dynamic_axes: dict[str, Any] | None
) -> ExportNames:
    """The naming arguments, checked. Errors: TypeError, ExportError."""
    check_types(
        input_names=(input_names, list, type(None)),
        output_names=(output_names, list, type(None)),
        dynamic_axes=(dynamic_axes, dict, type(None)),
    )
    check_axes(input_names, output_names, dynamic_axes)
    return {"input_names": input_names, "output_names": output_names, "dynamic_axes": dynamic_axes}


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are quantised."""
    return [name for name, layer in compressed_layers(model) if layer.weight_quant is not None]


@dataclass(frozen=True)
class FloatForm:
    """A compressed model as the exporter wants it: `model` has float layers, 2:4 masks in their weights, eval mode.

    `expected`: the tensors that the compressed model returned for `inputs` in its own evaluation.
    """

    model: nn.Module
    inputs: Inputs
    expected: list[torch.Tensor]


def to_float_form(model: nn.Module, input_data: Any) -> FloatForm:
    """The float form of a copy; `model` is left as it is. Errors: ModelError, InputDataError."""
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
                "it into the layer's weight (merge() or merge_and_unload() in peft), call "
                "amct_ext.update_record(model), then save"
            )
    try:
        duplicate = copy_model(model).eval()
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be copied, so it cannot be exported: {error}") from error
    detach(duplicate)  # a forward of the copy must not write the record
    inputs = parse_inputs(duplicate, input_data)
    expected = [tensor.detach().clone() for tensor in tensors_in(_evaluation(duplicate, inputs))]
    return FloatForm(fold_layers(duplicate).eval(), inputs, expected)


def layer_values(model: nn.Module, inputs: Inputs, names: Collection[str]) -> dict[str, list[list[torch.Tensor]]]:
    """By module, what each of its calls returned in the evaluation of a copy of the model. Errors: InputDataError."""
    duplicate = copy_model(model)
    detach(duplicate)
    found: dict[str, list[list[torch.Tensor]]] = {name: [] for name in names}
    for name in names:

        def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
            found[name].append([tensor.detach().clone() for tensor in tensors_in(output)])

        duplicate.get_submodule(name).register_forward_hook(keep)
    _evaluation(duplicate, inputs)
    return found


def runs_repeatedly(layer: CompressedLayer) -> bool:
    """Whether a layer ran several times in one forward at create."""
    return any(quantizer.every_call_calibrates for quantizer in layer.own_quantizers)


def _evaluation(model: nn.Module, inputs: Inputs) -> object:
    """What the model returns in eval mode and its own precision, whatever is switched on around it."""
    with preserved_state(model), torch.no_grad(), precision_of(model):
        try:
            return inputs.copied().call(model)
        except Exception as error:
            wide = widened(inputs)  # a float32 model takes half precision under autocast alone
            if any(a is not b for a, b in zip(inputs.tensors(), wide.tensors(), strict=True)):
                with contextlib.suppress(Exception):
                    return wide.copied().call(model)
            raise InputDataError(f"the model rejects input_data ({inputs}): {type(error).__name__}: {error}") from error


def save_float(model: nn.Module, save_path: str, input_data: Any, names: ExportNames) -> None:
    """Write the float graph of a model that is not quantised under both names. Errors: those of the export."""
    float_form = to_float_form(model, input_data)
    write.export_float(float_form.model, float_form.inputs, save_path, **names, expected=float_form.expected)


def save_quantized(
    model: nn.Module,
    record_file: str,
    save_path: str,
    input_data: Any,
    names: ExportNames,
    float_form: FloatForm | None = None,
) -> None:
    """Write both files of a quantised model; `float_form` is that of the model, where it was made already.

    Errors: FileNotFoundError; RecordError (record without factors, or damaged); StaleStateError (factors of another
    state of the model); InvalidDataError; those of the export.
    """
    session = session_of(model)
    raise_if_invalid(model)
    record = read_record(record_file)
    if not record.quant:
        uncalibrated = [name for name, layer in compressed_layers(model) if not layer.recordable]
        todo = (
            f"'{uncalibrated[0]}' and {len(uncalibrated) - 1} other layer(s) are not calibrated; train the model, or "
            "call amct_ext.calibrate(model, batches), then run a forward in eval mode"
            if uncalibrated
            else f"run a forward in eval mode, or call amct_ext.update_record(model, {record_file!r})"
        )
        raise RecordError(f"{record_file}: no quantisation factors recorded: {todo}")
    check_record(model, record, record_file)
    placed = layers_by_created_name(model)
    for name, layer in compressed_layers(model):
        if placed[layer.layer_name][1] is not layer:
            raise ModelError(
                f"layer '{name}' is a copy of the compressed layer '{layer.layer_name}' and has no factors of its own; "
                "put it into the model before create, or a float layer in its place"
            )
    for name in session.order:
        if name not in placed:
            logger.warning("layer '%s', compressed at create, is no longer in the model and not in the files", name)
    float_form = float_form or to_float_form(model, input_data)
    inputs, pairs = float_form.inputs, present_pairs(model)
    watched = {*quantized_layers(model), *pairs.values()}
    write.export_quantized(
        float_form.model,
        inputs,
        tuple(replace(entry, key=placed[entry.key][0]) for entry in record.quant),
        pairs,
        save_path,
        **names,
        write_shift=session.plan.write_shift_bit,
        expected=float_form.expected,
        values=lambda: layer_values(model, inputs, watched),
        repeated={name for name, layer in compressed_layers(model) if runs_repeatedly(layer)},
    )
