"""Checks that several ops make of their arguments, with the errors of the kernels (`csrc/common/check.h`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def require(condition: bool, error: type[Exception], message: Callable[[], str]) -> None:
    """Raise unless the condition holds. One on symbolic sizes becomes a guard of the tracer."""
    torch._check_with(error, condition, message)


def check_floating(op: str, name: str, x: Tensor) -> None:
    require(
        x.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        TypeError,
        lambda: f"{op}: {name} must be float32, float64, float16 or bfloat16, not {x.dtype}",
    )


def check_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    word = str(dtype).removeprefix("torch.")
    require(x.dtype == dtype, TypeError, lambda: f"{op}: {name} must be {word}, not {x.dtype}")


def check_float32(op: str, name: str, x: Tensor) -> None:
    """With the words of the kernels' check, which prints C++ types."""
    require(x.dtype == torch.float32, TypeError, lambda: f"{op}: {name} must be Float, not {x.dtype}")


def check_bits(op: str, num_bits: int, max_bits: int = 16) -> None:
    require(
        2 <= num_bits <= max_bits,
        ValueError,
        lambda: f"{op}: num_bits must be between 2 and {max_bits}, not {num_bits}",
    )


def check_axis(op: str, name: str, x: Tensor, axis: int | None) -> None:
    require(
        axis is None or -x.dim() <= axis < x.dim(),
        IndexError,
        lambda: f"{op}: {name} {axis} is out of range for a tensor of {x.dim()} dimensions",
    )


def check_along_axis(op: str, w: Tensor, axis: int, **_: object) -> None:
    """A floating-point weight, and one of its axes."""
    check_floating(op, "w", w)
    check_axis(op, "axis", w, axis)


def check_scalar(op: str, name: str, value: Tensor) -> None:
    require(
        value.numel() == 1,
        ValueError,
        lambda: f"{op}: {name} must hold one value, not shape {tuple(value.shape)}",
    )


def check_value(op: str, name: str, value: Tensor) -> None:
    """One floating-point value."""
    check_floating(op, name, value)
    check_scalar(op, name, value)


def check_same_shape(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    require(
        x.shape == other.shape,
        ValueError,
        lambda: f"{op}: {name} must have the shape of {other_name}, {tuple(other.shape)}, not {tuple(x.shape)}",
    )


def check_float32_like(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """float32, and of the shape of another tensor."""
    check_float32(op, name, x)
    check_same_shape(op, name, x, other_name, other)
