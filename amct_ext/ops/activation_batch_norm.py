"""BatchNorm, an activation function and activation quantisation with learned clips (ULQ) in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amct_ext.ops._activation_clips import check_activation, empty_results
from amct_ext.ops._arithmetic import empty_scalar
from amct_ext.ops._checks import check_bits, check_same_shape, check_scalar, require
from amct_ext.ops._registration import reference

__all__ = ["batch_norm_statistics_", "batch_norm_ulq", "batch_norm_ulq_backward"]


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

    Source: activated BatchNorm in place (Rota Bulo et al., 2018) followed by AMCT's ULQ.

        >>> x, one, none = torch.tensor([[1.0, -4.0], [3.0, 8.0]]), torch.tensor(1.0), torch.tensor(float("nan"))
        >>> y, *_ = batch_norm_ulq(
        ...     x, x.mean(0), torch.tensor([1.0, 0.125]), None, None, "none", 0.0, None, one, -one, none, none
        ... )
        >>> [[round(v, 4) for v in row] for row in y.tolist()]
        [[0.0, 0.0], [1.0039, 0.7529]]
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

    Source: activated BatchNorm in place (Rota Bulo et al., 2018) followed by AMCT's ULQ.

        >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
        >>> dx, d_weight, d_bias, *_ = batch_norm_ulq_backward(
        ...     torch.tensor([[1.0], [2.0]]), x, 2 * one, one, None, None, "none", None, None, one, -one
        ... )
        >>> dx.flatten().tolist(), d_weight.tolist(), d_bias.tolist()
        ([0.0, 0.0], [1.0], [3.0])
    """
    return torch.ops.amct_ext.batch_norm_ulq_backward(
        grad, x, mean, invstd, weight, bias, activation, lowest, highest, clip_max, clip_min, num_bits, training
    )


def _check_input(op: str, x: Tensor) -> None:
    require(x.dtype == torch.float32, TypeError, lambda: f"{op}: x must be Float, not {x.dtype}")
    require(x.dim() >= 2, ValueError, lambda: f"{op}: x must have at least 2 dimensions, not {x.dim()}")


def _check_statistics(
    op: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, **_: object
) -> None:
    _check_input(op, x)
    enough = x.numel() > x.shape[1]
    require(
        enough, ValueError, lambda: f"{op}: x must hold more than one value a channel, not shape {list(x.shape)}"
    )
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        if values is not None:
            _check_channels(op, name, values, x)


def _check_batch_norm(
    op: str,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
) -> None:
    _check_input(op, x)
    for name, values in (("mean", mean), ("invstd", invstd), ("weight", weight), ("bias", bias)):
        if values is not None:
            _check_channels(op, name, values, x)
    known = activation in ("none", "hardswish")
    require(known, ValueError, lambda: f"{op}: activation must be 'none' or 'hardswish', not '{activation}'")
    bounded = lowest is not None or highest is not None
    require(activation == "none" or not bounded, ValueError, lambda: f"{op}: hardswish takes no bounds")


def _check_channels(op: str, name: str, values: Tensor, x: Tensor) -> None:
    require(values.dtype == torch.float32, TypeError, lambda: f"{op}: {name} must be Float, not {values.dtype}")
    fits = values.dim() == 1 and values.numel() == x.shape[1] and values.is_contiguous()
    require(
        fits,
        ValueError,
        lambda: (
            f"{op}: {name} must hold {x.shape[1]} contiguous value(s), one a channel, not shape {list(values.shape)}"
        ),
    )


def _check_forward(
    op: str,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    lowest: float | None,
    highest: float | None,
    **clips: object,
) -> None:
    _check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest)
    check_activation(op, x, **clips)  # type: ignore[arg-type]


def _check_backward(
    op: str,
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
    num_bits: int,
    **_: object,
) -> None:
    _check_batch_norm(op, x, mean, invstd, weight, bias, activation, lowest, highest)
    require(grad.dtype == torch.float32, TypeError, lambda: f"{op}: grad must be Float, not {grad.dtype}")
    check_bits(op, num_bits)
    check_scalar(op, "clip_max", clip_max)
    check_scalar(op, "clip_min", clip_min)
    check_same_shape(op, "grad", grad, "x", x)


def _empty(x: Tensor, clip_max: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_results(x, clip_max.dtype)


def _empty_backward(
    x: Tensor, mean: Tensor, clip_max: Tensor, clip_min: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    clips = empty_scalar(x, clip_max.dtype), empty_scalar(x, clip_min.dtype)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), *clips


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c for float32, rounded once but for a few ties: float64 holds the product exactly."""
    return (a.double() * b.double() + c.double()).float()


def _normalized(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    factor = invstd if weight is None else invstd * weight
    shift = _multiply_add(-mean, factor, torch.zeros_like(mean) if bias is None else bias)
    return _multiply_add(x, factor.view(shape), shift.view(shape))


def _activated(z: Tensor, activation: str, lowest: float | None, highest: float | None) -> Tensor:
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
    values = _activated(_normalized(x, mean, invstd, weight, bias), activation, lowest, highest)
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
    z = _normalized(x, mean, invstd, weight, bias)
    values = _activated(z, activation, lowest, highest)
    d_values, d_max, d_min = torch.ops.amct_ext.ulq_fake_quantize_backward(grad, values, clip_max, clip_min, num_bits)
    dz = d_values * _slope(z, activation, lowest, highest)
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
    return dx * factor.view(shape), (product * invstd).float(), d_bias.float(), d_max, d_min
