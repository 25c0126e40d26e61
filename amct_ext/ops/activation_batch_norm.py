"""BatchNorm with an activation function or an addition in one pass; its statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_ext.ops._batch_norm import (
    activated,
    check_batch_norm,
    check_channels,
    check_input,
    input_gradient,
    normalized,
)
from amct_ext.ops._checks import check_float32_like, require
from amct_ext.ops._registration import reference

__all__ = ["batch_norm_activation", "batch_norm_activation_backward", "batch_norm_statistics_"]


def batch_norm_statistics_(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel of a BatchNorm's input; updates the running statistics.

    Args:
        x: at least 2 dimensions, more than one value a channel (axis 1), float32.
        running_mean, running_var: float32, one value a channel, or None; updated as by torch's BatchNorm.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns: (mean, invstd), float32, one value a channel. Sums are taken in float64, what they are taken of and all
    results are rounded to float32, as in torch's kernel for contiguous tensors. Only the order of the sums differs, so
    results have torch's bits unless a sum lies within 1e-13 of where float32 rounds the other way.

    Errors: TypeError for a dtype other than float32, ValueError for shapes.

    Source: batch normalisation (Ioffe and Szegedy, 2015), in the arithmetic of torch's CPU kernel.

        >>> running = torch.zeros(1), torch.ones(1)
        >>> mean, invstd = batch_norm_statistics_(torch.tensor([[1.0], [3.0]]), *running, 0.5, 0.0)
        >>> mean.item(), invstd.item(), running[0].item(), running[1].item()
        (2.0, 1.0, 1.0, 1.5)
    """
    return torch.ops.amct_ext.batch_norm_statistics_(x, running_mean, running_var, momentum, eps)


def batch_norm_activation(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    addend: Tensor | None = None,
) -> Tensor:
    """Normalise along axis 1, add another tensor where there is one, and apply an activation function.

    Args:
        x, mean, invstd, weight, bias, activation, lowest, highest: as `batch_norm_ulq`.
        addend: float32, shape of x, or None.

    Returns: a tensor like x, in one pass, with the bits of torch's BatchNorm on processors with FMA, its addition and
    its activation function.

    Gradients: none; it stands in for ops that have some, below autograd. `batch_norm_activation_backward` is its
    gradient.

    Errors: as `batch_norm_ulq`; ValueError for an addend of another shape.

    Source: batch normalisation (Ioffe and Szegedy, 2015).

        >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
        >>> batch_norm_activation(x, 2 * one, one, None, None, "none", 0.0, None, addend=x).flatten().tolist()
        [0.0, 4.0]
    """
    return torch.ops.amct_ext.batch_norm_activation(x, mean, invstd, weight, bias, activation, lowest, highest, addend)


def batch_norm_activation_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `batch_norm_activation` without an addend: `(dx, d_weight, d_bias)`.

    Args:
        grad: gradient of the result, float32, shape of x.
        training, and all others: as `batch_norm_ulq_backward`.

    Returns: as `batch_norm_ulq_backward`, without the clips.

    Errors: as `batch_norm_activation`; ValueError where grad and x differ in shape.

    Source: activated BatchNorm in place (Rota Bulò et al., 2018).

        >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
        >>> dx, d_weight, d_bias = batch_norm_activation_backward(
        ...     torch.tensor([[1.0], [2.0]]), x, 2 * one, one, None, None, "none", None, None
        ... )
        >>> dx.flatten().tolist(), d_weight.tolist(), d_bias.tolist()
        ([0.0, 0.0], [1.0], [3.0])
    """
    return torch.ops.amct_ext.batch_norm_activation_backward(
        grad, x, mean, invstd, weight, bias, activation, lowest, highest, training
    )


def _check_statistics(op: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, **_: object) -> None:
    check_input(op, x)
    enough = x.numel() > x.shape[1]
    require(enough, ValueError, lambda: f"{op}: x must hold more than one value a channel, not shape {list(x.shape)}")
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        if values is not None:
            check_channels(op, name, values, x)


def _check(op: str, x: Tensor, grad: Tensor | None = None, addend: Tensor | None = None, **others: Any) -> None:
    check_batch_norm(op, x, **others)
    if grad is not None:
        check_float32_like(op, "grad", grad, "x", x)
    if addend is not None:
        check_float32_like(op, "addend", addend, "x", x)


def _empty_statistics(x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@reference("batch_norm_statistics_", check=_check_statistics, empty=_empty_statistics)
def batch_norm_statistics_reference(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    others = [axis for axis in range(x.dim()) if axis != 1]
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    count = x.numel() // x.shape[1]
    mean = (x.sum(others, dtype=torch.float64) / count).float()
    squares = (x - mean.view(shape)).square().sum(others, dtype=torch.float64).float()
    share = torch.tensor(momentum, dtype=torch.float32, device=x.device)
    if running_mean is not None:
        running_mean.copy_(share * mean + (1 - share) * running_mean)
    if running_var is not None:
        unbiased = squares / (count - 1)
        running_var.copy_(share.double() * unbiased.double() + ((1 - share) * running_var).double())
    return mean, ((squares / count).double() + eps).sqrt().reciprocal().float()


def _empty(x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x)


@reference("batch_norm_activation", check=_check, empty=_empty)
def batch_norm_activation_reference(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    addend: Tensor | None = None,
) -> Tensor:
    z = normalized(x, mean, invstd, weight, bias)
    return activated(z if addend is None else z + addend, activation, lowest, highest)


def _empty_backward(x: Tensor, mean: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


@reference("batch_norm_activation_backward", check=_check, empty=_empty_backward)
def batch_norm_activation_backward_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    z = normalized(x, mean, invstd, weight, bias)
    return input_gradient(grad, z, x, mean, invstd, weight, activation, lowest, highest, training)
