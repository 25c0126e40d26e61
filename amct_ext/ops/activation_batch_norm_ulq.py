"""BatchNorm, an activation function and activation quantisation with learned clips (ULQ) in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_ext.ops._activation_clips import check_activation, empty_results
from amct_ext.ops._arithmetic import empty_scalar
from amct_ext.ops._batch_norm import activated, check_batch_norm, input_gradient, normalized
from amct_ext.ops._checks import check_bits, check_float32_like, check_scalar
from amct_ext.ops._registration import reference

__all__ = ["batch_norm_ulq", "batch_norm_ulq_backward"]


def batch_norm_ulq(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise along axis 1, apply an activation function and fake-quantise between two learned clips.

    Args:
        x: at least 2 dimensions, float32.
        mean, invstd: float32, one value a channel: the mean, and 1 / sqrt(variance + eps).
        weight, bias: BatchNorm's parameters, float32, one value a channel, or None.
        activation: "none" or "hardswish".
        lowest, highest: bounds in place of an activation function, or None. ReLU is `lowest` 0, ReLU6 also `highest` 6.
        clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min: as `ulq_fake_quantize`.

    Returns: what `ulq_fake_quantize` returns. One read of x and one write. BatchNorm rounds as torch's CPU kernels on
    processors with FMA: one multiply-add a value.

    Gradients: none; it stands in for ops that have some, below autograd. `batch_norm_ulq_backward` is its gradient.

    Errors: TypeError for a dtype other than float32, ValueError for shapes, bounds or num_bits that do not fit.

    Source: activated BatchNorm in place (Rota Bulò et al., 2018) followed by AMCT's ULQ.

        >>> x, one, none = torch.tensor([[1.0, -4.0], [3.0, 8.0]]), torch.tensor(1.0), torch.tensor(float("nan"))
        >>> y, *_ = batch_norm_ulq(
        ...     x, x.mean(0), torch.tensor([1.0, 0.125]), None, None, "none", 0.0, None, one, -one, none, none
        ... )
        >>> [[round(v, 4) for v in row] for row in y.tolist()]
        [[0.0, 0.0], [0.9961, 0.7529]]
    """
    return torch.ops.amct_ext.batch_norm_ulq(
        x,
        mean,
        invstd,
        weight,
        bias,
        activation,
        lowest,
        highest,
        clip_max,
        clip_min,
        prev_clip_max,
        prev_clip_min,
        num_bits,
        fixed_min,
    )


def batch_norm_ulq_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    num_bits: int = 8,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `batch_norm_ulq`: `(dx, d_weight, d_bias, d_clip_max, d_clip_min)`.

    Args:
        grad: gradient of y, float32, shape of x.
        clip_max, clip_min: the *effective* clips that the forward returned.
        training: mean and invstd were computed from x, so x has a gradient through them too; else they are constants.
        x, mean, invstd, weight, bias, activation, lowest, highest, num_bits: as in the forward.

    Returns: dx like x; d_weight and d_bias float32, one value a channel (also where the parameter is None); the clips'
    gradients 0-dim with the clips' dtype. Sums run in float64 over fixed blocks: the same bits for any number of
    threads. Neither the normalised values nor the activation function's results are needed: both are computed again.

    Errors: as the forward; ValueError where grad and x differ in shape.

    Source: activated BatchNorm in place (Rota Bulò et al., 2018) followed by AMCT's ULQ.

        >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
        >>> dx, d_weight, d_bias, *_ = batch_norm_ulq_backward(
        ...     torch.tensor([[1.0], [2.0]]), x, 2 * one, one, None, None, "none", None, None, one, -one
        ... )
        >>> dx.flatten().tolist(), d_weight.tolist(), d_bias.tolist()
        ([0.0, 0.0], [2.0], [2.0])
    """
    return torch.ops.amct_ext.batch_norm_ulq_backward(
        grad, x, mean, invstd, weight, bias, activation, lowest, highest, clip_max, clip_min, num_bits, training
    )


def _check_forward(op: str, x: Tensor, **others: Any) -> None:
    check_batch_norm(op, x, **others)
    check_activation(op, x, **others)


def _check_backward(
    op: str, grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int, **others: Any
) -> None:
    check_batch_norm(op, x, **others)
    check_float32_like(op, "grad", grad, "x", x)
    check_bits(op, num_bits)
    check_scalar(op, "clip_max", clip_max)
    check_scalar(op, "clip_min", clip_min)


def _empty(x: Tensor, clip_max: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_results(x, clip_max.dtype)


def _empty_backward(
    x: Tensor, mean: Tensor, clip_max: Tensor, clip_min: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    clips = empty_scalar(x, clip_max.dtype), empty_scalar(x, clip_min.dtype)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), *clips


@reference("batch_norm_ulq", check=_check_forward, empty=_empty)
def batch_norm_ulq_reference(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = activated(normalized(x, mean, invstd, weight, bias), activation, lowest, highest)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.amct_ext.ulq_fake_quantize(
        values, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min
    )
    return results


@reference("batch_norm_ulq_backward", check=_check_backward, empty=_empty_backward)
def batch_norm_ulq_backward_reference(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    clip_max: Tensor,
    clip_min: Tensor,
    num_bits: int = 8,
    training: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = normalized(x, mean, invstd, weight, bias)
    values = activated(z, activation, lowest, highest)
    d_values, d_max, d_min = torch.ops.amct_ext.ulq_fake_quantize_backward(grad, values, clip_max, clip_min, num_bits)
    results = input_gradient(d_values, z, x, mean, invstd, weight, activation, lowest, highest, training)
    return *results, d_max, d_min
