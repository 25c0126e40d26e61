"""Ranges of least absolute error and of a percentile, against all values tried in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import calibration_histogram as histogram


def gathered(*batches: Tensor, keep: int = 8) -> tuple[Tensor, Tensor]:
    device = batches[0].device
    state = torch.zeros(histogram.SIGNED_SHAPE, dtype=torch.int64, device=device), torch.zeros(2, keep, device=device)
    for x in batches:
        ops.range_histogram_(x, *state)
    return state


def error(x: Tensor, high: float, low: float, num_bits: int) -> float:
    """The mean absolute error of asymmetric quantisation."""
    x, lowest = x.double(), -(2 ** (num_bits - 1))
    scale = (high - low) / (2**num_bits - 1)
    offset = round(lowest - low / scale)
    codes = torch.clamp(torch.round(x / scale) + offset, lowest, -lowest - 1)
    return float(((codes - offset) * scale - x).abs().mean())


def smallest_holding(x: Tensor, percentile: float) -> Tensor:
    """The smallest value that so many % do not exceed."""
    return x.double().sort().values[math.ceil(percentile / 100 * len(x) - 1e-9) - 1]


def samples(device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(50_000, device=device)
    outliers = x.clone()
    outliers[:5] = torch.tensor([3e3, -1e3, 700.0, 9e3, 1e4], device=device)
    return {
        "normal": x,
        "relu": x.relu(),
        "gelu": torch.nn.functional.gelu(x),
        "outliers": outliers,
        "outliers above zero": outliers.abs(),
        "negative": -x.abs(),
        "sigmoid": x.sigmoid(),
        "heavy tails": x.sign() * (2 * x).exp(),
    }


@pytest.mark.parametrize("num_bits", [2, 4, 8, 12])
def test_the_error_is_near_the_smallest_there_is(num_bits: int, device: torch.device) -> None:
    for name, x in samples(device).items():
        high, low = (float(v) for v in ops.search_clip_range_wide(*gathered(x[:9_000], x[9_000:]), num_bits))
        above, below = float(x.max().clamp_min(0)), float(-x.min().clamp_max(0))
        ends = (max(above, below) * 2 ** (-torch.arange(0, 16, 0.02))).tolist()
        least = min(error(x, min(e, above), -min(e, below), num_bits) for e in ends[:: 1 if num_bits == 8 else 4])
        assert error(x, high, low, num_bits) <= 1.02 * least, name
        assert -below * 1.000001 <= low <= 0 <= high <= above * 1.000001, name
    assert (low == 0) == (below == 0)


def test_a_lower_end_that_is_fixed(device: torch.device) -> None:
    x = samples(device)["normal"]
    for function in (ops.search_clip_range_wide, ops.percentile_clip_range):
        high, low = function(*gathered(x), fixed_min=True)
        assert low == 0 and 2.5 < high < 4
    expected = ops.search_clip_range_wide(*gathered(x[x > 0]))[0]
    assert ops.search_clip_range_wide(*gathered(x), fixed_min=True)[0] == expected


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.9, 99.99, 100.0])
def test_the_percentile_is_that_of_the_magnitudes(percentile: float, device: torch.device) -> None:
    for name, x in samples(device).items():
        high, low = ops.percentile_clip_range(*gathered(x), percentile)
        end = smallest_holding(x.abs(), percentile)
        if end == 0:  # of ReLU
            end = smallest_holding(x[x > 0], percentile)
        assert float(high) == pytest.approx(float(end.clamp_max(x.max().clamp_min(0))), rel=2e-3), name
        assert float(low) == pytest.approx(-float(end.clamp_max(-x.min().clamp_max(0))), rel=2e-3), name


@pytest.mark.parametrize("function", [ops.search_clip_range_wide, ops.percentile_clip_range])
def test_values_without_a_range(function: type, device: torch.device) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        assert all(v.isnan() for v in function(*gathered(torch.tensor([1.0, bad], device=device))))
    assert all(v.isnan() for v in function(*gathered(torch.zeros(0, device=device))))
    for tiny in (0.0, 1e-30, -1e-9):
        x = torch.full((10,), tiny, device=device)
        assert [float(v) for v in function(*gathered(x))] == [127.0, -128.0]
        assert [float(v) for v in function(*gathered(x), fixed_min=True)] == [127.0, 0.0]


def test_bad_arguments() -> None:
    counts, extremes = gathered(torch.ones(3))
    for function in (ops.search_clip_range_wide, ops.percentile_clip_range):
        for kind, state in (
            (TypeError, (counts.int(), extremes)),
            (TypeError, (counts, extremes.double())),
            (ValueError, (counts[0], extremes)),
            (ValueError, (counts, extremes[:1])),
        ):
            with pytest.raises(kind, match=rf"{function.__name__}: "):
                function(*state)
        with pytest.raises(ValueError, match="num_bits"):
            function(counts, extremes, num_bits=17)
    for percentile in (0.0, -1.0, 100.5, math.nan):
        with pytest.raises(ValueError, match="percentile"):
            ops.percentile_clip_range(counts, extremes, percentile)
