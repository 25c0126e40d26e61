"""The scale of least squared error: kernel against reference, how good it is, what it says of bad channels."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, same_bits, special_rows
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import weight_scale_search as search


def same_scales(expected: Tensor, seen: Tensor) -> bool:
    """Sums agree to rounding, so the scales that come of them do; those that come of no sum have the same bits."""
    if same_bits(expected, seen):
        return True
    return bool(torch.allclose(expected, seen, rtol=1e-6, atol=0, equal_nan=True))


def squared_error(w: Tensor, scale: Tensor, num_bits: int, axis: int | None) -> Tensor:
    d = (ops.lsq_fake_quantize(w, scale, num_bits, axis) - w).double().square()
    return d.sum() if axis is None else d.flatten(1).sum(1)


def outliers(*shape: int) -> Tensor:
    w = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.005, w * 5, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees_with_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        mask = torch.rand(w.shape, device=device) > 0.5
        for axis in axes_of(w):
            for num_bits in (2, 4, 8):
                for given in (None, mask):
                    expected = search.search_weight_scale_reference(w, num_bits, axis, given)
                    seen = ops.search_weight_scale(w, num_bits, axis, given)
                    assert same_scales(expected, seen), (w.shape, w.stride(), axis, num_bits)
                    assert expected.dtype == seen.dtype and expected.shape == seen.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, mask, _ in special_rows(dtype, device):
        for given in (None, mask):
            expected = search.search_weight_scale_reference(w, 4, 0, given)
            assert same_scales(expected, ops.search_weight_scale(w, 4, 0, given)), w.shape


def test_a_mask_is_as_zeros(device: torch.device) -> None:
    w = torch.randn(6, 40, device=device)
    mask = ops.mask_2to4(w)
    for axis in (0, None):
        kept = ops.apply_mask(w, mask)
        assert same_bits(ops.search_weight_scale(kept, 4, axis), ops.search_weight_scale(w, 4, axis, mask))


@pytest.mark.parametrize(("num_bits", "shape"), [(4, (8, 128)), (4, (64, 9)), (4, (1, 60000)), (8, (4, 2000))])
def test_the_error_is_nearly_the_least_there_is(num_bits: int, shape: tuple[int, int], device: torch.device) -> None:
    torch.manual_seed(0)
    for w in (torch.randn(shape), outliers(*shape), torch.distributions.StudentT(3.0).sample(shape)):
        w = w.to(device)
        by_range = ops.arq_fake_quantize(w, num_bits, 0)[1]
        tried = [squared_error(w, by_range * f, num_bits, 0) for f in torch.linspace(0.02, 1.05, 200).tolist()]
        seen = squared_error(w, ops.search_weight_scale(w, num_bits, 0), num_bits, 0).sum()
        assert seen < torch.stack(tried).amin(0).sum() * 1.04
        assert seen <= squared_error(w, by_range, num_bits, 0).sum() * 1.0001


def test_codes_that_fit_exactly_give_their_scale(device: torch.device) -> None:
    codes = torch.tensor([[-8.0, 7.0, 3.0, 0.0, 1.0, -2.0]], device=device)
    assert torch.allclose(ops.search_weight_scale(codes * 0.25, 4, 0), torch.tensor([0.25], device=device))


def test_the_scale_says_what_is_wrong_with_a_channel(device: torch.device) -> None:
    w = torch.randn(5, 40, device=device)
    w[1] = 0
    w[2] = 1e-7
    w[3, 7] = math.nan
    w[4, 8] = -math.inf
    scale = ops.search_weight_scale(w, 4, 0)
    assert torch.isfinite(scale).tolist() == [True, True, True, False, False]
    assert (scale == 1).tolist() == [False, True, True, False, False]
    assert same_bits(ops.arq_fake_quantize(w, 4, 0)[1][1:], scale[1:])


def test_same_bits_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        for w in (torch.randn(64, 3001), torch.randn(3, 100, 9)):
            for axis in (None, 0, 1):
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(ops.search_weight_scale(w, 4, axis))
                assert all(same_bits(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


def test_bad_arguments(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    for call in (ops.search_weight_scale, search.search_weight_scale_reference):
        with pytest.raises(ValueError, match="num_bits must be between 2 and 8"):
            call(w, 16)
        with pytest.raises(TypeError, match="mask must be"):
            call(w, 4, 0, w)
        with pytest.raises(ValueError, match="shape of w"):
            call(w, 4, 0, w[0] > 0)
        with pytest.raises(IndexError, match="channel_axis"):
            call(w, 4, 2)
