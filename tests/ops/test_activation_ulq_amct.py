"""ulq_fake_quantize against data of AMCT: its values, its documented deviations, dtypes that it rejects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ops.samples import scalars
from torch import Tensor

from amct_ext import ops
from amct_ext.ops._activation_clips import affine

# What ours does where AMCT lets crossed clips through or moves a minimum that is fixed.
DEVIATIONS: dict[tuple[str, bool], tuple[float, float]] = {
    ("crossed_clips", False): (1.0, -1.0),
    ("crossed_both_positive", False): (1.0, -1.0),
    ("both_negative", False): (1.0, -1.0),
    ("equal_clips_use_pre", True): (1.3, 0.0),
}


def test_agrees_with_amct(golden: Path) -> None:
    checked = 0
    for item in torch.load(golden / "ops" / "act_ulq.pt", weights_only=True):
        if item["name"] in ("dtype", "invalid_input") or not item["asymmetric"]:
            continue
        checked += 1
        clips = [item[k] for k in ("clip_max", "clip_min", "clip_max_pre", "clip_min_pre")]
        y, scale, offset, high, low, invalid = ops.ulq_fake_quantize(
            item["x"], *clips, item["num_bits"], item["fixed_min"]
        )
        if "error" in item:  # AMCT raises where there are no previous clips; ours goes on with what it has
            assert not invalid.item()
            continue
        deviation = DEVIATIONS.get((item["name"], item["fixed_min"]))
        if deviation is not None:
            assert (high.item(), low.item()) == pytest.approx(deviation)
            continue
        _equal_to_golden(item, y, scale, offset, high, low)
    assert checked == 43 - 2  # two symmetric ones are left out


def _equal_to_golden(item: dict[str, Any], y: Tensor, scale: Tensor, offset: Tensor, high: Tensor, low: Tensor) -> None:
    assert torch.equal(y, item["out"])
    assert (scale, offset) == (item["scale"], item["offset"])
    assert (high, low) == (item["clip_max_out"], item["clip_min_out"])
    dx, d_max, d_min = ops.ulq_fake_quantize_backward(item["grad_out"], item["x"], high, low, item["num_bits"])
    assert torch.equal(dx, item["grad_x"])
    torch.testing.assert_close(d_max, item["grad_clip_max"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_min, item["grad_clip_min"], rtol=1e-5, atol=1e-6)


def test_dtypes_that_amct_rejects_work(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "act_ulq.pt", weights_only=True):
        if item["name"] == "dtype":
            none = torch.tensor(math.nan)
            y = ops.ulq_fake_quantize(item["x"], item["clip_max"], item["clip_min"], none, none, 8, False)[0]
            assert y.dtype == item["x"].dtype
            if "out" in item:
                torch.testing.assert_close(y, item["out"])


def test_scale_and_offset_of_amct(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "scale_offset.pt", weights_only=True):
        if item["asymmetric"]:
            high, low = max(item["data_max"], 0.0), min(item["data_min"], 0.0)
            scale, offset = affine(*scalars(high, low), item["num_bits"])
            assert (scale, offset) == (item["scale"], item["offset"]), item
