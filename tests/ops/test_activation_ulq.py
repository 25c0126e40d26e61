"""ulq_fake_quantize: kernel against reference, collapsed clips, values that are not finite, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.ops.samples import DTYPES, ULQ_CLIPS, inputs, layout, same_bits, scalars
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import activation_ulq as ulq

OUTPUTS = ("y", "scale", "offset", "clip_max", "clip_min", "invalid")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_forward_has_the_bits_of_the_reference(dtype: torch.dtype, num_bits: int, device: torch.device) -> None:
    for i, x in enumerate(inputs(dtype, device)):
        high, low = ULQ_CLIPS[i % len(ULQ_CLIPS)]
        arguments = (x, *scalars(high, low, math.nan, math.nan, device=device), num_bits, i % 2 == 1)
        expected, actual = ulq.ulq_fake_quantize_reference(*arguments), ops.ulq_fake_quantize(*arguments)
        for name, a, b in zip(OUTPUTS, expected, actual, strict=True):
            assert same_bits(a, b), (name, x.shape, x.stride())
        assert layout(expected[0]) == layout(actual[0])


def sliced(name: str, dtype: torch.dtype) -> Tensor:
    """Tensors with holes whose neighbours are hundreds."""
    whole = {"channels": (4, 8, 20, 20), "long rows": (3, 50000), "short rows": (90, 300), "permuted": (6, 5, 500)}
    x = torch.randn(whole.get(name, (7, 3, 11, 13))).to(dtype)
    return {
        "channels": lambda: x[:, 2:6],
        "long rows": lambda: x[:, 7:40007],
        "short rows": lambda: x[:, :257],
        "permuted": lambda: x[:, 1:4, :300].permute(2, 0, 1),
        "every other image": lambda: x[::2],
        "expanded": lambda: x[:1].expand(7, 3, 11, 13),
    }[name]()


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["channels", "long rows", "short rows", "permuted", "every other image", "expanded"])
def test_slices_are_read_in_place(name: str, dtype: torch.dtype) -> None:
    x = sliced(name, dtype)
    clips, none = scalars(1.7, -0.9), scalars(math.nan, math.nan)
    expected = ulq.ulq_fake_quantize_reference(x, *clips, *none)
    grad = torch.randn(x.shape).to(dtype).as_strided_(x.shape, expected[0].stride())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y, *_, invalid = ops.ulq_fake_quantize(x, *clips, *none)
        gradients = ops.ulq_fake_quantize_backward(grad, x, *clips)
    assert not any(event.key == "aten::copy_" for event in profile.key_averages())
    assert same_bits(expected[0], y)
    assert layout(expected[0]) == layout(y)
    assert not invalid
    again = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
    assert same_bits(again[0], gradients[0])
    for a, b in zip(again[1:], gradients[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    x[-1, -1].fill_(math.inf)
    assert ops.ulq_fake_quantize(x, *clips, *none)[5]


@pytest.mark.parametrize(
    ("given", "fixed_min", "effective"),
    [
        ((0.7, 0.7, 1.3, -0.9), False, (1.3, -0.9)),
        ((0.3, 0.5, 1.0, -1.0), False, (1.0, -1.0)),  # crossed: AMCT lets it through
        ((1e-8, -1e-8, 1.0, -1.0), False, (1.0, -1.0)),  # below FLT_EPSILON: AMCT lets it through
        ((-0.1, -1.0, 1.1, -0.8), False, (1.1, -1.0)),
        ((2.0, 0.4, 1.1, -0.8), False, (2.0, -0.8)),
        ((-0.4, -1.0, 0.9, -0.3), True, (0.9, 0.0)),
        ((0.5, 0.5, math.nan, math.nan), False, (0.5, 0.0)),  # nothing to fall back to
        ((-0.5, -0.7, math.nan, math.nan), False, (0.0, -0.7)),
    ],
)
def test_collapsed_clips_fall_back(
    given: tuple[float, ...], fixed_min: bool, effective: tuple[float, float], device: torch.device
) -> None:
    for function in (ops.ulq_fake_quantize, ulq.ulq_fake_quantize_reference):
        result = function(torch.randn(10, device=device), *scalars(*given, device=device), 8, fixed_min)
        assert result[3].item() == pytest.approx(effective[0])
        assert result[4].item() == pytest.approx(effective[1])
        assert not result[5].item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 40000])
def test_values_that_are_not_finite_are_flagged(
    dtype: torch.dtype, value: float, size: int, device: torch.device
) -> None:
    x = torch.zeros(size, dtype=dtype, device=device)
    arguments = scalars(1.0, -1.0, math.nan, math.nan, device=device)
    assert not ops.ulq_fake_quantize(x, *arguments)[5].item()
    x[size // 2] = value
    assert ops.ulq_fake_quantize(x, *arguments)[5].item()


def test_a_clip_that_is_not_finite_is_flagged(device: torch.device) -> None:
    x = torch.zeros(3, device=device)
    for clip in (math.nan, math.inf):
        assert ops.ulq_fake_quantize(x, *scalars(clip, -1.0, math.nan, math.nan, device=device))[5].item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("high", "low"), [(127.0, -128.0), (1.27, -1.28), (1.0, -1.0), (510.0, -512.0), (2.0, -1.5)])
def test_ties_and_signs_of_zero(dtype: torch.dtype, high: float, low: float, device: torch.device) -> None:
    """Values between two codes and what rounds to zero; with an offset of +0 the sign of that zero counts."""
    codes = torch.arange(-300, 300) / 2
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1e-40, 6e-8, -6e-8, -0.2, 0.2])
    scale = (high - low) / 255
    x = torch.cat([codes * scale, torch.nextafter(codes * scale, torch.tensor(9.0)), tiny * scale, tiny])
    x = x.to(device=device, dtype=dtype)
    arguments = (x, *scalars(high, low, math.nan, math.nan, device=device))
    assert same_bits(ulq.ulq_fake_quantize_reference(*arguments)[0], ops.ulq_fake_quantize(*arguments)[0])


@pytest.mark.parametrize("function", [ops.ulq_fake_quantize, ulq.ulq_fake_quantize_reference])
def test_bad_input_is_refused(function: Any) -> None:
    x, clips = torch.zeros(3), scalars(1.0, -1.0, 1.0, -1.0)
    with pytest.raises(TypeError, match="x must be float32"):
        function(x.int(), *clips)
    with pytest.raises(TypeError, match="clip_max must be float32"):
        function(x, clips[0].int(), *clips[1:])
    with pytest.raises(ValueError, match="num_bits must be between 2 and 16, not 17"):
        function(x, *clips, 17)
    with pytest.raises(ValueError, match="clip_min must hold one value"):
        function(x, clips[0], torch.zeros(2), *clips[2:])
