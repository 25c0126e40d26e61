"""Small models for the export tests, their factors, and the fake-quantised network in eager torch to compare with."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from support.checks.onnx_run import run_onnx
from torch import nn

from amct_ext.record.types import QuantRecord


class Mixed(nn.Module):
    """Functional operators between the layers, two layers on one input, a BatchNorm, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 8, 1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.max_pool2d(self.a(x) + torch.sigmoid(self.b(x)), 2)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1))


class Tokens(nn.Module):
    """Linear on 3-D input, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Upsampling(nn.Module):
    """ConvTranspose with groups and a BatchNorm behind it that must stay, circular padding, Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2)
        self.bn = nn.BatchNorm2d(6)
        self.wrap = nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(4, 3, 3, padding="same")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(F.leaky_relu(self.wrap(self.bn(self.grow(x)))).flatten(2))


SHAPES = {Mixed: (4, 3, 6, 6), Tokens: (2, 5, 8), Upsampling: (2, 4, 3, 3)}
PAIRS = {Mixed: {"stem": "bn"}, Tokens: {}, Upsampling: {}}


def build(kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(SHAPES[kind])


def folded_weight(model: nn.Module, name: str, pairs: Mapping[str, str]) -> torch.Tensor:
    weight = model.get_submodule(name).weight.detach()
    if name in pairs:
        bn = model.get_submodule(pairs[name])
        weight = weight * (bn.weight / torch.sqrt(bn.running_var + bn.eps)).reshape(-1, 1, 1, 1)
    return weight


def record_all(model: nn.Module, pairs: Mapping[str, str], **fields: Any) -> list[QuantRecord]:
    """Factors that fit roughly: per channel for convolutions, per tensor for Linear, one offset that is not zero."""
    records = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.ConvTranspose2d)):
            scales: tuple[float, ...] = (float(module.weight.detach().abs().max()) / 127,)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            scales = tuple((folded_weight(model, name, pairs).flatten(1).abs().amax(1) / 127).tolist())
        else:
            continue
        values = {"scale_d": 0.031, "offset_d": -3, "scale_w": scales, "offset_w": (0,) * len(scales)}
        records.append(QuantRecord(key=name, **{**values, **fields}))
    return records


def simulate(model: nn.Module, x: torch.Tensor, records: list[QuantRecord], pairs: Mapping[str, str]) -> np.ndarray:
    """The fake-quantised network in eager torch, written from the formulas."""
    net = copy.deepcopy(model)
    for conv, bn in pairs.items():
        fused = torch.nn.utils.fuse_conv_bn_eval(net.get_submodule(conv), net.get_submodule(bn))
        setattr(net, conv, fused)
        setattr(net, bn, nn.Identity())
    for record in records:
        layer = net.get_submodule(record.key)
        scale = torch.tensor(record.scale_w)
        if len(scale) > 1:
            scale = scale.reshape([-1] + [1] * (layer.weight.dim() - 1))
        layer.weight.data = (layer.weight / scale).round().clamp(-128, 127) * scale
        if layer.bias is not None and record.key != "up":  # the Linear on tokens adds its bias in float
            step = scale.flatten() * record.scale_d
            layer.bias.data = (layer.bias / step).round() * step

        def quantize(_: nn.Module, inputs: tuple[torch.Tensor], record: QuantRecord = record) -> torch.Tensor:
            q = ((inputs[0] / record.scale_d).round() + record.offset_d).clamp(-128, 127)
            return (q - record.offset_d) * record.scale_d

        layer.register_forward_pre_hook(quantize)
    with torch.no_grad():
        return net(x).numpy()


def run(path: Path, *inputs: torch.Tensor) -> np.ndarray:
    return run_onnx(path, *inputs).numpy()


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def nodes(path: Path) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in onnx.load(path).graph.node}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)
