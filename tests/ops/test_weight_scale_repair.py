"""Learned scales that would cost their channel: which ones change, to what, and that all others keep their bits."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, same_bits, special_rows
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import weight_scale_repair as repair

EPS = torch.finfo(torch.float32).eps


def repaired(call: object, w: Tensor, scale: Tensor, *rest: int | None) -> Tensor:
    scale = scale.clone()
    call(w, scale, *rest)  # type: ignore[operator]
    return scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees_with_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in axes_of(w):
            count = 1 if axis is None else w.shape[axis]
            scale = torch.tensor([0.03, -0.1, 1e-4, 0.0, 50.0], device=device).repeat(count)[:count]
            expected, seen = (
                repaired(call, w, scale, 8, axis)
                for call in (repair.repair_weight_scale_reference, ops.repair_weight_scale_)
            )
            assert same_bits(expected, seen), (w.shape, w.stride(), axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, _, scale in special_rows(dtype, device):
        for given in (scale, scale - 0.5):
            expected, seen = (
                repaired(call, w, given, 4, 0)
                for call in (repair.repair_weight_scale_reference, ops.repair_weight_scale_)
            )
            assert same_bits(expected, seen), w.shape


def test_scales_of_other_types_and_strides(device: torch.device) -> None:
    w = torch.randn(6, 40, device=device)
    by_range = ops.arq_fake_quantize(w, 8, 0)[1]
    for scale in (torch.full((6,), -1.0, device=device, dtype=torch.float64), torch.zeros(12, device=device)[::2]):
        ops.repair_weight_scale_(w, scale, 8, 0)
        assert torch.equal(scale.float(), by_range)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_only_lost_channels_change(num_bits: int, device: torch.device) -> None:
    torch.manual_seed(0)
    w = torch.randn(7, 200, device=device)
    by_range = ops.arq_fake_quantize(w, num_bits, 0)[1]
    factors = torch.tensor([1.0, 0.3, 1.5, 1e-3, 0.0, -1.0, 1e3], device=device)
    scale = by_range * factors
    after = repaired(ops.repair_weight_scale_, w, scale, num_bits, 0)
    assert same_bits(after[:3], scale[:3])
    assert same_bits(after[3:], by_range[3:])
    assert same_bits(repaired(ops.repair_weight_scale_, w, after, num_bits, 0), after)
    kept = ops.lsq_fake_quantize(w, after, num_bits, 0).norm(dim=1) / w.norm(dim=1)
    assert (kept > 0.1).all()


def test_channels_that_no_scale_fits_keep_theirs(device: torch.device) -> None:
    w = torch.randn(5, 40, device=device)
    w[0] = 0
    w[1] = 1e-9
    w[2, 7] = math.nan
    w[3, 8] = -math.inf
    scale = torch.tensor([1.0, -0.2, 0.0, -1.0, math.nan], device=device)
    assert same_bits(repaired(ops.repair_weight_scale_, w, scale, 8, 0), scale)


def test_a_lost_scale_of_a_leaf_is_written_without_a_new_version() -> None:
    w, scale = torch.randn(4, 9), torch.full((4,), -1.0).requires_grad_()
    y = ops.lsq_fake_quantize(w, scale, 8, 0)
    with torch.no_grad():
        ops.repair_weight_scale_(w, scale, 8, 0)
    assert (scale > EPS).all() and scale._version == 0
    y.sum().backward()  # the scale was saved before


def test_bad_arguments(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    for call in (ops.repair_weight_scale_, repair.repair_weight_scale_reference):
        with pytest.raises(ValueError, match="num_bits must be between 2 and 8"):
            call(w, w[:, 0].clone(), 16, 0)
        with pytest.raises(ValueError, match="scale must hold 4"):
            call(w, w[0].clone(), 8, 0)
