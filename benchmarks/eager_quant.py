"""The rival: the same quantisation, written with ordinary tensor operations as eager toolkits do it."""

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

    def quantised(self, x: Tensor) -> Tensor:
        if not (torch.isfinite(self.clip_max) and torch.isfinite(self.clip_min)):  # the host reads of an eager toolkit
            raise RuntimeError("clips are not finite")
        return LearnedClips.apply(x, self.clip_max, self.clip_min)


class EagerConv2d(_Clips, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantised(x), RangeScale.apply(self.weight), self.bias)


class EagerLinear(_Clips, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantised(x), RangeScale.apply(self.weight), self.bias)


def quantise_eagerly(model: nn.Module) -> nn.Module:
    """Turns the convolutions and linear layers of `model` into their eager quantised forms, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = EagerConv2d
            module.add_clips()  # type: ignore[operator]
        elif type(module) is nn.Linear:
            module.__class__ = EagerLinear
            module.add_clips()  # type: ignore[operator]
    return model
