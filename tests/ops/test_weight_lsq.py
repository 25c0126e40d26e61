"""Weights with learned scales: the kernel against the reference, gradients against the formula, data of AMCT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, output_axis, same_bits, special_rows

from amct_ext import ops
from amct_ext.ops import weight_lsq as lsq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in axes_of(w):
            learned = ops.arq_fake_quantize(w, 8, axis)[1] * 0.7
            expected = lsq.lsq_fake_quantize_reference(w, learned, 4, axis)
            assert same_bits(expected, ops.lsq_fake_quantize(w, learned, 4, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_agrees_with_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        grad = torch.randn_like(w)
        for axis in axes_of(w):
            scale = torch.full((1 if axis is None else w.shape[axis],), 0.02, device=device)
            torch.testing.assert_close(
                ops.lsq_fake_quantize_backward(grad, w, scale, 8, axis),
                lsq.lsq_fake_quantize_backward_reference(grad, w, scale, 8, axis),
                rtol=1e-6,
                atol=1e-6,
            )


@pytest.mark.parametrize("upstream", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_another_type_is_not_rounded(
    dtype: torch.dtype, upstream: torch.dtype, device: torch.device
) -> None:
    for w in inputs(dtype, device):
        grad = torch.randn(w.shape, dtype=torch.float64).to(device, upstream)
        for axis in axes_of(w):
            scale = torch.full((1 if axis is None else w.shape[axis],), 0.02, device=device, dtype=torch.float64)
            torch.testing.assert_close(
                ops.lsq_fake_quantize_backward(grad, w, scale, 8, axis),
                lsq.lsq_fake_quantize_backward_reference(grad, w, scale, 8, axis),
                rtol=1e-6,
                atol=1e-6,
            )


def test_every_half_value_converts_exactly(device: torch.device) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        w, scale = patterns.view(dtype), torch.tensor([2.0**-20], device=device)
        assert same_bits(lsq.lsq_fake_quantize_reference(w, scale, 16), ops.lsq_fake_quantize(w, scale, 16))


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_beside_the_middle_of_two_codes(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Kernels multiply by the reciprocal where that cannot change a code; here it often could, or nearly could."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for scale in (1.0, 1 / 3, 0.1, 7e-5, 1234.567):
        scales = torch.tensor([scale], dtype=dtype)
        middles = (torch.randint(lowest - 2, highest + 3, (1500,)) + 0.5).to(dtype) * scales
        ulps = torch.randint(-3, 4, middles.shape)
        whole = torch.int64 if dtype == torch.float64 else torch.int32
        w = (middles.view(whole) + ulps.to(whole)).view(dtype).to(device)
        assert same_bits(
            lsq.lsq_fake_quantize_reference(w, scales.to(device), bits),
            ops.lsq_fake_quantize(w, scales.to(device), bits),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_gets_the_code_of_the_division(dtype: torch.dtype, device: torch.device) -> None:
    """Among few values many lie in the middle of two codes, for the scales that a range or a user gives."""
    w = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    middles = torch.randint(1, 255, (12,)) / 2
    near = (torch.rand(12) * 4 + 0.1).to(dtype).float() / middles
    neighbours = [(near.view(torch.int32) + step).view(torch.float32) for step in (-1, 0, 1)]
    fixed = torch.tensor([0.03, 1 / 3, 2 - 2**-23, 1 + 0x1DF1FF / 2**23, 2**-23, 1.5e18, 3e38, 1e-30])
    for scale in torch.cat([*neighbours, fixed]):
        for bits in (4, 8, 16):
            arguments = (w.to(device), scale.reshape(1).to(device), bits)
            assert same_bits(lsq.lsq_fake_quantize_reference(*arguments), ops.lsq_fake_quantize(*arguments)), (
                scale,
                bits,
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, _, scale in special_rows(dtype, device):
        expected = lsq.lsq_fake_quantize_reference(w, scale, 8, 0)
        assert same_bits(expected, ops.lsq_fake_quantize(w, scale, 8, 0)), w.shape


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_follow_the_formula(axis: int | None, device: torch.device) -> None:
    w = torch.randn(6, 5, 3, device=device, requires_grad=True)
    count = 1 if axis is None else w.shape[axis]
    scale = torch.full((count,), 0.01, device=device).mul(torch.rand(count, device=device) + 0.5).requires_grad_()
    y = ops.lsq_fake_quantize(w, scale, 8, axis)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(w.grad, g)
    shape = [1 if i != axis else count for i in range(3)]
    z = (w / scale.view(shape)).detach()
    slope = torch.where(z < -128, -128.0, torch.where(z > 127, 127.0, z.round() - z))
    total = (slope * g).sum([i for i in range(3) if i != axis])
    torch.testing.assert_close(scale.grad, (total / math.sqrt(w.numel() / count * 127)).reshape(count))


def test_keeps_scales_positive(device: torch.device) -> None:
    w = torch.tensor([1.0, -1.0], device=device)
    for scale in (-0.5, 0.0):
        y = ops.lsq_fake_quantize(w, torch.tensor([scale], device=device))
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(y.cpu(), torch.tensor([127 * eps, -128 * eps]))


def test_same_bits_for_any_number_of_threads() -> None:
    w, g = torch.randn(64, 3001), torch.randn(64, 3001)
    before = torch.get_num_threads()
    try:
        for axis in (None, 0, 1):
            scale = torch.full((1 if axis is None else w.shape[axis],), 0.02)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(ops.lsq_fake_quantize_backward(g, w, scale, 8, axis))
            assert all(same_bits(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_agrees_with_amct(golden: Path) -> None:
    phases: dict[str, int] = {}
    for item in torch.load(golden / "ops" / "wts_ulq.pt", weights_only=True):
        if item["s_rec_flag"] or (item["groups"] != 1 and "Transpose" in item["module_type"]):
            continue
        w, bits, axis, phase = item["weight"], item["num_bits"], output_axis(item), item["phase"]
        phases[phase] = phases.get(phase, 0) + 1
        if phase == "arq_init":
            assert torch.equal(ops.arq_fake_quantize(w, bits, axis)[1], item["scale"])
        y = ops.lsq_fake_quantize(w, item["scale"], bits, axis)
        if phase == "learned_negative":  # ours keeps scales positive: only the other channels can agree
            if axis is not None:
                assert torch.equal(y.movedim(axis, 0)[1:], item["out"].movedim(axis, 0)[1:])
            continue
        assert torch.equal(y, item["out"])
        count = w[0].numel() if w.dim() in (2, 4) else w.shape[1]
        if axis is not None:
            count = w.numel() // w.shape[axis]
        factor = 1 / math.sqrt(count * (2 ** (bits - 1) - 1))
        d_scale = ops.lsq_fake_quantize_backward(item["grad_out"], w, item["scale"], bits, axis, factor)
        if "error" not in item:  # where AMCT's backward raises, ours is checked against the formula above
            torch.testing.assert_close(d_scale, item["grad_scale"], rtol=1e-5, atol=1e-6)
    assert set(phases) == {"arq_init", "learned", "learned_small", "learned_negative"}


@pytest.mark.parametrize("op", [ops.lsq_fake_quantize, lsq.lsq_fake_quantize_reference])
def test_the_number_of_scales_is_checked(op: Any) -> None:
    with pytest.raises(ValueError, match=r"scale must hold 2 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(3), 8, 0)
    with pytest.raises(ValueError, match=r"scale must hold 1 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(2), 8, None)
