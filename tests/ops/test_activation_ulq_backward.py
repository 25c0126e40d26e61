"""ulq_fake_quantize_backward: kernel against reference, gradients against the formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, ULQ_CLIPS, inputs, same_bits, scalars

from amct_ext import ops
from amct_ext.ops import activation_ulq as ulq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for i, x in enumerate(inputs(dtype, device)):
        grad = torch.randn_like(x)
        clips = scalars(*ULQ_CLIPS[i % len(ULQ_CLIPS)], device=device)
        expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
        actual = ops.ulq_fake_quantize_backward(grad, x, *clips)
        assert same_bits(expected[0], actual[0])
        for a, b in zip(expected[1:], actual[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upstream", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_another_type_keeps_its_bits(
    dtype: torch.dtype, upstream: torch.dtype, device: torch.device
) -> None:
    """No value is rounded to the type of x on its way; clips in float64 show that of the sums."""
    clips = scalars(1.7, -0.9, device=device, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -7e4, 1e300], dtype=torch.float64)
    for x in inputs(dtype, device):
        grad = torch.randn(x.shape, dtype=torch.float64).to(device, upstream)
        expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
        actual = ops.ulq_fake_quantize_backward(grad, x, *clips)
        assert same_bits(expected[0], actual[0]), (x.shape, x.stride())
        for a, b in zip(expected[1:], actual[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
        if grad.numel() >= len(special):
            grad.view(-1)[: len(special)] = special.to(device, upstream)
            expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
            assert same_bits(expected[0], ops.ulq_fake_quantize_backward(grad, x, *clips)[0])


@pytest.mark.parametrize("upstream", DTYPES, ids=str)
def test_gradients_of_gradients_follow_the_gradient_alone(upstream: torch.dtype) -> None:
    grad = torch.randn(7, dtype=torch.float64).to(upstream).requires_grad_()
    x = torch.randn(7, requires_grad=True)
    results = ops.ulq_fake_quantize_backward(grad, x, *scalars(1.7, -0.9))
    assert all(result.requires_grad for result in results)
    found = torch.autograd.grad(sum(result.double().sum() for result in results), (grad, x), allow_unused=True)
    assert found[0].dtype == upstream and found[1] is None


def test_gradients_follow_the_formula(device: torch.device) -> None:
    x = torch.randn(1000, device=device, requires_grad=True)
    clip_max, clip_min = (v.requires_grad_() for v in scalars(1.1, -0.7, device=device))
    y, *_ = ops.ulq_fake_quantize(x, clip_max, clip_min, *scalars(math.nan, math.nan, device=device))
    g = torch.randn_like(y)
    y.backward(g)

    scale = (clip_max - clip_min).detach() / 255
    offset = torch.round(-128 - clip_min.detach() / scale)
    above, below = x > scale * (127 - offset), x < scale * (-128 - offset)
    z = torch.where(above, clip_max, torch.where(below, clip_min, x)).detach() / scale
    error = (torch.round(z) - z) / 255
    assert torch.equal(x.grad, torch.where(above | below, 0, g))
    torch.testing.assert_close(clip_max.grad, ((error + above.float()) * g).sum())
    torch.testing.assert_close(clip_min.grad, ((below.float() - error) * g).sum())


def test_clip_gradients_have_the_shape_of_the_clips() -> None:
    clips = [torch.tensor([v], requires_grad=True) for v in (1.0, -1.0)]
    y, scale, *_ = ops.ulq_fake_quantize(torch.randn(9), *clips, *scalars(math.nan, math.nan))
    y.sum().backward()
    assert [c.grad.shape for c in clips] == [(1,), (1,)]
    assert scale.shape == ()
    assert not scale.requires_grad


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    y, *rest = ops.ulq_fake_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan))
    y.sum().backward()
    assert x.grad is not None
    assert not any(r.requires_grad for r in rest)
    with torch.no_grad():
        assert not ops.ulq_fake_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan))[0].requires_grad


@pytest.mark.parametrize("slices", [False, True])
def test_same_bits_for_any_number_of_threads(slices: bool) -> None:
    x, g = torch.randn(300001), torch.randn(300001)
    if slices:
        x, g = x[:300000].view(500, 600)[:, :400], g[:200000].view(500, 400)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.ulq_fake_quantize_backward(g, x, *scalars(1.0, -1.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("function", [ops.ulq_fake_quantize_backward, ulq.ulq_fake_quantize_backward_reference])
def test_a_gradient_of_another_shape_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="grad must have the shape of x"):
        function(torch.zeros(3), torch.zeros(4), *scalars(1.0, -1.0))
