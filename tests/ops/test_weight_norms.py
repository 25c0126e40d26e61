"""Channel norms: the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from support.ops.samples import DTYPES, inputs

from amct_ext import ops
from amct_ext.ops.weight_norms import filter_norms_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees_with_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        for axis in range(w.dim()):
            norms = ops.filter_norms(w, axis)
            torch.testing.assert_close(norms, filter_norms_reference(w, axis), rtol=1e-6, atol=1e-6)
