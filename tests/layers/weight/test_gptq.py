"""GPTQ: the algorithm, and the inputs it is given."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.layers.weight.gptq import gptq_weight, im2col


def rounded(weight: Tensor, scale: Tensor, axis: int | None = 0) -> Tensor:
    return ops.lsq_fake_quantize(weight, scale, 4, axis, 1.0)


def by_column(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """Optimal brain surgeon as it is defined: the inverse of what is left of the matrix, for every column anew."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    left = torch.argsort(hessian.diagonal(), descending=True).tolist()
    step = scale.double().reshape(-1)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = weight[:, left[0]]
        error = column - torch.clamp(torch.round(column / step), -8, 7) * step
        weight[:, left[1:]] -= error[:, None] * (inverse[0, 1:] / inverse[0, 0])
        left = left[1:]
    return weight


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (16, 40), (8, 200)])
def test_agrees_with_the_definition(rows: int, columns: int, axis: int | None) -> None:
    torch.manual_seed(columns)
    weight = torch.randn(rows, columns)
    x = torch.randn(3 * columns, columns) @ torch.randn(columns, columns)
    scale = ops.search_weight_scale(weight, 4, axis)
    hessian = x.t() @ x
    changed = gptq_weight(weight, hessian, scale, 4)
    assert changed.dtype == weight.dtype and changed.shape == weight.shape
    torch.testing.assert_close(changed, by_column(weight, hessian, scale).float(), rtol=1e-4, atol=1e-4)
    errors = [((rounded(w, scale, axis) - weight) @ x.t()).square().sum() for w in (weight, changed)]
    assert errors[1] < 0.7 * errors[0]


def test_inputs_that_never_come_and_moments_that_say_nothing() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 10), torch.randn(50, 10)
    x[:, 3:6] = 0
    scale = ops.search_weight_scale(weight, 4, 0)
    changed = gptq_weight(weight, x.t() @ x, scale, 4)
    assert torch.equal(changed[:, 3:6], weight[:, 3:6]) and torch.isfinite(changed).all()
    for hessian in (torch.zeros(10, 10), torch.full((10, 10), torch.nan)):
        assert gptq_weight(weight, hessian, scale, 4) is weight


def test_one_input_seen() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 64), torch.randn(1, 64)
    scale = ops.search_weight_scale(weight, 4, 0)
    changed = gptq_weight(weight, x.t() @ x, scale, 4)
    errors = [((rounded(w, scale) - weight) @ x.t()).square().sum() for w in (weight, changed)]
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_dtype_and_layout_of_four_dimensions(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6, 3, 3).to(dtype)
    x = torch.randn(100, 54)
    changed = gptq_weight(weight, x.t() @ x, ops.search_weight_scale(weight.float(), 4, 0), 4)
    assert changed.dtype == dtype and changed.shape == weight.shape and not torch.equal(changed, weight)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), (5, 4, 12)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (5, 4, 12)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 4, 9, 11)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 9, 11)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 9, 11)),
    (nn.Conv3d(4, 6, (1, 2, 3), padding="same"), (2, 4, 5, 6, 7)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=repr)
@pytest.mark.parametrize("values", [100, 2000, 2**22])
def test_patches_times_weight_is_the_convolution(
    conv: nn.Conv2d, shape: tuple[int, ...], values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amct_ext.layers.weight.gptq._MAX_PATCH_VALUES", values)
    x = torch.randn(shape)
    parts = list(im2col(x, conv, conv.kernel_size, conv.stride, conv.dilation))
    assert len(parts) == 1 or values < 2**22
    y = F.linear(torch.cat(parts), conv.weight.flatten(1), conv.bias)
    want = conv(x)
    want = want.movedim(1 if len(shape) == conv.weight.dim() else 0, -1)
    if len(parts) == 1:
        torch.testing.assert_close(y.view(want.shape), want)
    else:  # parts come in another order
        torch.testing.assert_close(y.t() @ y, (flat := want.reshape(-1, 6)).t() @ flat, rtol=1e-4, atol=1e-4)
