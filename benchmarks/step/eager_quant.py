"""The baselines: the same quantisation in plain tensor operations, as eager toolkits do it, and in torch's own ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps


class LearnedClips(torch.autograd.Function):
    """Activation fake quantisation with gradients to both clips, one tensor operation after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, clip_min: Tensor) -> Tensor:
        high, low = clip_max.clamp(min=0), clip_min.clamp(max=0)
        scale = (high - low) / 255
        offset = torch.round(-128 - low / scale)
        ctx.save_for_backward(x, clip_max, clip_min, scale, offset)
        return (torch.clamp(torch.round(x / scale + offset), -128, 127) - offset) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        x, clip_max, clip_min, scale, offset = ctx.saved_tensors
        above, below = x > scale * (127 - offset), x < scale * (-128 - offset)
        z = torch.where(above, clip_max, torch.where(below, clip_min, x)) / scale
        error = (torch.round(z) - z) / 255
        d_max = ((error + above.to(x.dtype)) * gradient).sum()
        d_min = ((below.to(x.dtype) - error) * gradient).sum()
        return torch.where(above | below, torch.zeros_like(gradient), gradient), d_max, d_min


class RangeScale(torch.autograd.Function):
    """Symmetric weight fake quantisation, a scale per output channel from the weight's range; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        high, low = rows.max(1).values, rows.min(1).values
        limit = torch.where(high.abs() < low.abs(), 128.0, 127.0)
        scale = torch.maximum(high.abs(), low.abs()) / limit
        scale = torch.where(scale < EPS, torch.ones_like(scale), scale).view(-1, *[1] * (weight.dim() - 1))
        return torch.clamp(torch.round(weight / scale), -128, 127) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Clips(nn.Module):
    clip_max: nn.Parameter
    clip_min: nn.Parameter

    def add_clips(self) -> None:
        self.clip_max = nn.Parameter(torch.tensor(4.0))
        self.clip_min = nn.Parameter(torch.tensor(-4.0))

    def quantized(self, x: Tensor) -> Tensor:
        if not (torch.isfinite(self.clip_max) and torch.isfinite(self.clip_min)):  # the host reads of an eager toolkit
            raise RuntimeError("clips are not finite")
        return LearnedClips.apply(x, self.clip_max, self.clip_min)


class EagerConv2d(_Clips, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized(x), RangeScale.apply(self.weight), self.bias)


class EagerLinear(_Clips, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized(x), RangeScale.apply(self.weight), self.bias)


class _LearnedScale(nn.Module):
    """As torch.ao's learnable fake-quantisation module does it: a learned scale and zero point, torch's fused ops."""

    weight: Any
    weight_zero: Tensor
    scale: nn.Parameter
    zero_point: nn.Parameter

    def add_clips(self) -> None:
        self.scale, self.zero_point = nn.Parameter(torch.tensor([8 / 255])), nn.Parameter(torch.tensor([0.0]))
        self.register_buffer("weight_zero", torch.zeros(len(self.weight), dtype=torch.int32))

    def quantized(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(min=EPS)
        return torch._fake_quantize_learnable_per_tensor_affine(x, self.scale, self.zero_point, -128, 127, 1.0)

    def quantized_weight(self) -> Tensor:
        with torch.no_grad():  # a min-max observer
            low, high = torch.aminmax(self.weight.flatten(1), dim=1)
            scale = torch.maximum(-low, high).div(127.5).clamp_(min=EPS)
        return torch.fake_quantize_per_channel_affine(self.weight, scale, self.weight_zero, 0, -128, 127)


class TorchConv2d(_LearnedScale, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized(x), self.quantized_weight(), self.bias)


class TorchLinear(_LearnedScale, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized(x), self.quantized_weight(), self.bias)


def _replace(model: nn.Module, conv: type, linear: type) -> nn.Module:
    for module in list(model.modules()):
        cls = {nn.Conv2d: conv, nn.Linear: linear}.get(type(module))
        if cls is not None:
            module.__class__ = cls
            module.add_clips()  # type: ignore[operator]
    return model


def quantize_eagerly(model: nn.Module) -> nn.Module:
    """Turns the convolutions and linear layers of `model` into their eager quantised forms, in place."""
    return _replace(model, EagerConv2d, EagerLinear)


def quantize_with_torch_ops(model: nn.Module) -> nn.Module:
    """The same with the fake-quantisation ops that torch brings."""
    return _replace(model, TorchConv2d, TorchLinear)
