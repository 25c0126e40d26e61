"""2:4 masks: the rule and its ties, refreshing, packing; data of AMCT."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, inputs, layout, same_bits

from amct_ext import ops
from amct_ext.ops import sparsity_mask as masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        ties = (w * 2).round()
        for axis in range(w.dim()):
            for values in (w, ties):
                expected, actual = masks.mask_2to4_reference(values, axis), ops.mask_2to4(values, axis)
                assert same_bits(expected, actual), (w.shape, axis)
                assert layout(expected) == layout(actual)


def test_two_of_four_are_kept_and_they_are_the_largest(device: torch.device) -> None:
    w = torch.randn(5, 16, 3, 3, device=device)
    mask = ops.mask_2to4(w)
    groups = mask.movedim(1, -1).unflatten(-1, (-1, 4))
    assert torch.all(groups.sum(-1) == 2)
    size = w.abs().movedim(1, -1).unflatten(-1, (-1, 4))
    kept = torch.where(groups, size, torch.inf).amin(-1)
    dropped = torch.where(groups, 0, size).amax(-1)
    assert torch.all(kept >= dropped)


def test_ties_fall_as_in_the_selection_of_the_reference(device: torch.device) -> None:
    """All orders of four magnitudes, against torch.topk on a CPU, which AMCT uses."""
    groups = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float32)
    dropped = groups.topk(2, largest=False).indices
    expected = torch.ones_like(groups, dtype=torch.bool).scatter_(1, dropped, False)
    assert torch.equal(ops.mask_2to4(groups.to(device)).cpu(), expected)
    assert torch.equal(masks.mask_2to4_reference(groups), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_are_not_clear_beside_groups_that_are(dtype: torch.dtype, device: torch.device) -> None:
    """Kernels choose by the second largest magnitude and look again where the third is as large, or NaN is there."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan, -math.nan])
    for inner in (1, 2, 3, 9, 16, 33, 64):
        for count in (7, 64, 130):
            w = torch.randn(2, count, inner)
            odd = torch.rand(w.shape) < 0.03
            w = torch.where(odd, values[torch.randint(len(values), w.shape)], w).to(device, dtype)
            assert same_bits(masks.mask_2to4_reference(w, 1), ops.mask_2to4(w, 1)), (inner, count)


def test_special_values(device: torch.device) -> None:
    w = torch.tensor([[math.nan, math.inf, 1.0, -math.inf], [-0.0, 0.0, 1e-45, 0.0]], device=device)
    assert ops.mask_2to4(w).tolist() == [[True, True, False, False], [True, False, True, False]]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_a_partial_group_is_padded_with_zeros(count: int, device: torch.device) -> None:
    w = torch.rand(4, count, device=device) + 0.1
    kept = ops.mask_2to4(w).sum(1)
    assert torch.all(kept == {1: 1, 2: 2, 3: 2, 5: 3, 6: 4}[count])


@pytest.mark.parametrize(("update_freq", "renewed"), [(0, [0]), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4])])
def test_refresh_follows_the_counter(update_freq: int, renewed: list[int], device: torch.device) -> None:
    step = torch.zeros((), dtype=torch.int64, device=device)
    mask = torch.ones(3, 8, dtype=torch.bool, device=device)
    for i in range(5):
        w = torch.randn(3, 8, device=device)
        before = mask.clone()
        ops.refresh_mask_(w, mask, step, update_freq)
        assert torch.equal(mask, ops.mask_2to4(w) if i in renewed else before)
        assert step.item() == i + 1


def test_refresh_does_what_the_reference_does(device: torch.device) -> None:
    for w in inputs(torch.float32, device):
        if w.dim() < 2:
            continue
        for start in (0, 1):
            state = [(torch.ones_like(w, dtype=torch.bool), torch.tensor([start], device=device)) for _ in range(2)]
            masks.refresh_mask_reference(w, *state[0], 0)
            ops.refresh_mask_(w, *state[1], 0)
            assert all(torch.equal(a, b) for a, b in zip(*state, strict=True))


def test_packing_round_trip(device: torch.device) -> None:
    for x in inputs(torch.float32, device):
        mask = x > 0
        words = ops.pack_mask(mask)
        assert same_bits(masks.pack_mask_reference(mask), words)
        assert torch.equal(ops.unpack_mask(words, mask.shape), mask)
        assert torch.equal(masks.unpack_mask_reference(words, mask.shape), mask)


def test_masks_of_amct(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "selective_mask.pt", weights_only=True):
        if "error" in item:
            with pytest.raises(IndexError, match="out of range"):
                ops.mask_2to4(item["weight"], item["prune_axis"])
            continue
        assert torch.equal(ops.mask_2to4(item["weight"], item["prune_axis"]), item["mask"].bool()), item["name"]


def test_packing_of_amct(golden: Path) -> None:
    for item in torch.load(golden / "ops" / "mask_packing.pt", weights_only=True):
        mask = item["mask"].bool()
        assert ops.pack_mask(mask).tolist() == item["ints"]
        assert torch.equal(ops.unpack_mask(torch.tensor(item["ints"]), mask.shape), mask)


@pytest.mark.parametrize("function", [ops.mask_2to4, masks.mask_2to4_reference])
def test_bad_weights_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="w must be float32"):
        function(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match="axis 2 is out of range"):
        function(torch.zeros(4, 4), 2)


@pytest.mark.parametrize("function", [ops.refresh_mask_, masks.refresh_mask_reference])
def test_bad_state_is_refused(function: Any) -> None:
    w, mask, step = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool), torch.tensor(0)
    with pytest.raises(TypeError, match="mask must be"):
        function(w, mask.float(), step, 0)
    with pytest.raises(TypeError, match="step must be"):
        function(w, mask, step.float(), 0)
    with pytest.raises(ValueError, match="mask must have the shape of w"):
        function(w, mask[:2], step, 0)
    with pytest.raises(ValueError, match="update_freq must be 0 or more, not -1"):
        function(w, mask, step, -1)
    assert step.item() == 0


@pytest.mark.parametrize("function", [ops.unpack_mask, masks.unpack_mask_reference])
def test_bad_words_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="takes 2 words"):
        function(torch.zeros(1, dtype=torch.int64), (65,))
    with pytest.raises(TypeError, match="words must be"):
        function(torch.zeros(1), (64,))
    with pytest.raises(TypeError, match="mask must be"):
        ops.pack_mask(torch.zeros(4))
