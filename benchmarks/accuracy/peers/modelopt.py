"""NVIDIA ModelOpt: ranges from a histogram, fixed in training; LSTM and GRU are quantised too.

Its weights are INT8 and INT4 per output channel; INT4 weights of linear layers in groups of 32 inputs. Its 2:4 masks
are fixed before the training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting

_GROUP, _BINS = 32, 4096


def _config(task: Task, setting: Setting) -> dict[str, Any]:
    from modelopt.torch.quantization.calib import HistogramCalibrator

    bins = {"num_bits": 8, "axis": None, "num_bins": _BINS}
    histogram = {"num_bits": 8, "axis": None, "calibrator": (HistogramCalibrator, (), bins)}
    channels = {"num_bits": 8, "axis": 0}
    rules: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": channels, "enable": True},
        {"quantizer_name": "*input_quantizer", "cfg": histogram, "enable": True},
    ]
    rules.append({"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False})
    if setting.weight_bits == 4:
        rules[1]["cfg"] = {"num_bits": 4, "axis": 0}
        groups = {"num_bits": 4, "block_sizes": {-1: _GROUP}}
        rules.append({"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": groups})
        rules += [{"quantizer_name": f"{name}.weight_quantizer", "cfg": channels} for name in task.keep_8_bits]
    return {"quant_cfg": rules, "algorithm": None}


@torch.no_grad()
def _calibrate(model: nn.Module, batches: list[Tensor], percentile: float) -> None:
    from modelopt.torch.quantization.calib import HistogramCalibrator
    from modelopt.torch.quantization.model_calib import enable_stats_collection
    from modelopt.torch.quantization.nn import TensorQuantizer

    enable_stats_collection(model)
    model.eval()
    for batch in batches:
        model(batch)
    for module in model.modules():
        if not isinstance(module, TensorQuantizer) or module._disabled:
            continue
        if isinstance(module._calibrator, HistogramCalibrator):
            module.load_calib_amax("percentile", percentile=percentile)
        else:
            module.load_calib_amax()
        module.enable_quant()
        module.disable_calib()


def prepare(model: nn.Module, task: Task, setting: Setting) -> PreparedModel:
    """Sparsified where asked for, then quantised and calibrated in evaluation mode."""
    import modelopt.torch.quantization as mtq
    import modelopt.torch.sparsity.weight_sparsity as mts

    if setting.prune:
        raise UnsupportedError("its channel pruning searches sub-networks under a budget, not a given share")
    if setting.sparse:
        model = mts.sparsify(model, "sparse_magnitude")
    model = mtq.quantize(model, _config(task, setting))
    _calibrate(model, task.calibration(CALIBRATION_BATCHES), task.percentile)
    return PreparedModel(model)
