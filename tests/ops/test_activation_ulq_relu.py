"""ulq_clip_gradients and ulq_relu_backward: kernels against references, and against the ops that they are parts of."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.ops.samples import SHAPES, ULQ_CLIPS, layouts, same_bits
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import activation_ulq_relu


def samples() -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Gradient, a ReLU's input, addend, clips."""
    torch.manual_seed(0)
    found = []
    for shape in SHAPES:
        data = torch.randn(shape) * 2
        data.view(-1)[1:2] = math.nan
        for i, x in enumerate(layouts(data)):
            high, low = ULQ_CLIPS[i % len(ULQ_CLIPS)]
            grad, addend = torch.randn(2, *x.shape).unbind(0)
            found.append((grad, x, addend, torch.tensor(high), torch.tensor(low)))
    return found


def test_clip_gradients_are_those_of_the_whole_backward() -> None:
    for grad, x, _, *clips in samples():
        for num_bits in (4, 8):
            expected = ops.ulq_fake_quantize_backward(grad, x, *clips, num_bits)[1:]
            actual = ops.ulq_clip_gradients(grad, x, *clips, num_bits)
            reference = activation_ulq_relu.ulq_clip_gradients_reference(grad, x, *clips, num_bits)
            for result, whole, plain in zip(actual, expected, reference, strict=True):
                assert same_bits(result, whole) or not x.is_contiguous()
                torch.testing.assert_close(result, plain, equal_nan=True)


@pytest.mark.parametrize("added", [False, True])
def test_gradient_through_the_relu(added: bool) -> None:
    for grad, x, addend, *clips in samples():
        y, more = x.relu(), addend if added else None
        actual = ops.ulq_relu_backward(grad, y, more, *clips)
        assert same_bits(actual, activation_ulq_relu.ulq_relu_backward_reference(grad, y, more, *clips))
        dy = ops.ulq_fake_quantize_backward(grad, y, *clips)[0]
        dy = dy if more is None else more + dy
        assert same_bits(actual, torch.ops.aten.threshold_backward(dy, y, 0))
        assert actual.stride() == torch.empty_like(y).stride()


def test_bad_arguments() -> None:
    x, one = torch.randn(3, 4), torch.tensor(1.0)
    through_relu = (ops.ulq_relu_backward, activation_ulq_relu.ulq_relu_backward_reference)
    calls: list[Callable[..., object]] = [
        ops.ulq_clip_gradients,
        activation_ulq_relu.ulq_clip_gradients_reference,
        *(lambda grad, y, *others, call=call: call(grad, y, None, *others) for call in through_relu),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="must be Float, not"):
            call(x.double(), x.double(), one, -one)
        with pytest.raises(ValueError, match="grad"):
            call(x[:2], x, one, -one)
        with pytest.raises(ValueError, match="num_bits"):
            call(x, x, one, -one, 1)
    for call in through_relu:
        with pytest.raises(ValueError, match="addend"):
            call(x, x, x[:2], one, -one)
        with pytest.raises(TypeError, match="addend"):
            call(x, x, x.half(), one, -one)
