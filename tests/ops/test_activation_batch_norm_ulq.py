"""batch_norm_ulq and its backward: kernels against references and against the ops they stand in for."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.batch_norm import ACTIVATIONS, SHAPES, Sample, apply_activation, layouts_of
from support.ops.samples import ULQ_CLIPS, layout, scalars
from torch.nn import functional

from amct_ext import ops
from amct_ext.ops import activation_batch_norm_ulq as fused


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_has_the_bits_of_the_reference(shape: tuple[int, ...], activation: tuple[object, ...]) -> None:
    for i, x in enumerate(layouts_of(shape)):
        sample = Sample.of(x, activation)
        for num_bits in (4, 8, 16):
            clips = (*scalars(*ULQ_CLIPS[i], math.nan, math.nan), num_bits, i == 1)
            expected = fused.batch_norm_ulq_reference(*sample.arguments, *clips)
            actual = ops.batch_norm_ulq(*sample.arguments, *clips)
            assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True)), (x.shape, x.stride())
            assert layout(expected[0]) == layout(actual[0])


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_forward_has_the_bits_of_the_separate_ops(activation: tuple[object, ...]) -> None:
    for x in layouts_of((4, 19, 13, 11)):
        sample, clips = Sample.of(x, activation), scalars(1.5, -0.7, math.nan, math.nan)
        z = functional.batch_norm(x, None, None, sample.weight, sample.bias, training=True, eps=1e-5)
        expected = ops.ulq_fake_quantize(apply_activation(z, activation), *clips)
        actual = ops.batch_norm_ulq(*sample.arguments, *clips)
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_that_of_the_reference(
    shape: tuple[int, ...], activation: tuple[object, ...], training: bool
) -> None:
    for x in layouts_of(shape):
        sample, clips = Sample.of(x, activation), scalars(1.5, -0.7)
        grad = torch.randn_like(x)
        expected = fused.batch_norm_ulq_backward_reference(grad, *sample.arguments, *clips, 8, training)
        actual = ops.batch_norm_ulq_backward(grad, *sample.arguments, *clips, 8, training)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert layout(expected[0]) == layout(actual[0])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_that_of_the_separate_ops(activation: tuple[object, ...], training: bool) -> None:
    for x in layouts_of((4, 19, 13, 11)):
        sample, none = Sample.of(x, activation), scalars(math.nan, math.nan)
        leaves = [t.clone().requires_grad_() for t in (x, sample.weight, sample.bias, *scalars(1.5, -0.7))]
        statistics = (None, None) if training else (sample.mean, sample.invstd.square().reciprocal() - 1e-5)
        z = functional.batch_norm(leaves[0], *statistics, *leaves[1:3], training=training, eps=1e-5)
        y = ops.ulq_fake_quantize(apply_activation(z, activation), *leaves[3:], *none)[0]
        grad = torch.randn_like(x)
        expected = torch.autograd.grad(y, leaves, grad)
        actual = ops.batch_norm_ulq_backward(grad, *sample.arguments, *scalars(1.5, -0.7), 8, training)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_flagged(value: float) -> None:
    one = torch.ones(2)
    for x in list(layouts_of((2, 2, 9, 9))):
        clips = scalars(1.0, -1.0, math.nan, math.nan)
        assert not ops.batch_norm_ulq(x, 0 * one, one, None, None, "none", None, None, *clips)[5]
        x = x.clone()
        x[1, 1, 8, 8] = value
        assert ops.batch_norm_ulq(x, 0 * one, one, None, None, "none", None, None, *clips)[5]


def test_bad_arguments() -> None:
    x, values = torch.randn(2, 3, 4), torch.ones(3)
    good, clips = (x, values, values, None, None, "none", None, None), scalars(1.0, -1.0, math.nan, math.nan)
    for function in (ops.batch_norm_ulq, fused.batch_norm_ulq_reference):
        with pytest.raises(TypeError, match="x must be Float"):
            function(x.double(), *good[1:], *clips)
        with pytest.raises(ValueError, match="num_bits"):
            function(*good, *clips, 17)
        with pytest.raises(ValueError, match="clip_max must hold one value"):
            function(*good, torch.ones(2), *clips[1:])
    for function in (ops.batch_norm_ulq_backward, fused.batch_norm_ulq_backward_reference):
        with pytest.raises(TypeError, match="grad must be Float"):
            function(x.double(), *good, *clips[:2])
        with pytest.raises(ValueError, match="grad must have the shape"):
            function(x[:1], *good, *clips[:2])
