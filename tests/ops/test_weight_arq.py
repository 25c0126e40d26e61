"""Weights with the scale of their own range: the kernel against the reference and AMCT, one weight and many."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, layout, output_axis, same_bits, special_rows
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import weight_arq as arq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in axes_of(w):
            y, scale = ops.arq_fake_quantize(w, 8, axis)
            expected, expected_scale = arq.arq_fake_quantize_reference(w, 8, axis)
            assert same_bits(expected, y), (w.shape, w.stride(), axis)
            assert same_bits(expected_scale, scale)
            assert layout(expected) == layout(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, mask, _ in special_rows(dtype, device):
        kept = torch.where(mask, w, torch.zeros_like(w))
        for a, b in zip(arq.arq_fake_quantize_reference(kept, 8, 0), ops.arq_fake_quantize(kept, 8, 0), strict=True):
            assert same_bits(a, b), w.shape


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_of_one_sign_of_every_length(sign: int, device: torch.device) -> None:
    for length in (1, 2, 15, 16, 17, 31, 33, 100):
        w = (torch.rand(5, length, device=device) + 0.1) * sign
        w[3] = 0.25 * sign
        w[4] = 0.0 * sign
        for a, b in zip(arq.arq_fake_quantize_reference(w, 8, 0), ops.arq_fake_quantize(w, 8, 0), strict=True):
            assert same_bits(a, b), length


def test_the_scale_says_what_is_wrong_with_a_channel(device: torch.device) -> None:
    w = torch.randn(5, 40, device=device)
    w[1] = 0
    w[2] = 1e-7
    w[3, 7] = math.nan
    w[4, 8] = -math.inf
    y, scale = ops.arq_fake_quantize(w, 8, 0)
    assert torch.isfinite(scale).tolist() == [True, True, True, False, False]
    assert (scale == 1).tolist() == [False, True, True, False, False]
    assert (y == 0).all(1).tolist() == [False, True, True, False, False]


def test_the_gradient_passes_through() -> None:
    w = torch.randn(4, 3, requires_grad=True)
    y, scale = ops.arq_fake_quantize(w, 8, 0)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(w.grad, g)
    assert not scale.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_shows_in_its_scale(bad: float, device: torch.device) -> None:
    w = torch.randn(3, 1000, device=device)
    w[1, 500] = bad
    for axis in (0, None):
        y, scale = ops.arq_fake_quantize(w, 8, axis)
        expected = arq.arq_fake_quantize_reference(w, 8, axis)
        assert same_bits(expected[0], y)
        assert same_bits(expected[1], scale)
        assert torch.isfinite(scale).tolist() == ([True, False, True] if axis == 0 else [False])


def test_same_bits_for_any_number_of_threads() -> None:
    w = torch.randn(64, 3001)
    before = torch.get_num_threads()
    try:
        for axis in (None, 0, 1):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.arq_fake_quantize(w, 8, axis)[1])
            assert all(same_bits(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_many_weights_at_once(device: torch.device) -> None:
    weights = [torch.randn(s, device=device, requires_grad=True) for s in ((4, 3), (6,), (2, 5, 3, 3), (0, 3))]
    axes = [0, None, -3, 0]
    ys, scales = ops.arq_fake_quantize_many(weights, 4, axes)
    for w, axis, y, scale in zip(weights, axes, ys, scales, strict=True):
        expected = ops.arq_fake_quantize(w, 4, axis)
        assert same_bits(expected[0], y)
        assert same_bits(expected[1], scale)
        assert not scale.requires_grad
    (ys[0].sum() * 2 + ys[2].sum()).backward()
    assert torch.equal(weights[0].grad, torch.full_like(weights[0], 2))
    assert torch.equal(weights[2].grad, torch.ones_like(weights[2]))
    assert weights[1].grad is None or not weights[1].grad.any()


def test_many_weights_have_the_same_bits_for_any_number_of_threads() -> None:
    weights = [torch.randn(s) for s in ((300, 700), (3, 5), (64, 64, 3, 3), (1, 9000), (2, 40000))]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for w, y, scale in zip(weights, *ops.arq_fake_quantize_many(weights), strict=True):
                expected = arq.arq_fake_quantize_reference(w, 8, 0)
                assert same_bits(expected[0], y)
                assert same_bits(expected[1], scale)
    finally:
        torch.set_num_threads(before)


def test_agrees_with_amct(golden: Path) -> None:
    checked = 0
    for item in torch.load(golden / "ops" / "wts_arq.pt", weights_only=True):
        w, axis = _regrouped(item)
        y, scale = ops.arq_fake_quantize(w, item["num_bits"], axis)
        assert torch.equal(scale, item["scale"])
        assert torch.equal(_restored(y, item), item["out"])
        checked += 1
    assert checked == 182


def _regrouped(item: dict[str, Any]) -> tuple[Tensor, int | None]:
    """A grouped transposed convolution has its output channels on two axes; bring them together in front."""
    w, groups, axis = item["weight"], item["groups"], output_axis(item)
    if groups == 1 or axis != 1:
        return w, axis
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1), 0


def _restored(y: Tensor, item: dict[str, Any]) -> Tensor:
    groups = item["groups"]
    if groups == 1 or output_axis(item) != 1:
        return y
    return y.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def test_symmetric_scales_of_amct(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "scale_offset.pt", weights_only=True):
        if not item["asymmetric"]:
            w = torch.tensor([item["data_max"], item["data_min"]])
            if w[0] >= w[1]:
                assert torch.equal(ops.arq_fake_quantize(w, item["num_bits"])[1], item["scale"]), item


@pytest.mark.parametrize("op", [ops.arq_fake_quantize, arq.arq_fake_quantize_reference])
def test_bad_weights_are_refused(op: Any) -> None:
    with pytest.raises(TypeError, match="w must be float32"):
        op(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_bits must be between 2 and 16, not 1"):
        op(torch.zeros(2, 2), 1)
    with pytest.raises(IndexError, match="channel_axis 2 is out of range for a tensor of 2 dimensions"):
        op(torch.zeros(2, 2), 8, 2)


def test_bad_axes_of_many_weights_are_refused() -> None:
    w = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="one axis"):
        ops.arq_fake_quantize_many([w], 8, [0, 0])
    for axis in (2, -3):
        with pytest.raises(IndexError, match="out of range"):
            ops.arq_fake_quantize_many([w], 8, [axis])
    for op in (torch.ops.amct_ext.arq_fake_quantize_many, arq.arq_fake_quantize_many_reference):
        with pytest.raises(IndexError, match="-2 is out of range"):
            op([w], 8, [-2])
