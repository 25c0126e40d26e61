"""Calls of torch functions as products: their operands, and the mode that intercepts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amct_ext.layers.product_call import ProductCall, ProductMode, product_call

X, W, B = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4)


@pytest.mark.parametrize(
    ("func", "args", "kwargs", "in_out", "bias"),
    [
        (F.linear, (X, W, B), {}, False, B),
        (F.linear, (X,), {"weight": W, "bias": B}, False, B),
        (torch.matmul, (X, W), {}, True, None),
        (Tensor.__matmul__, (X, W), {}, True, None),
        (torch.mm, (X,), {"mat2": W}, True, None),
        (torch.addmm, (B, X, W), {"beta": 1}, True, B),
    ],
)
def test_operands_by_position_and_keyword(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], in_out: bool, bias: Tensor | None
) -> None:
    call = product_call(func, args, kwargs)
    assert call is not None and call.kind == "Linear" and call.weight_is_in_out is in_out
    assert call.x is X and call.weight is W and call.bias is bias
    torch.testing.assert_close(call.compute(2 * X, W), func(*args, **kwargs) * 2 - (0 if bias is None else bias))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.relu, (X,), {}),
        (torch.addmm, (B, X, W), {"beta": 2}),  # more than a product
        (torch.matmul, (X, 3), {}),
    ],
)
def test_what_is_no_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert product_call(func, args, kwargs) is None


def test_another_bias() -> None:
    for args, kwargs in (((X, W, B), {}), ((X, W), {"bias": B}), ((X, W), {})):
        call = product_call(F.linear, args, kwargs)
        assert call is not None
        torch.testing.assert_close(call.with_bias(2 * B).compute(X, W), F.linear(X, W, 2 * B))


@pytest.mark.parametrize(
    "derive",
    [
        lambda w: w,
        lambda w: w * 2,
        lambda w: w.chunk(2)[1],
        lambda w: torch.stack(w.unbind(0)),
        lambda w: torch.cat(w.split([1, 3])),
        lambda w: F.normalize(w.view(2, 8)).view(4, 4),
    ],
    ids=["itself", "scaled", "chunk", "unbind", "split", "normalised"],
)
def test_the_mode_intercepts_weights_derived_from_its_own(derive: Any) -> None:
    weight, seen = nn.Parameter(W), []

    def on_product(call: ProductCall) -> Tensor:
        seen.append(call)
        return call.compute(call.x, call.weight)

    with ProductMode(weight, on_product):
        F.linear(X, W)  # another tensor with the same values
        F.linear(X, derive(weight))
    assert len(seen) == 1
