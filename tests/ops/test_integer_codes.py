"""8-bit codes of activations and packed weights: the kernels against the references and against fake quantisation."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, inputs, layout, same_bits, scalars

from amct_ext import ops
from amct_ext.ops import integer_codes as coding

CLIPS = ((1.7, -0.9), (0.0, -1.0), (2.0, 0.0), (30.0, -20.0), (1e-9, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [2, 8])
def test_codes_have_the_bits_of_the_reference(dtype: torch.dtype, num_bits: int, device: torch.device) -> None:
    wide = [torch.randn(2, 33, 17, 19, device=device).to(dtype), torch.randn(3, 64, 7, 7, device=device).to(dtype)]
    for i, x in enumerate([*inputs(dtype, device), *wide]):
        arguments = (x, *scalars(*CLIPS[i % len(CLIPS)], math.nan, math.nan, device=device), num_bits, i % 2 == 1)
        expected, actual = coding.ulq_quantize_reference(*arguments), ops.ulq_quantize(*arguments)
        for a, b in zip(expected, actual, strict=True):
            assert same_bits(a, b), (x.shape, x.stride())
        assert layout(expected[0]) == layout(actual[0])


@pytest.mark.parametrize("clips", CLIPS)
def test_codes_are_those_of_the_fake_quantisation(clips: tuple[float, float], device: torch.device) -> None:
    x = torch.randn(3, 20, 9, 11, device=device) * 3
    # Many values in the middle between two codes.
    x[0] = (torch.randint(-600, 600, x[0].shape, device=device) / 2) * ((clips[0] - clips[1]) / 255)
    arguments = (x, *scalars(*clips, math.nan, math.nan, device=device))
    y, *rest = ops.ulq_fake_quantize(*arguments)
    codes, *others = ops.ulq_quantize(*arguments)
    assert all(same_bits(a, b) for a, b in zip(rest, others, strict=True))
    assert torch.equal((codes.float() - 128 - rest[1]) * rest[0], y)


def test_values_that_are_no_numbers(device: torch.device) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], device=device)
    codes, *_, invalid = ops.ulq_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan, device=device))
    assert codes.tolist() == [0, 255, 0, 127] and bool(invalid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for shape in ((1, 1), (16, 4), (17, 5), (40, 64), (3, 3, 7, 7), (33, 18, 3, 2), (0, 4), (4, 0, 3, 3)):
        w = torch.randn(shape, device=device).to(dtype)
        for scale in (torch.rand(shape[0], device=device) * 0.05, torch.full((1,), 0.02, device=device)):
            for value in (w, w.transpose(0, 1).contiguous().transpose(0, 1)):
                expected, actual = coding.pack_weight_reference(value, scale, 6), ops.pack_weight(value, scale, 6)
                assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True)), shape


def test_a_fake_quantised_weight_gives_its_own_codes(device: torch.device) -> None:
    w = torch.randn(40, 30, 3, 3, device=device) * torch.logspace(-6, 3, 40, device=device).view(-1, 1, 1, 1)
    y, scale = ops.arq_fake_quantize(w, 8, 0)
    packed, sums = ops.pack_weight(y, scale)
    codes = ops.quantize_weight(w, scale, 8, 0)
    assert torch.equal(coding.unpacked(packed, 40, 30), codes.double().flatten(2))
    assert torch.equal(sums.long(), codes.long().sum((1, 2, 3)))


def test_bad_input_is_refused(device: torch.device) -> None:
    x, (high, low) = torch.randn(2, 8, device=device), scalars(1.0, -1.0, device=device)
    with pytest.raises(ValueError, match="num_bits"):
        ops.ulq_quantize(x, high, low, high, low, 9)
    with pytest.raises(TypeError, match="float32"):
        ops.ulq_quantize(x.int(), high, low, high, low)
    with pytest.raises(ValueError, match="1 or 2"):
        ops.pack_weight(x, torch.ones(3, device=device))
    with pytest.raises(ValueError, match="two dimensions"):
        ops.pack_weight(x[0], torch.ones(1, device=device))
