"""batch_norm_statistics_, batch_norm_activation and its backward: kernels against references and against torch."""

from __future__ import annotations

import pytest
import torch
from support.ops.batch_norm import ACTIVATIONS, SHAPES, Sample, apply_activation, layouts_of
from support.ops.samples import layout, same_bits
from torch import Tensor
from torch.nn import functional

from amct_ext import ops
from amct_ext.ops import activation_batch_norm as batch_norm


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_has_the_bits_of_the_reference(shape: tuple[int, ...], activation: tuple[object, ...]) -> None:
    for x in layouts_of(shape):
        sample = Sample.of(x, activation)
        for addend in (None, torch.randn_like(x)):
            expected = batch_norm.batch_norm_activation_reference(*sample.arguments, addend)
            actual = ops.batch_norm_activation(*sample.arguments, addend)
            assert torch.equal(expected, actual), (x.shape, x.stride())
            assert layout(expected) == layout(actual)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_forward_has_the_bits_of_torch(activation: tuple[object, ...]) -> None:
    dense = torch.randn(4, 19, 13, 11)  # torch takes another way where there are holes
    for x in (dense, dense.to(memory_format=torch.channels_last)):
        sample = Sample.of(x, activation)
        normalized = functional.batch_norm(x, None, None, sample.weight, sample.bias, training=True, eps=1e-5)
        assert torch.equal(ops.batch_norm_activation(*sample.arguments), apply_activation(normalized, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_backward_is_that_of_the_reference(
    shape: tuple[int, ...], activation: tuple[object, ...], training: bool
) -> None:
    for x in layouts_of(shape):
        sample = Sample.of(x, activation)
        grad = torch.randn_like(x)
        expected = batch_norm.batch_norm_activation_backward_reference(grad, *sample.arguments, training)
        actual = ops.batch_norm_activation_backward(grad, *sample.arguments, training)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        assert layout(expected[0]) == layout(actual[0])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_backward_is_that_of_torch(activation: tuple[object, ...]) -> None:
    for x in layouts_of((4, 19, 13, 11)):
        sample = Sample.of(x, activation)
        leaves = [t.clone().requires_grad_() for t in (x, sample.weight, sample.bias)]
        y = functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=1e-5)
        grad = torch.randn_like(x)
        expected = torch.autograd.grad(apply_activation(y, activation), leaves, grad)
        for a, b in zip(expected, ops.batch_norm_activation_backward(grad, *sample.arguments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for x in layouts_of((6, 40, 30, 30)):
            sample, grad = Sample.of(x, ACTIVATIONS[1]), torch.randn_like(x)
            results: list[tuple[Tensor, ...]] = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(ops.batch_norm_activation_backward(grad, *sample.arguments))
            for other in results[1:]:
                assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(4, 5, 7, 9), (3, 6, 50), (2, 17, 33, 40), (2, 3, 4, 5, 6), (9, 2, 3)], ids=str)
def test_statistics_have_the_bits_of_torch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3 + 1
    channels = shape[1]
    running = [torch.randn(channels), torch.rand(channels)]
    ours, references = [t.clone() for t in running], [t.clone() for t in running]
    _, *expected = torch.native_batch_norm(x, None, None, *running, True, 0.1, 1e-5)
    actual = ops.batch_norm_statistics_(x, *ours, 0.1, 1e-5)
    reference = batch_norm.batch_norm_statistics_reference(x, *references, 0.1, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(actual, reference, strict=True))
    for a, b, c in zip(running, ours, references, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(b, c)


def test_statistics_without_running_ones() -> None:
    x = torch.randn(3, 4, 5)
    mean, invstd = ops.batch_norm_statistics_(x, None, None, 0.1, 0.0)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(invstd, x.var((0, 2), correction=0).rsqrt())


def test_bad_arguments() -> None:
    x, values = torch.randn(2, 3, 4), torch.ones(3)
    good = (x, values, values, None, None, "none", None, None)
    for function in (ops.batch_norm_activation, batch_norm.batch_norm_activation_reference):
        with pytest.raises(TypeError, match="x must be Float"):
            function(x.double(), *good[1:])
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            function(x.flatten(), *good[1:])
        with pytest.raises(ValueError, match="invstd must hold 3"):
            function(x, values, torch.ones(2), *good[3:])
        with pytest.raises(ValueError, match="activation must be"):
            function(*good[:5], "gelu", None, None)
        with pytest.raises(ValueError, match="no bounds"):
            function(*good[:5], "hardswish", 0.0, None)
        with pytest.raises(ValueError, match="addend must have the shape"):
            function(*good, x[:1])
    for function in (ops.batch_norm_statistics_, batch_norm.batch_norm_statistics_reference):
        with pytest.raises(ValueError, match="more than one value a channel"):
            function(torch.randn(1, 3), None, None, 0.1, 1e-5)
        with pytest.raises(ValueError, match="running_mean must hold"):
            function(x, torch.ones(4), None, 0.1, 1e-5)
    with pytest.raises(ValueError, match="grad must have the shape"):
        ops.batch_norm_activation_backward(x[:1], *good)
