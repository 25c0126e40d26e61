"""Weight ops: kernel against reference, gradients against the formula, data of the reference toolkit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.op_samples import DTYPES, axes_of, inputs, layout, same_bits
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import weight_arq as arq
from amct_ext.ops import weight_lsq as lsq
from amct_ext.ops import weight_norms as norms
from amct_ext.ops import weight_quantize as quantize


def output_axis(item: dict[str, Any]) -> int | None:
    if not item["channel_wise"]:
        return None
    return 1 if "Transpose" in item["module_type"] else 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_have_the_bits_of_the_references(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in axes_of(w):
            y, scale = ops.arq_fake_quantize(w, 8, axis)
            expected, expected_scale = arq._reference_arq(w, 8, axis)
            assert same_bits(expected, y), (w.shape, w.stride(), axis)
            assert same_bits(expected_scale, scale)
            assert layout(expected) == layout(y)
            learned = scale * 0.7
            assert same_bits(lsq._reference_lsq(w, learned, 4, axis), ops.lsq_fake_quantize(w, learned, 4, axis))
            codes = ops.quantize_weight(w, learned, 8, axis)
            assert same_bits(quantize._reference_quantize(w, learned, 8, axis), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_agree_with_the_references(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        grad = torch.randn_like(w)
        for axis in axes_of(w):
            scale = torch.full((1 if axis is None else w.shape[axis],), 0.02, device=device)
            torch.testing.assert_close(
                ops.lsq_fake_quantize_backward(grad, w, scale, 8, axis),
                lsq._reference_lsq_backward(grad, w, scale, 8, axis),
                rtol=1e-6,
                atol=1e-6,
            )
            if axis is not None:
                torch.testing.assert_close(ops.filter_norms(w, axis), norms._reference(w, axis), rtol=1e-6, atol=1e-6)


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
                lsq._reference_lsq_backward(grad, w, scale, 8, axis),
                rtol=1e-6,
                atol=1e-6,
            )


def test_every_half_value_converts_exactly(device: torch.device) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        w, scale = patterns.view(dtype), torch.tensor([2.0**-20], device=device)
        assert same_bits(lsq._reference_lsq(w, scale, 16), ops.lsq_fake_quantize(w, scale, 16))


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
            lsq._reference_lsq(w, scales.to(device), bits), ops.lsq_fake_quantize(w, scales.to(device), bits)
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
            assert same_bits(lsq._reference_lsq(*arguments), ops.lsq_fake_quantize(*arguments)), (scale, bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    """Kernels go by registers: a value that needs care may lie in a whole one, in the last one, or in a short row."""
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor([-0.0, 0.0, tiny, -tiny, tiny / 4, -tiny / 4, math.inf, -math.inf, math.nan], dtype=dtype)
    for length in (1, 3, 9, 31, 32, 33, 63, 64, 65, 100, 128, 129, 200):
        w = torch.randn(40, length, dtype=torch.float64).to(dtype)
        for row in range(1, 40):
            w[row, torch.randint(0, length, (1 + row // 8,))] = special[torch.randint(0, 9, (1 + row // 8,))]
        w[30:] = special[torch.randint(0, 6, (10, length))]
        mask = torch.rand(w.shape) > 0.3
        w, mask, scale = w.to(device), mask.to(device), torch.rand(40).add(0.01).to(device)
        assert same_bits(lsq._reference_lsq(w, scale, 8, 0), ops.lsq_fake_quantize(w, scale, 8, 0)), length
        assert same_bits(quantize._reference_quantize(w, scale, 8, 0), ops.quantize_weight(w, scale, 8, 0)), length
        kept = torch.where(mask, w, torch.zeros_like(w))
        for a, b in zip(ops.arq_fake_quantize(kept, 8, 0), ops.sparse_arq_fake_quantize(w, mask, 8, 0), strict=True):
            assert same_bits(a, b), length
        for a, b in zip(arq._reference_arq(kept, 8, 0), ops.arq_fake_quantize(kept, 8, 0), strict=True):
            assert same_bits(a, b), length


@pytest.mark.parametrize("sign", [1, -1])
def test_ranges_of_one_sign_of_every_length(sign: int, device: torch.device) -> None:
    for length in (1, 2, 15, 16, 17, 31, 33, 100):
        w = (torch.rand(5, length, device=device) + 0.1) * sign
        w[3] = 0.25 * sign
        w[4] = 0.0 * sign
        for a, b in zip(arq._reference_arq(w, 8, 0), ops.arq_fake_quantize(w, 8, 0), strict=True):
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


def test_arq_passes_the_gradient_through() -> None:
    w = torch.randn(4, 3, requires_grad=True)
    y, scale = ops.arq_fake_quantize(w, 8, 0)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(w.grad, g)
    assert not scale.requires_grad


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_lsq_gradients_follow_the_formula(axis: int | None, device: torch.device) -> None:
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


def test_lsq_keeps_scales_positive(device: torch.device) -> None:
    w = torch.tensor([1.0, -1.0], device=device)
    for scale in (-0.5, 0.0):
        y = ops.lsq_fake_quantize(w, torch.tensor([scale], device=device))
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(y.cpu(), torch.tensor([127 * eps, -128 * eps]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_shows_in_its_scale(bad: float, device: torch.device) -> None:
    w = torch.randn(3, 1000, device=device)
    w[1, 500] = bad
    for axis in (0, None):
        y, scale = ops.arq_fake_quantize(w, 8, axis)
        expected = arq._reference_arq(w, 8, axis)
        assert same_bits(expected[0], y)
        assert same_bits(expected[1], scale)
        assert torch.isfinite(scale).tolist() == ([True, False, True] if axis == 0 else [False])


def test_same_bits_for_any_number_of_threads() -> None:
    w, g = torch.randn(64, 3001), torch.randn(64, 3001)
    before = torch.get_num_threads()
    try:
        for axis in (None, 0, 1):
            scale = torch.full((1 if axis is None else w.shape[axis],), 0.02)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(
                    (ops.lsq_fake_quantize_backward(g, w, scale, 8, axis), ops.arq_fake_quantize(w, 8, axis)[1])
                )
            assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_arq_agrees_with_the_reference_toolkit(golden: Path) -> None:
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


def test_lsq_agrees_with_the_reference_toolkit(golden: Path) -> None:
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
        if "error" not in item:  # where the reference's backward raises, ours is checked against the formula above
            torch.testing.assert_close(d_scale, item["grad_scale"], rtol=1e-5, atol=1e-6)
    assert set(phases) == {"arq_init", "learned", "learned_small", "learned_negative"}


def test_symmetric_scales_of_the_reference_toolkit(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "scale_offset.pt", weights_only=True):
        if not item["asymmetric"]:
            w = torch.tensor([item["data_max"], item["data_min"]])
            if w[0] >= w[1]:
                assert torch.equal(ops.arq_fake_quantize(w, item["num_bits"])[1], item["scale"]), item


@pytest.mark.parametrize("op", [ops.arq_fake_quantize, arq._reference_arq])
def test_bad_weights_are_refused(op: Any) -> None:
    with pytest.raises(TypeError, match="w must be float32"):
        op(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_bits must be between 2 and 16, not 1"):
        op(torch.zeros(2, 2), 1)
    with pytest.raises(IndexError, match="channel_axis 2 is out of range for a tensor of 2 dimensions"):
        op(torch.zeros(2, 2), 8, 2)


@pytest.mark.parametrize(
    "op", [ops.lsq_fake_quantize, lsq._reference_lsq, ops.quantize_weight, quantize._reference_quantize]
)
def test_the_number_of_scales_is_checked(op: Any) -> None:
    with pytest.raises(ValueError, match=r"scale must hold 2 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(3), 8, 0)
    with pytest.raises(ValueError, match=r"scale must hold 1 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(2), 8, None)
