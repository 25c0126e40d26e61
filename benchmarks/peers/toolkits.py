"""Quantisation-aware training of other toolkits on the same layers: convolutions and linear layers, INT8.

Each builder takes a float model and a batch and returns the toolkit's model: activations per tensor and asymmetric,
weights per channel and symmetric, both 8 bits. Where a toolkit does more than that, its builder says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (nn.Conv2d, nn.Linear)
Builder = Callable[[nn.Module, Tensor], nn.Module]


class _QuantizedInput(nn.Module):
    """What eager torch.ao asks for: a stub where a tensor is to be quantised."""

    def __init__(self, layer: nn.Module, stub: nn.Module) -> None:
        super().__init__()
        self.stub = stub
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stub(x))


class WrappedModel(nn.Module):
    """A model one level down, for toolkits that cannot trace a Sequential at the top."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def torch_eager(model: nn.Module, x: Tensor) -> nn.Module:
    """torch.ao's eager mode on layers alone: a stub before each of them, its x86 QAT configuration, BN left alone."""
    import torch.ao.quantization as ao

    default = ao.get_default_qat_qconfig("x86")
    # The x86 default keeps a bit unused for processors without VNNI; the others use all of them.
    activation = ao.FusedMovingAvgObsFakeQuantize.with_args(quant_min=0, quant_max=255, dtype=torch.quint8)
    for name, module in list(model.named_modules()):
        if type(module) in LAYERS:
            parent, _, child = name.rpartition(".")
            module.qconfig = ao.QConfig(activation=nn.Identity, weight=default.weight)
            stub = ao.QuantStub(ao.QConfig(activation=activation, weight=default.weight))
            setattr(model.get_submodule(parent), child, _QuantizedInput(module, stub))
    return ao.prepare_qat(model.train(), inplace=True)


def torch_fx(model: nn.Module, x: Tensor) -> nn.Module:
    """torch.ao's FX mode as it comes: BN folded into the convolutions, additions quantised, too."""
    import torch.ao.quantization as ao
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model.train(), ao.get_default_qat_qconfig_mapping("x86"), (x,))


def torchao_pt2e(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao on an exported graph, inputs and weights of layers marked with its X86 settings; it folds BN by itself.

    Its own X86InductorQuantizer fails where a module is called twice, as the small ResNet does with its ReLU, and
    quantises some additions, too.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)

    class Layers(Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                    specs = {node.args[0]: config.input_activation, node.args[1]: config.weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    graph = torch.export.export(model.train(), (x,), strict=False).module()
    return allow_exported_model_train_eval(prepare_qat_pt2e(graph, Layers()))


def torchao_compiled(model: nn.Module, x: Tensor) -> nn.Module:
    """The same under torch.compile, after a step that gives the observers' buffers their sizes."""
    prepared = torchao_pt2e(model, x)
    prepared(x)
    return torch.compile(prepared)  # type: ignore[return-value]


def torchao_linear(model: nn.Module, x: Tensor) -> nn.Module:
    """torchao's QAT of linear layers: dynamic activation scales, one per token, for it has no static ones."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    if not all(type(module) is nn.Linear for module in model.modules() if isinstance(module, LAYERS)):
        raise TypeError("linear layers only")
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return model


def brevitas(model: nn.Module, x: Tensor) -> nn.Module:
    """brevitas layer by layer: learned activation scales and zero points, ranges of weights with their gradient."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    how = {
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "weight_quant": Int8WeightPerChannelFloat,
        "return_quant_tensor": False,
    }
    model = layerwise_quantize(model, {nn.Conv2d: (qnn.QuantConv2d, how), nn.Linear: (qnn.QuantLinear, how)})
    with torch.no_grad(), calibration_mode(model):
        model(x)
    return model


def nncf(model: nn.Module, x: Tensor) -> nn.Module:
    """NNCF: all scales learned, those of weights, too; what is neither convolution nor linear is told to stay float."""
    # It compiles its kernels at first use and would give up after a minute.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "600")
    import nncf as toolkit
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    from nncf.torch.quantization.reference import ReferenceQuantizedFunctions

    toolkit.set_log_level(logging.WARNING)
    # Called through its own registry, a failed build falls back to plain tensor operations.
    if QuantizedFunctionsCPU.get("Quantize_forward") is ReferenceQuantizedFunctions.Quantize_forward:
        raise RuntimeError("its kernels were not built; that takes ninja and a C++ compiler on PATH")
    floats = ["add", "__add__", "__iadd__", "embedding", "layer_norm", "scaled_dot_product_attention"]
    return toolkit.quantize(
        WrappedModel(model).eval(),
        toolkit.Dataset([x]),
        preset=toolkit.QuantizationPreset.MIXED,
        target_device=toolkit.TargetDevice.CPU,
        subset_size=1,
        ignored_scope=toolkit.IgnoredScope(types=floats, validate=False),
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE, disable_bias_correction=True, disable_channel_alignment=True
        ),
    )


@dataclass(frozen=True)
class Peer:
    """A toolkit's way of training; ``observing``: whether its ranges are still observed (None: nothing to set)."""

    package: str
    build: Builder
    observing: bool | None = None

    def version(self) -> str | None:
        """None where the package is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def ready(self, model: nn.Module) -> None:
        """Sets the observers of a model; several peers may share one that differs in nothing else."""
        for module in model.modules():
            switch: Any = getattr(module, "enable_observer", None)
            if self.observing is not None and switch is not None:
                switch(self.observing)


PEERS = {
    "torch.ao eager": Peer("torch", torch_eager, True),
    "torch.ao eager, ranges frozen": Peer("torch", torch_eager, False),
    "torch.ao FX, ranges frozen": Peer("torch", torch_fx, False),
    "torchao PT2E": Peer("torchao", torchao_pt2e, True),
    "torchao PT2E, ranges frozen": Peer("torchao", torchao_pt2e, False),
    "torchao linear, scales per token": Peer("torchao", torchao_linear),
    "brevitas": Peer("brevitas", brevitas),
    "NNCF": Peer("nncf", nncf),
}
COMPILED = {"torchao PT2E, ranges frozen, compiled": Peer("torchao", torchao_compiled, False)}
_QUANTIZERS = {
    "FusedMovingAvgObsFakeQuantize",
    "IntxFakeQuantizer",
    "RescalingIntQuant",
    "AsymmetricQuantizer",
    "SymmetricQuantizer",
}


def quantizers(model: nn.Module) -> int:
    """How many tensors a peer's model quantises, activations and weights together."""
    return sum(type(module).__name__ in _QUANTIZERS for module in model.modules())
