"""ulq_fake_quantize_: the op that also writes the state of a quantiser."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, same_bits

from amct_ext import ops
from amct_ext.ops import activation_ulq as ulq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "start", [(1.5, -1.2, math.nan, math.nan), (-1.0, -2.0, 2.0, -1.0), (math.nan, -1.0, math.nan, math.nan)]
)
def test_state_is_written_in_the_same_call(start: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Results, gradients and state are those of the plain op and copies after it; kernel and reference agree."""
    x = torch.randn(3, 70, device=device).to(dtype)
    plain = [torch.tensor(v, device=device, requires_grad=i < 2) for i, v in enumerate(start)]
    y, *used, bad = ops.ulq_fake_quantize(x, *plain)
    y.float().sum().backward()
    for function in (ops.ulq_fake_quantize_, ulq.ulq_fake_quantize_with_state_reference):
        clips = [torch.tensor(v, device=device, requires_grad=i < 2) for i, v in enumerate(start)]
        state = [torch.zeros((), device=device), torch.zeros((), device=device), torch.tensor(False, device=device)]
        versions = [v._version for v in (*clips, *state)]
        with torch.set_grad_enabled(function is ops.ulq_fake_quantize_):
            made = function(x, *clips, *state)
        assert same_bits(made[0].detach(), y.detach())
        scale, offset, high, low = used
        values = high, low, high, low, scale, offset, bad, high, low
        for value, expected in zip((*clips, *state, *made[1:]), values, strict=True):
            assert same_bits(value.detach(), expected)
        assert all(v._version > before for v, before in zip((*clips, *state[:2]), versions, strict=False))
        assert made[1].data_ptr() != clips[0].data_ptr()
        if made[0].requires_grad:
            made[0].float().sum().backward()
            assert all(same_bits(a.grad, b.grad) for a, b in zip(clips[:2], plain[:2], strict=True))


def test_the_flag_stays_up() -> None:
    clips = [torch.tensor(v) for v in (1.0, -1.0, math.nan, math.nan)]
    state = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(False)
    for x, expected in ((1.0, False), (math.inf, True), (1.0, True)):
        ops.ulq_fake_quantize_(torch.full((3,), x), *clips, *state)
        assert state[2].item() is expected
