"""The gradients of ULQ in two passes, the second one joined with that of a ReLU before the quantiser.

A ReLU's result may be quantised for a layer and also be added to that layer's output further on. Its gradient is then a
sum, which is known only after the quantiser's node has run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import empty_scalar
from amct_ext.ops._checks import check_bits, check_float32, check_float32_like, check_same_shape, check_scalar
from amct_ext.ops._registration import reference

__all__ = ["ulq_clip_gradients", "ulq_relu_backward"]


def ulq_clip_gradients(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    """Gradients of the clips of `ulq_fake_quantize`, without that of x: `(d_clip_max, d_clip_min)`.

    Args:
        grad, x: float32; these and all others as in `ulq_fake_quantize_backward`.

    Returns: the second and third result of `ulq_fake_quantize_backward`, with the same bits.

    Gradients: none.

    Errors: TypeError for a dtype other than float32; else as `ulq_fake_quantize_backward`.

    Source: AMCT's ULQ backward.

        >>> x, one = torch.tensor([-2.0, 0.0, 2.0]), torch.tensor(1.0)
        >>> [round(v.item(), 3) for v in ulq_clip_gradients(torch.ones(3), x, one, -one)]
        [1.0, 1.0]
    """
    return torch.ops.amct_ext.ulq_clip_gradients(grad, x, clip_max, clip_min, num_bits)


def ulq_relu_backward(
    grad: Tensor, y: Tensor, addend: Tensor | None, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> Tensor:
    """The gradient of a ReLU's input where its result is fake-quantised and also read by others.

    Args:
        grad: gradient of the quantised values, float32, shape of y.
        y: the ReLU's result, float32.
        addend: gradient of y from its other readers, float32, shape of y; or None.
        clip_max, clip_min, num_bits: as in `ulq_fake_quantize_backward`.

    Returns: a tensor like y, in one pass, with the bits of `ulq_fake_quantize_backward`, an addition and the backward
    of torch's ReLU.

    Gradients: none.

    Errors: TypeError for a dtype other than float32; ValueError for shapes and num_bits.

    Source: AMCT's ULQ backward.

        >>> y, one = torch.tensor([0.0, 0.5, 2.0]), torch.tensor(1.0)
        >>> ulq_relu_backward(torch.ones(3), y, 10 * torch.ones(3), one, 0 * one).tolist()
        [0.0, 11.0, 10.0]
    """
    return torch.ops.amct_ext.ulq_relu_backward(grad, y, addend, clip_max, clip_min, num_bits)


def _check(
    op: str,
    grad: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    num_bits: int,
    x: Tensor | None = None,
    y: Tensor | None = None,
    addend: Tensor | None = None,
) -> None:
    name, data = ("x", x) if y is None else ("y", y)
    assert data is not None
    check_float32(op, "grad", grad)
    check_float32(op, name, data)
    check_bits(op, num_bits)
    check_scalar(op, "clip_max", clip_max)
    check_scalar(op, "clip_min", clip_min)
    check_same_shape(op, "grad", grad, name, data)
    if addend is not None:
        check_float32_like(op, "addend", addend, name, data)


def _empty_clips(x: Tensor, clip_max: Tensor, clip_min: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return empty_scalar(x, clip_max.dtype), empty_scalar(x, clip_min.dtype)


def _empty(y: Tensor, **_: object) -> Tensor:
    return torch.empty_like(y)


@reference("ulq_clip_gradients", check=_check, empty=_empty_clips)
def ulq_clip_gradients_reference(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor]:
    _, d_max, d_min = torch.ops.amct_ext.ulq_fake_quantize_backward(grad, x, clip_max, clip_min, num_bits)
    return d_max, d_min


@reference("ulq_relu_backward", check=_check, empty=_empty)
def ulq_relu_backward_reference(
    grad: Tensor, y: Tensor, addend: Tensor | None, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> Tensor:
    dy, _, _ = torch.ops.amct_ext.ulq_fake_quantize_backward(grad, y, clip_max, clip_min, num_bits)
    if addend is not None:
        dy = addend + dy
    return torch.where(y <= 0, torch.zeros_like(dy), dy)
