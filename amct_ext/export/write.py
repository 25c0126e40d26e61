"""ONNX files of a compressed model: one to simulate on any runtime, one for the device's compiler.

Works on plain float models: compressed layers are already folded back, 2:4 masks multiplied in, BatchNorm in place.

    fake_quant, deploy = export_quantized(model, images, record.quant, {"conv1": "bn1"}, "out/resnet")
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from amct_ext.common.layer_kinds import ONNX_GATES, keeps_forward, layer_type
from amct_ext.common.references import copy_model
from amct_ext.errors import ExportError, RecordError
from amct_ext.export.axes import Axes, check_axes
from amct_ext.export.capture import Captured, capture, logger, optimize, trace_note
from amct_ext.export.check import check_files
from amct_ext.export.cleanup import clean_up, drop_unused, use_matmul
from amct_ext.export.deploy import lower_deploy
from amct_ext.export.factors import LayerFactors, layer_factors
from amct_ext.export.fake_quant import lower_fake_quant
from amct_ext.export.files import encode, onnx_paths, write_files
from amct_ext.export.fold_batchnorm import fold_batchnorms
from amct_ext.export.markers import DOMAIN, mark_layers, name_layers
from amct_ext.export.precision import precision_of, widened
from amct_ext.export.rnn import lower_rnn_deploy, lower_rnn_fake_quant, mark_rnns
from amct_ext.export.rnn_factors import RnnFactors, rnn_factors
from amct_ext.export.scripted import wrap_scripted
from amct_ext.export.traced import LayerValues
from amct_ext.graph.inputs import Inputs, parse_inputs
from amct_ext.record.types import QuantRecord


def export_quantized(
    model: nn.Module,
    input_data: Any,
    records: Sequence[QuantRecord],
    conv_bn: Mapping[str, str],
    save_path: str | os.PathLike[str],
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    write_shift: bool = False,
    expected: Sequence[torch.Tensor] | None = None,
    values: Callable[[], LayerValues] = dict,
    repeated: Collection[str] = (),
) -> tuple[Path, Path]:
    """Write `<save_path>_fake_quant_model.onnx` and `<save_path>_deploy_model.onnx`; return both paths.

    `records` holds the factors of the quantised layers; `conv_bn` maps a convolution to the BatchNorm behind it, whose
    factor is already in the record's scale_w. With `write_shift` the recorded shifts (searchN) are used: they change
    the arithmetic of the fake-quant model and stand in bits 39:32 of the dequantisation words.

    `expected`: the tensors that the quantised model returns for `input_data`, to compare the file's with; `values`
    gives what its layers and BatchNorms return then, for a forward that decides by values (asked for only there).
    `repeated`: layers that may run several times in a forward; each call is quantised alike.

    The caller's model is not changed, and is exported in eval mode whatever its mode. No file is written unless both
    could be made and load. Errors: RuntimeError (record that does not fit the model, model that cannot be captured,
    layer that is not in the graph, bias beyond INT32, names or axes that do not fit, files that would not load),
    ValueError (factor out of range, save_path).
    """
    paths = onnx_paths(save_path)
    axes = check_axes(input_names, output_names, dynamic_axes)
    if not records:
        raise RecordError("the record holds no quantisation factors: run the model in eval mode once, then save")
    float_model, inputs = _prepare(model, input_data)
    custom_forward = {norm for norm in conv_bn.values() if not keeps_forward(float_model.get_submodule(norm))}
    mirrored = fold_batchnorms(float_model, conv_bn, {record.key for record in records})
    layers, recurrent = _factors(float_model, records, mirrored, write_shift)

    def lower(captured: Captured) -> dict[Path, bytes]:
        use_matmul(captured.model.graph)
        marked = mark_layers(captured.model, float_model, layers, repeated)
        rnns = mark_rnns(captured.model, float_model, recurrent)
        fake_quant = optimize(captured)
        name_layers(fake_quant.graph)
        clean_up(fake_quant, {*marked, *rnns})
        deploy = fake_quant.clone()
        lower_rnn_fake_quant(fake_quant, rnns)
        lower_rnn_deploy(deploy, rnns)
        lower_fake_quant(fake_quant, marked)
        lower_deploy(deploy, marked)
        for lowered in (fake_quant, deploy):
            drop_unused(lowered)
            lowered.opset_imports.pop(DOMAIN, None)
        return {**encode(fake_quant, paths[0], "fakequant"), **encode(deploy, paths[1], "deploy")}

    def folded_values() -> LayerValues:
        known = values()  # a convolution of the float model returns what its BatchNorm returned
        # a BatchNorm with an activation inside returns something else, which no layer of the float model does
        mixed = {conv for conv, norm in conv_bn.items() if norm in custom_forward}
        return {
            name: known[conv_bn.get(name, name)] for name in known if name not in conv_bn.values() and name not in mixed
        }

    _write(float_model, inputs, axes, paths, lower, expected, folded_values)
    return paths


def export_float(
    model: nn.Module,
    input_data: Any,
    save_path: str | os.PathLike[str],
    input_names: list[str] | None = None,
    output_names: list[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    expected: Sequence[torch.Tensor] | None = None,
) -> tuple[Path, Path]:
    """Write the float graph under both names, for a model that is pruned only; return both paths.

    `expected`: the tensors that the model returns for `input_data`. Errors: RuntimeError (model that cannot be
    captured, names or axes that do not fit, files that would not load), ValueError (save_path).
    """
    paths = onnx_paths(save_path)
    axes = check_axes(input_names, output_names, dynamic_axes)
    float_model, inputs = _prepare(model, input_data)

    def lower(captured: Captured) -> dict[Path, bytes]:
        use_matmul(captured.model.graph)
        plain = optimize(captured)
        clean_up(plain, ())
        files = encode(plain.clone(), paths[0], "fakequant")
        return {**files, **encode(plain, paths[1], "deploy")}

    _write(float_model, inputs, axes, paths, lower, expected)
    return paths


def try_capture(model: nn.Module, input_data: Any, trace_first: bool) -> bool:
    """Try to capture the float `model` as a save would, and write nothing; returns whether it was traced.

    `trace_first`: torch.export is tried only where no trace can be made; a forward that it cannot follow may keep it
    busy for a minute. Errors: ExportError where neither way works.
    """
    float_model, inputs = _prepare(model, input_data)
    axes = check_axes(None, None, None)
    with precision_of(float_model):
        if trace_first:
            with contextlib.suppress(ExportError):
                capture(float_model, inputs, axes, traced="not tried")
                return True
        return bool(capture(float_model, inputs, axes).traced_reason)


def _factors(
    model: nn.Module, records: Sequence[QuantRecord], mirrored: Mapping[str, np.ndarray], write_shift: bool
) -> tuple[list[LayerFactors], list[RnnFactors]]:
    """The integers and scales of each recorded layer. Errors: RecordError (no such layer, two entries)."""
    modules = dict(model.named_modules())
    layers: dict[str, LayerFactors] = {}
    recurrent: dict[str, RnnFactors] = {}
    for record in records:
        if record.key not in modules:
            raise RecordError(f"the record names layer {record.key!r}, but the model has no such module")
        if record.key in layers or record.key in recurrent:
            raise RecordError(f"the record holds two entries for layer {record.key!r}")
        module = modules[record.key]
        if isinstance(module, nn.RNNBase) and layer_type(module) in ONNX_GATES:
            recurrent[record.key] = rnn_factors(record, module)
        else:
            layers[record.key] = layer_factors(record, module, write_shift, mirrored.get(record.key))
    return list(layers.values()), list(recurrent.values())


def _write(
    model: nn.Module,
    inputs: Inputs,
    axes: Axes,
    paths: tuple[Path, Path],
    lower: Callable[[Captured], dict[Path, bytes]],
    expected: Sequence[torch.Tensor] | None,
    values: Callable[[], LayerValues] = dict,
) -> None:
    """Capture, lower, check and write. Files of torch.export's graph that do not load are made anew from a trace."""
    with precision_of(model):
        captured = capture(model, inputs, axes, values)
        files = lower(captured)
        tensors = dict(zip(axes.input_names_for(inputs.names(model)), inputs.tensors(), strict=True))
        try:
            check_files(files, *paths, tensors, expected)
        except ExportError as error:
            if captured.traced_reason:
                raise
            try:
                captured = capture(model, inputs, axes, values, traced=str(error))
                files = lower(captured)
                check_files(files, *paths, tensors, expected)
            except ExportError:
                raise error from None
        note = trace_note(captured, model, inputs, list(tensors))
    if note:
        logger.warning("%s: %s", paths[0], note)
    write_files(files)


def _prepare(model: nn.Module, input_data: Any) -> tuple[nn.Module, Inputs]:
    """A float32 copy of the model in eval mode, and arguments to match: the files describe float32 networks."""
    inputs = parse_inputs(model, input_data).in_order(model)
    try:
        duplicate = copy_model(model)
    except Exception as error:
        raise ExportError(f"the model cannot be copied, so it cannot be exported: {error}") from error
    duplicate.eval().requires_grad_(False)
    tensors = [*duplicate.parameters(), *duplicate.buffers()]
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors):
        duplicate.float()
        inputs = inputs.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
    return wrap_scripted(duplicate), widened(inputs)
