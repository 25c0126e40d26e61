"""torchao: PT2E on an exported graph (static ranges), and its QAT of linear layers (a scale per token).

PT2E quantises the inputs and weights of convolutions and linear layers and folds BatchNorm by itself; LSTM and GRU
stay float. Its ranges are moving averages; they are frozen halfway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.accuracy.prepared_model import CALIBRATION_BATCHES, PreparedModel, UnsupportedError
from benchmarks.accuracy.tasks.base import Task
from benchmarks.accuracy.tasks.registry import Setting

_GROUP = 32
_PT2E_LAYERS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


def _layer_quantizer(task: Task, model: nn.Module, bits: int) -> object:
    """torchao's quantiser interface for layers alone, per-tensor inputs and per-channel weights."""
    from torchao.quantization.pt2e import FakeQuantize, FusedMovingAvgObsFakeQuantize
    from torchao.quantization.pt2e.observer import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

    inputs = QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
    )

    def weights(width: int) -> QuantizationSpec:
        observer = MovingAveragePerChannelMinMaxObserver
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer, averaging_constant=1.0),
            quant_min=-(2 ** (width - 1)) + (width == 8),
            quant_max=2 ** (width - 1) - 1,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    class Layers(Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.target not in _PT2E_LAYERS:
                    continue
                name = str(node.args[1])
                width = 8 if any(kept in name for kept in task.keep_8_bits) else bits
                specs = {node.args[0]: inputs, node.args[1]: weights(width)}
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return Layers()


def _freeze_halfway(model: nn.Module, steps: int) -> Callable[[int], None]:
    from torchao.quantization.pt2e import disable_observer

    def before_step(step: int) -> None:
        if step == steps // 2:
            for module in model.modules():
                if not getattr(module, "is_per_channel", False):  # weights take their range at every step
                    disable_observer(module)

    return before_step


def prepare_pt2e(model: nn.Module, task: Task, setting: Setting, freeze: bool = True) -> PreparedModel:
    """Exported in training mode, calibrated, its ranges frozen halfway."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    if setting.prune or setting.sparse:
        raise UnsupportedError("PT2E quantises only")
    exported = torch.export.export(model.train(), (task.example(),)).module()
    prepared = allow_exported_model_train_eval(
        prepare_qat_pt2e(exported, _layer_quantizer(task, model, setting.weight_bits))
    )
    prepared.eval()
    with torch.no_grad():
        for batch in task.calibration(CALIBRATION_BATCHES):
            prepared(batch)
    return PreparedModel(prepared, before_step=_freeze_halfway(prepared, task.budget.steps) if freeze else None)


def prepare_linear(model: nn.Module, task: Task, setting: Setting, grouped: bool = True) -> PreparedModel:
    """Linear layers: INT8 inputs with a scale per token, weights per channel or in groups of 32 inputs."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if setting.prune or setting.sparse:
        raise UnsupportedError("its QAT quantises only")
    others = (nn.Conv1d, nn.Conv2d, nn.LSTM, nn.GRU)
    if any(isinstance(module, others) for module in model.modules()):
        raise UnsupportedError("its QAT by modules takes linear layers only")
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    dtype = torch.int8 if setting.weight_bits == 8 else getattr(torch, "int4")  # noqa: B009 (not in torch's types)
    if setting.weight_bits == 4 and grouped:
        weights = IntxFakeQuantizeConfig(dtype, group_size=_GROUP, is_symmetric=True)
    else:
        weights = IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return PreparedModel(model)
