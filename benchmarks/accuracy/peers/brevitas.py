"""Brevitas, layer by layer: learned activation scales from a percentile; LSTM and GRU stay float.

INT8 weights take their range per output channel at every step; INT4 weights start at the scale of the least squared
error and learn it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError, split_param_groups
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting


def _layers(bits: int, percentile: float) -> dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]]:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloat

    how: dict[str, Any] = {
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "input_high_percentile_q": percentile,
        "input_low_percentile_q": 100 - percentile,
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": bits,
        "return_quant_tensor": False,
    }
    if bits == 4:
        how |= {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_scaling_impl_type": "parameter_from_stats",
            "weight_narrow_range": False,
        }
    classes = {nn.Conv1d: qnn.QuantConv1d, nn.Conv2d: qnn.QuantConv2d, nn.Linear: qnn.QuantLinear}
    return {kind: (quantized, how) for kind, quantized in classes.items()}


def prepare(model: nn.Module, task: Task, setting: Setting) -> PreparedModel:
    """Quantised and calibrated in evaluation mode."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    if setting.prune or setting.sparse:
        raise UnsupportedError("it quantises only")
    names = [name for name, _ in model.named_parameters()]
    model.eval()
    if setting.weight_bits == 4:
        model = layerwise_quantize(model, _layers(4, task.percentile), name_blacklist=list(task.keep_8_bits))
    model = layerwise_quantize(model, _layers(8, task.percentile))
    batches = task.calibration(CALIBRATION_BATCHES)
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(batch)
    with torch.no_grad():
        model(batches[0])  # scales from statistics become parameters before the optimizer is made
    return PreparedModel(model, split_param_groups(model, names, task.budget.lr))
