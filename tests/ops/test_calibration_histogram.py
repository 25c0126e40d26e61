"""The histogram of a range search: exact in itself, and the range found from it within the bound promised."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ops.samples import DTYPES, layouts
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import calibration_histogram as histogram
from amct_ext.ops import calibration_search as search

SHAPES = ("normal", "relu", "uniform", "heavy tails", "outliers", "constant", "zeros", "coarse", "negative")
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def values(shape: str, size: int) -> Tensor:
    x = torch.randn(size)
    if shape == "outliers":
        x[torch.randint(size, (3,))] = torch.tensor([1e4, -3e3, 50.0])
    return {
        "relu": x.relu(),
        "uniform": torch.rand(size),
        "heavy tails": x.exp() * x.sign(),
        "constant": torch.full_like(x, 0.7),
        "zeros": torch.zeros(size),
        "coarse": (x * 4).round() / 4,
        "negative": -x.abs(),
    }.get(shape, x)


def gathered(batches: list[Tensor], function: Any = ops.range_histogram_, keep: int = 8) -> tuple[Tensor, Tensor]:
    device = batches[0].device
    state = torch.zeros(histogram.BINS, 2, dtype=torch.int64, device=device), torch.zeros(2, keep, device=device)
    for x in batches:
        function(x, *state)
    return state


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


def errors(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """The scales of all ranges and their mean squared errors, in float64."""
    x = x.reshape(-1).float()
    scales, _, ends = search.symmetric_candidates(*search._extremes(x), num_bits)
    wide, found = x.double(), []
    for scale, end in zip(scales.double(), ends.double(), strict=True):
        found.append((torch.round(torch.clamp(wide, -end, end) / scale) * scale - wide).square().mean())
    return scales, torch.stack(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_histogram_is_exact_in_any_order(dtype: torch.dtype, device: torch.device) -> None:
    for shape in SHAPES:
        x = values(shape, 3_000) * torch.tensor([1.0, 1e-8, 1e30]).repeat(1_000)
        x = x.to(device, dtype)
        x = torch.where(x.isfinite(), x, torch.ones_like(x))
        expected = gathered([x], histogram.range_histogram_reference)
        assert same(expected, gathered([x])), shape
        assert same(expected, gathered([x[1::2], x[:0], x[::2]])), shape
        assert int(expected[0][:, 0].sum()) == x.numel()
        keys = (
            torch.arange(histogram._FIRST_KEY, histogram._FIRST_KEY + histogram.BINS, device=device)[1:]
            << histogram._OPEN_BITS
        )
        bottom = keys.to(torch.int32).view(torch.float32).double()
        width = bottom * 2.0**-10 / (bottom / 2 ** bottom.log2().floor())
        large = x.float().abs().double()[x.float().abs() >= 2.0**-24].sum()
        counts, rest = expected[0][1:].double().unbind(1)
        total = torch.where(counts > 0, counts * bottom + rest * width / 2**histogram._OPEN_BITS, 0).sum()
        torch.testing.assert_close(total, large, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_for_either_sign_are_the_histogram_of_either_part(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.cat([values("normal", 3_000), torch.tensor([0.0, -0.0, 1e-30, -1e-30])]).to(device, dtype)
    found = []
    for function in (ops.range_histogram_, histogram.range_histogram_reference):
        state = torch.zeros(histogram.SIGNED_SHAPE, dtype=torch.int64, device=device), torch.zeros(2, 8, device=device)
        for part in (x[:1_000], x[1_000:]):
            function(part, *state)
        found.append(state)
    assert same(*found)
    for half, part in zip(found[0][0], (x[~(x < 0)], x[x < 0]), strict=True):
        assert torch.equal(half, gathered([part])[0])
    assert same(ops.search_clip_range_histogram(*found[0]), ops.search_clip_range_histogram(*gathered([x])))


def test_every_layout(device: torch.device) -> None:
    for x in layouts(torch.randn(4, 5, 7, 9, device=device)):
        assert same(gathered([x]), gathered([x], histogram.range_histogram_reference))


def test_the_histogram_is_the_same_for_any_number_of_threads() -> None:
    x, before = torch.randn(3_000_001), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = gathered([x])
            results.append((*state, *ops.search_clip_range_histogram(*state)))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], result) for result in results)


@quick
@given(
    shape=st.sampled_from(SHAPES),
    size=st.integers(1, 6_000),
    factor=st.sampled_from([1e-30, 1e-12, 2e-8, 1.7e-5, 1e-3, 1.0, 37.0, 1e30]),
    cuts=st.lists(st.floats(0, 1), max_size=12),
    num_bits=st.sampled_from([2, 3, 4, 8, 10, 11, 16]),
    seed=st.integers(0, 2**31),
)
def test_the_range_is_within_the_bound(
    shape: str, size: int, factor: float, cuts: list[float], num_bits: int, seed: int
) -> None:
    """One of the 61 ranges of the exhaustive search, its error no further above the smallest than promised."""
    torch.manual_seed(seed)
    x = values(shape, size) * factor
    batches = list(x.tensor_split(sorted(int(c * size) for c in cuts)))
    *result, excess = ops.search_clip_range_histogram(*gathered(batches), num_bits)
    scales, found = errors(x, num_bits)
    assert (scales == result[0]).any()
    noise = 1e-11 * x.double().abs().max().square()  # of float64, here and there
    chosen = found[(scales == result[0]).int().argmax()]
    assert chosen <= found.min() + excess + noise
    limit = scales.double().max() / 2048 * x.double().abs().mean()
    if num_bits > 11:
        limit += x.double().square().mean() / 2**22
    assert excess <= limit + noise * 2 ** min(num_bits, 11)
    lowest, highest = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    assert same(tuple(result[1:]), (torch.zeros(()), highest * result[0], lowest * result[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """Their values lie on the edges of bins: the range is that of the exhaustive search over all values."""
    for shape in SHAPES:
        x = values(shape, 20_000).to(device, dtype)
        *result, excess = ops.search_clip_range_histogram(*gathered(list(x.split(7_000))))
        scales, found = errors(x, 8)
        assert result[0] == scales[found.argmin()], shape
        assert excess <= 1e-5 * scales.double().max().square(), shape
        if shape != "constant":  # many ranges hit a single value, and float32 rounding chooses among them
            assert same(tuple(result), tuple(v.float() for v in ops.search_clip_range(x))), shape


def test_values_that_ranges_do_not_cut_lose_nothing(device: torch.device) -> None:
    """Few distinct float32 values, none in a bin with a boundary: bounds meet, and the exact range is known as such."""
    x = torch.tensor([0.3, 0.7, 1.1, -2.3], device=device).repeat(1_000)
    *result, excess = ops.search_clip_range_histogram(*gathered([x]), 3)
    scales, found = errors(x, 3)
    assert result[0] == scales[found.argmin()]
    assert excess <= 1e-8


def test_the_percentile_is_that_of_all_batches(device: torch.device) -> None:
    x = torch.randn(1_050_000)
    x[[5, 700_000]] = torch.tensor([1e3, -1e3])
    state = gathered(list(x.to(device).split(300_000)))
    scale = ops.search_clip_range_histogram(*state)[0]
    candidates = search.symmetric_candidates(*search._extremes(x.to(device)), 8)[0]
    assert (candidates == scale).any()
    # One value kept a side is not enough for that many: the largest stands for the percentile.
    assert ops.search_clip_range_histogram(state[0], state[1][:, :1])[0] > candidates.max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_give_no_range(bad: float, device: torch.device) -> None:
    state = gathered([torch.tensor([1.0, bad, 2.0], device=device), torch.ones(3, device=device)])
    assert all(v.isnan().item() for v in ops.search_clip_range_histogram(*state))
    assert state[1].isfinite().all()


def test_no_values_give_no_range(device: torch.device) -> None:
    empty = gathered([torch.zeros(0, device=device)])
    assert all(v.isnan().item() for v in ops.search_clip_range_histogram(*empty))


def test_more_than_two_to_the_31_values() -> None:
    """Counts beyond 32 bits: the data of one batch many times over chooses the range that it chooses once."""
    counts, extremes = gathered([torch.randn(4096)])
    many = counts * 2**22
    once, often = (ops.search_clip_range_histogram(c, extremes[:, :1]) for c in (counts, many))
    assert int(many[:, 0].sum()) == 2**34
    assert once[0] == often[0]
    torch.testing.assert_close(often[4], once[4], rtol=1e-6, atol=1e-18)
    x = torch.full((1000,), 1.7)
    full, one = gathered([x])
    full = torch.where(full > 0, full + 2**40, full)
    expected = full + gathered([x])[0]
    for function in (ops.range_histogram_, histogram.range_histogram_reference):
        state = full.clone(), one.clone()
        function(x, *state)
        assert torch.equal(state[0], expected)


def test_bad_arguments() -> None:
    counts, extremes = gathered([torch.ones(3)])
    for error, state in (
        (ValueError, (torch.zeros(3, histogram.BINS, 2, dtype=torch.int64), extremes)),
        (TypeError, (counts.int(), extremes)),
        (TypeError, (counts, extremes.double())),
        (ValueError, (counts[1:], extremes)),
        (ValueError, (counts, extremes[0])),
        (ValueError, (counts, extremes[:, :0])),
    ):
        for function in (ops.range_histogram_, histogram.range_histogram_reference):
            with pytest.raises(error, match="range_histogram_: "):
                function(torch.ones(3), *state)
        with pytest.raises(error, match="search_clip_range_histogram: "):
            ops.search_clip_range_histogram(*state)
    with pytest.raises(TypeError, match="range_histogram_: x must be float32"):
        ops.range_histogram_(torch.ones(3, dtype=torch.int64), counts, extremes)
    with pytest.raises(ValueError, match="num_bits"):
        ops.search_clip_range_histogram(counts, extremes, 1)
