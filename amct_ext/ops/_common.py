"""What the references share: arithmetic type, guards, channel shapes, checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

FLT_EPSILON = torch.finfo(torch.float32).eps
_Function = TypeVar("_Function", bound=Callable[..., Any])


def reference(name: str) -> Callable[[_Function], _Function]:
    """Register a plain-torch function as the op's implementation on every device that has no kernel of its own.

    It never reads a value on the host.
    """

    def register(function: _Function) -> _Function:
        torch.library.impl(f"amct_ext::{name}", "default")(function)
        return function

    return register


def abstract(name: str) -> Callable[[_Function], _Function]:
    """Register what an op gives for tensors without values: errors, shapes, types, strides, as kernels have them.

    Tracers ask it for every call. The reference would say the same, after tracing all it computes.
    """

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"amct_ext::{name}", function)
        return function

    return register


def accumulate_type(x: Tensor) -> torch.dtype:
    """Arithmetic runs in float32, and in float64 for float64 data."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def code_range(num_bits: int) -> tuple[float, float]:
    """Smallest and largest signed code of `num_bits`."""
    half = 2 ** (num_bits - 1)
    return float(-half), float(half - 1)


def symmetric_scale(largest: Tensor, smallest: Tensor, num_bits: int) -> Tensor:
    """Scale without offset; one more level below zero than above, used when the negative extreme is the larger one."""
    lowest, highest = code_range(num_bits)
    top, bottom = largest.abs(), smallest.abs()
    # Tensors, not numbers: dividing by a Python number may be rewritten as a product with the reciprocal.
    levels = torch.where(top < bottom, torch.full_like(top, -lowest), torch.full_like(top, highest))
    scale = torch.maximum(top, bottom) / levels
    return torch.where(scale < FLT_EPSILON, torch.ones_like(scale), scale)


def along_channels(values: Tensor, x: Tensor, channel_axis: int | None) -> Tensor:
    """Shape per-channel values (or a single one) so that they broadcast against x."""
    if channel_axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[channel_axis] = x.shape[channel_axis]
    return values.reshape(shape)


def other_axes(x: Tensor, channel_axis: int) -> list[int]:
    """All axes but the channel's."""
    axis = channel_axis % x.dim()
    return [i for i in range(x.dim()) if i != axis]


def check_floating(op: str, name: str, x: Tensor) -> None:
    torch._check_type(
        x.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        lambda: f"{op}: {name} must be float32, float64, float16 or bfloat16, not {x.dtype}",
    )


def check_bits(op: str, num_bits: int, most: int = 16) -> None:
    torch._check_value(2 <= num_bits <= most, lambda: f"{op}: num_bits must be between 2 and {most}, not {num_bits}")


def check_axis(op: str, name: str, x: Tensor, axis: int | None) -> None:
    torch._check_index(
        axis is None or -x.dim() <= axis < x.dim(),
        lambda: f"{op}: {name} {axis} is out of range for a tensor of {x.dim()} dimensions",
    )


def check_scalar(op: str, name: str, value: Tensor) -> None:
    torch._check_value(value.numel() == 1, lambda: f"{op}: {name} must hold one value, not shape {tuple(value.shape)}")


def check_scale(op: str, scale: Tensor, x: Tensor, channel_axis: int | None) -> None:
    expected = 1 if channel_axis is None else x.shape[channel_axis]
    torch._check_value(
        scale.numel() == expected,
        lambda: (
            f"{op}: scale must hold {expected} value(s) for channel_axis {channel_axis} of a weight of shape "
            f"{tuple(x.shape)}, not shape {tuple(scale.shape)}"
        ),
    )
