"""NNCF: ranges and scales of weights and activations are learned, from averages or quantiles of the batches."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError, split_param_groups
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting
from benchmarks.peers.toolkits import WrappedModel

_FLOAT = ("add", "__add__", "__iadd__", "embedding", "layer_norm", "scaled_dot_product_attention")


def _toolkit() -> Any:
    """The package, once its kernels are built: it compiles them at first use and would give up after a minute."""
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "900")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    import nncf
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

    nncf.set_log_level(logging.WARNING)
    # Called through its own registry, a failed build falls back to plain tensor operations: the same values, slower.
    if QuantizedFunctionsCPU.get("Quantize_forward") is ReferenceQuantizedFunctions.Quantize_forward:
        logging.getLogger(__name__).warning("NNCF's kernels were not built: its reference functions are taken")
    return nncf


def prepare(model: nn.Module, task: Task, setting: Setting) -> PreparedModel:
    """Quantised and calibrated; what is neither convolution, linear nor recurrent is told to stay float."""
    if setting.prune or setting.sparse:
        raise UnsupportedError("NNCF 3 has neither channel pruning nor 2:4 masks for torch")
    if setting.weight_bits != 8:
        raise UnsupportedError("its quantised training has INT8 weights; INT4 is for compressing weights alone")
    nncf = _toolkit()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    estimators = RangeEstimatorParametersSet
    ranges = estimators.MEAN_QUANTILE if task.heavy_tails else estimators.MEAN_MINMAX
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    quantized = nncf.quantize(
        WrappedModel(model).eval(),
        nncf.Dataset(task.calibration(CALIBRATION_BATCHES)),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=CALIBRATION_BATCHES,
        fast_bias_correction=True,
        ignored_scope=nncf.IgnoredScope(types=list(_FLOAT), validate=False),
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE,
            activations_range_estimator_params=ranges,
        ),
    )
    return PreparedModel(quantized, split_param_groups(quantized, names, task.budget.lr))
