"""What the ops on a BatchNorm share: checks, and its maths in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amct_ext.ops._checks import check_float32, require


def check_input(op: str, x: Tensor) -> None:
    check_float32(op, "x", x)
    require(x.dim() >= 2, ValueError, lambda: f"{op}: x must have at least 2 dimensions, not {x.dim()}")


def check_batch_norm(
    op: str,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    **_: object,
) -> None:
    """The arguments that all ops have; others are for the caller to check."""
    check_input(op, x)
    for name, values in (("mean", mean), ("invstd", invstd), ("weight", weight), ("bias", bias)):
        if values is not None:
            check_channels(op, name, values, x)
    known = activation in ("none", "hardswish")
    require(known, ValueError, lambda: f"{op}: activation must be 'none' or 'hardswish', not '{activation}'")
    bounded = lowest is not None or highest is not None
    require(activation == "none" or not bounded, ValueError, lambda: f"{op}: hardswish takes no bounds")


def check_channels(op: str, name: str, values: Tensor, x: Tensor) -> None:
    check_float32(op, name, values)
    fits = values.dim() == 1 and values.numel() == x.shape[1] and values.is_contiguous()
    require(
        fits,
        ValueError,
        lambda: (
            f"{op}: {name} must hold {x.shape[1]} contiguous value(s), one a channel, not shape {list(values.shape)}"
        ),
    )


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c for float32, rounded once but for a few ties: float64 holds the product exactly."""
    return (a.double() * b.double() + c.double()).float()


def normalized(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    factor = invstd if weight is None else invstd * weight
    shift = _multiply_add(-mean, factor, torch.zeros_like(mean) if bias is None else bias)
    return _multiply_add(x, factor.view(shape), shift.view(shape))


def activated(z: Tensor, activation: str, lowest: float | None, highest: float | None) -> Tensor:
    if activation == "hardswish":
        return functional.hardswish(z)
    return z if lowest is None and highest is None else z.clamp(lowest, highest)


def _slope(z: Tensor, activation: str, lowest: float | None, highest: float | None) -> Tensor:
    """The derivative of the activation function at ``z``; bounds belong to the flat parts, as in torch."""
    if activation == "hardswish":
        inner = torch.where(z >= 3, torch.ones_like(z), z / 3 + 0.5)
        return torch.where(z <= -3, torch.zeros_like(z), inner)
    flat = torch.zeros_like(z, dtype=torch.bool)
    if lowest is not None:
        flat = flat | (z <= lowest)
    if highest is not None:
        flat = flat | (z >= highest)
    return (~flat).to(z.dtype)


def input_gradient(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm's input, weight and bias from ``dy``, that of what is behind its output ``z``."""
    dz = dy * _slope(z, activation, lowest, highest)
    others = [axis for axis in range(x.dim()) if axis != 1]
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    centred = x - mean.view(shape)
    d_bias = dz.sum(others, dtype=torch.float64)
    product = (dz.double() * centred).sum(others)
    dx = dz
    if training:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        slope = product * invstd.double().square() / count
        dx = dz - (d_bias / count).float().view(shape) - centred * slope.float().view(shape)
    factor = invstd if weight is None else invstd * weight
    return dx * factor.view(shape), (product * invstd).float(), d_bias.float()
