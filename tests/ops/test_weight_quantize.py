"""Integer codes of weights: the kernel against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, same_bits, special_rows

from amct_ext import ops
from amct_ext.ops.weight_quantize import quantize_weight_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in axes_of(w):
            learned = ops.arq_fake_quantize(w, 8, axis)[1] * 0.7
            codes = ops.quantize_weight(w, learned, 8, axis)
            assert same_bits(quantize_weight_reference(w, learned, 8, axis), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, _, scale in special_rows(dtype, device):
        assert same_bits(quantize_weight_reference(w, scale, 8, 0), ops.quantize_weight(w, scale, 8, 0)), w.shape


@pytest.mark.parametrize("op", [ops.quantize_weight, quantize_weight_reference])
def test_the_number_of_scales_is_checked(op: Any) -> None:
    with pytest.raises(ValueError, match=r"scale must hold 2 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(3), 8, 0)
    with pytest.raises(ValueError, match=r"scale must hold 1 value\(s\)"):
        op(torch.zeros(2, 3), torch.ones(2), 8, None)
