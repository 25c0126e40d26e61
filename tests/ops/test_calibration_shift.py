"""The shift search: errors of the shifts against the reference and against integers of Python, the best shift."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, inputs
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import calibration_shift as shift


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_errors_agree_with_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for x in inputs(dtype, device):
        for axis in range(x.dim()):
            channels = x.shape[axis]
            for rows, scales in ((channels, channels), (1, channels), (channels, 1)):
                scale = torch.rand(scales, device=device) * 1e-4 + 1e-5
                expected, actual = (torch.ones(rows, 16, dtype=torch.float64, device=device) for _ in range(2))
                shift.shift_error_reference(x, scale, expected, axis)
                ops.shift_error_(x, scale, actual, axis)
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def exact_shift_errors(x: Tensor, scale: float) -> list[float]:
    """The definition in integers of Python, rounded once."""
    quotient = torch.round(x.double() / scale).clamp(-(2.0**31), 2.0**31 - 1)
    totals = [int(v) for v in quotient.flatten().tolist()]
    return [
        float(sum((max(-32768, min(32767, total >> n)) * 2**n - total) ** 2 for total in totals)) for n in range(1, 17)
    ]


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_shift_errors_are_exact_sums_in_any_layout(dtype: torch.dtype, size: float) -> None:
    """Saturated or not, ties included: integers add up to the same however the data lies, and are rounded once."""
    x = (torch.randn(3, 5, 24, 25) * size * 20).to(dtype)
    x.view(-1)[:3] = torch.tensor([math.inf, -math.inf, 0.0])
    scales = torch.tensor([1.0, 0.5, 0.037, 3e-4, 2.0**-9])
    expected = torch.tensor([exact_shift_errors(x[:, c], float(scales[c])) for c in range(5)], dtype=torch.float64)
    for values, axis in (
        (x, 1),
        (x.to(memory_format=torch.channels_last), 1),
        (x.transpose(0, 1).contiguous(), 0),
        (x.movedim(1, 3).contiguous(), -1),
        (x.permute(2, 0, 1, 3).contiguous(), 2),  # runs of a few values
    ):
        errors = torch.zeros(5, 16, dtype=torch.float64)
        ops.shift_error_(values, scales, errors, axis)
        assert torch.equal(errors, expected)


def test_the_same_shift_errors_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for x in (torch.randn(20, 70, 30, 30), torch.randn(5000, 70), torch.randn(300_001, 1)):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                errors = torch.zeros(x.shape[1], 16, dtype=torch.float64)
                ops.shift_error_(x, torch.tensor([1e-7]), errors)
                results.append(errors)
            assert all(torch.equal(results[0], r) for r in results)
    finally:
        torch.set_num_threads(before)


def test_nan_shows_in_the_errors_of_its_channel() -> None:
    x = torch.ones(300, 4)
    x[299, 2] = math.nan
    for function in (ops.shift_error_, shift.shift_error_reference):
        errors = torch.zeros(4, 16, dtype=torch.float64)
        function(x, torch.ones(1), errors)
        assert errors.isnan().all(1).tolist() == [False, False, True, False]


def test_shift_errors_add_up_over_batches_and_pick_a_shift(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, 5, device=device) * torch.tensor([1.0, 30.0, 900.0], device=device).view(3, 1, 1) * 1e4
    whole, parts = (torch.zeros(3, 16, dtype=torch.float64, device=device) for _ in range(2))
    scale = torch.ones(3, device=device)
    ops.shift_error_(x, scale, whole)
    for part in x.split(2):
        ops.shift_error_(part, scale, parts)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    best = ops.best_shift(whole)
    assert best.dtype == torch.int32
    assert torch.equal(best.long(), whole.argmin(1) + 1)
    # the smallest shift that keeps the largest accumulator within 16 bits, or one less
    bits = torch.ceil(torch.log2(x.abs().amax((0, 2, 3)) / 32768)).clamp_min(1).long()
    assert torch.all((best.long() == bits) | (best.long() == bits - 1))


def test_all_zero_data_and_ties_give_the_smallest_shift(device: torch.device) -> None:
    errors = torch.zeros(2, 16, dtype=torch.float64, device=device)
    ops.shift_error_(torch.zeros(5, 2, device=device), torch.ones(2, device=device), errors)
    assert ops.best_shift(errors).tolist() == [1, 1]
    errors[1, :4] = 7.0
    assert ops.best_shift(errors).tolist() == [1, 5]
    assert torch.equal(ops.best_shift(errors), shift.best_shift_reference(errors))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_scale_shows_in_the_errors(scale: float, device: torch.device) -> None:
    for function in (ops.shift_error_, shift.shift_error_reference):
        errors = torch.zeros(2, 16, dtype=torch.float64, device=device)
        function(torch.ones(3, 2, device=device), torch.tensor([1.0, scale], device=device), errors)
        assert errors[0].isfinite().all()
        assert errors[1].isnan().all()


@pytest.mark.parametrize("function", [ops.shift_error_, shift.shift_error_reference])
def test_bad_shift_input_is_refused(function: Any) -> None:
    x, errors = torch.zeros(2, 3), torch.zeros(3, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="deq_scale must hold 1 or 3 values"):
        function(x, torch.ones(2), errors)
    with pytest.raises(ValueError, match=r"errors must have shape \(3, 16\) or \(1, 16\)"):
        function(x, torch.ones(3), errors[:2])
    with pytest.raises(TypeError, match="errors must be"):
        function(x, torch.ones(3), errors.float())
    with pytest.raises(IndexError, match="channel_axis 2 is out of range"):
        function(x, torch.ones(3), errors, 2)
