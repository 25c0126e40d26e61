"""The range search: the same choice as the reference and as AMCT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, layouts, same_bits
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import calibration_search as search


def samples(size: int) -> dict[str, Tensor]:
    normal = torch.randn(size)
    outlier = normal.clone()
    outlier[size // 3] = 1e4
    return {
        "normal": normal,
        "relu": normal.relu(),
        "uniform": torch.rand(size),
        "heavy tails": normal.exp() * normal.sign(),
        "outlier": outlier,
        "coarse": (normal * 4).round() / 4,
        "negative": -normal.abs(),
        "zeros": torch.zeros(size),
        "tiny": normal * 1e-12,
        "increasing": torch.linspace(0, 3, size),
    }


def same(expected: tuple[Tensor, ...], actual: tuple[Tensor, ...]) -> bool:
    return all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.parametrize("size", [1, 7, 1000, 50001])
def test_the_same_range_as_the_reference(size: int, device: torch.device) -> None:
    for name, x in samples(size).items():
        x = x.to(device)
        for num_bits in (4, 8) if size > 1000 else (2, 4, 8, 16):
            assert same(search.search_clip_range_reference(x, num_bits), ops.search_clip_range(x, num_bits)), (
                name,
                num_bits,
            )
        assert same(search.search_clip_range_reference(x, 8, True), ops.search_clip_range(x, 8, True)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(4, 16, 25, 25).to(device, dtype)
    for values in layouts(x):
        assert same(search.search_clip_range_reference(values), ops.search_clip_range(values))


def test_the_percentile_leaves_out_one_in_a_million(device: torch.device) -> None:
    x = torch.randn(1_050_000)
    x[[5, 700_000]] = torch.tensor([1e3, -1e3])
    assert same(search.search_clip_range_reference(x), ops.search_clip_range(x.to(device)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 100_000])
def test_values_that_are_not_finite_give_no_range(bad: float, size: int, device: torch.device) -> None:
    x = torch.ones(size, device=device)
    x[-1] = bad
    for function in (ops.search_clip_range, search.search_clip_range_reference):
        assert all(v.isnan().item() for v in function(x))


def test_the_same_range_for_any_number_of_threads() -> None:
    x = torch.randn(500_000).relu()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.search_clip_range(x))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], r) for r in results)


def test_ranges_of_amct(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "ifmr.pt", weights_only=True):
        if item["name"] == "module_two_batches":
            x, expected, arguments = torch.cat([b.flatten() for b in item["batches"]]), item["second"], ()
        else:
            x, expected, arguments = item["x"], item, (item["num_bits"], item["with_offset"])
        if isinstance(x, str):
            assert x == "torch.randn(2500000, generator=torch.Generator().manual_seed(77))"
            x = torch.randn(2500000, generator=torch.Generator().manual_seed(77))
        result = ops.search_clip_range(x, *arguments)
        for name, value in zip(("scale", "offset", "clip_max", "clip_min"), result, strict=True):
            assert value == expected[name], (item["name"], name)


def test_scales_too_small_beside_outliers(device: torch.device) -> None:
    """Some scales fall below the smallest one and become 1, which clips to zero what the percentile left out."""
    x = torch.rand(1_000_100) * 2e-5
    x[5] = 10.0
    x = x.to(device)
    assert same(search.search_clip_range_reference(x), ops.search_clip_range(x))


def test_the_ratios_are_those_of_torch() -> None:
    assert torch.equal(torch.tensor(search.RATIOS), torch.arange(0.7, 1.3, 0.01, dtype=torch.float32))


@pytest.mark.parametrize("function", [ops.search_clip_range, search.search_clip_range_reference])
def test_bad_samples_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="x must hold at least one value"):
        function(torch.zeros(0, 3))
    with pytest.raises(TypeError, match="x must be float32"):
        function(torch.zeros(3, dtype=torch.int8))
    with pytest.raises(ValueError, match="num_bits"):
        function(torch.zeros(3), 1)
