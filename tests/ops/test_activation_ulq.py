"""ulq_fake_quantize: kernel against reference, gradients against the formula, data of AMCT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.op_samples import DTYPES, inputs, layout, same_bits, scalars
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import activation_ulq as ulq
from amct_ext.ops._activation_clips import affine

OUTPUTS = ("y", "scale", "offset", "clip_max", "clip_min", "invalid")
CLIPS = ((1.7, -0.9), (0.0, -1.0), (2.0, 0.0), (30.0, -20.0), (1e-9, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_forward_has_the_bits_of_the_reference(dtype: torch.dtype, num_bits: int, device: torch.device) -> None:
    for i, x in enumerate(inputs(dtype, device)):
        high, low = CLIPS[i % len(CLIPS)]
        arguments = (x, *scalars(high, low, math.nan, math.nan, device=device), num_bits, i % 2 == 1)
        expected, actual = ulq.ulq_fake_quantize_reference(*arguments), ops.ulq_fake_quantize(*arguments)
        for name, a, b in zip(OUTPUTS, expected, actual, strict=True):
            assert same_bits(a, b), (name, x.shape, x.stride())
        assert layout(expected[0]) == layout(actual[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_has_the_bits_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    for i, x in enumerate(inputs(dtype, device)):
        grad = torch.randn_like(x)
        clips = scalars(*CLIPS[i % len(CLIPS)], device=device)
        expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
        actual = ops.ulq_fake_quantize_backward(grad, x, *clips)
        assert same_bits(expected[0], actual[0])
        for a, b in zip(expected[1:], actual[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("upstream", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_of_another_type_keeps_its_bits(
    dtype: torch.dtype, upstream: torch.dtype, device: torch.device
) -> None:
    """No value is rounded to the type of x on its way; clips in float64 show that of the sums."""
    clips = scalars(1.7, -0.9, device=device, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-30, -7e4, 1e300], dtype=torch.float64)
    for x in inputs(dtype, device):
        grad = torch.randn(x.shape, dtype=torch.float64).to(device, upstream)
        expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
        actual = ops.ulq_fake_quantize_backward(grad, x, *clips)
        assert same_bits(expected[0], actual[0]), (x.shape, x.stride())
        for a, b in zip(expected[1:], actual[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)
        if grad.numel() >= len(special):
            grad.view(-1)[: len(special)] = special.to(device, upstream)
            expected = ulq.ulq_fake_quantize_backward_reference(grad, x, *clips)
            assert same_bits(expected[0], ops.ulq_fake_quantize_backward(grad, x, *clips)[0])


@pytest.mark.parametrize("upstream", DTYPES, ids=str)
def test_gradients_of_gradients_follow_the_gradient_alone(upstream: torch.dtype) -> None:
    grad = torch.randn(7, dtype=torch.float64).to(upstream).requires_grad_()
    x = torch.randn(7, requires_grad=True)
    results = ops.ulq_fake_quantize_backward(grad, x, *scalars(1.7, -0.9))
    assert all(result.requires_grad for result in results)
    found = torch.autograd.grad(sum(result.double().sum() for result in results), (grad, x), allow_unused=True)
    assert found[0].dtype == upstream and found[1] is None


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


def test_gradients_follow_the_formula(device: torch.device) -> None:
    x = torch.randn(1000, device=device, requires_grad=True)
    clip_max, clip_min = (v.requires_grad_() for v in scalars(1.1, -0.7, device=device))
    y, *_ = ops.ulq_fake_quantize(x, clip_max, clip_min, *scalars(math.nan, math.nan, device=device))
    g = torch.randn_like(y)
    y.backward(g)

    scale = (clip_max - clip_min).detach() / 255
    offset = torch.round(-128 - clip_min.detach() / scale)
    above, below = x > scale * (127 - offset), x < scale * (-128 - offset)
    z = torch.where(above, clip_max, torch.where(below, clip_min, x)).detach() / scale
    error = (torch.round(z) - z) / 255
    assert torch.equal(x.grad, torch.where(above | below, 0, g))
    torch.testing.assert_close(clip_max.grad, ((error + above.float()) * g).sum())
    torch.testing.assert_close(clip_min.grad, ((below.float() - error) * g).sum())


def test_clip_gradients_have_the_shape_of_the_clips() -> None:
    clips = [torch.tensor([v], requires_grad=True) for v in (1.0, -1.0)]
    y, scale, *_ = ops.ulq_fake_quantize(torch.randn(9), *clips, *scalars(math.nan, math.nan))
    y.sum().backward()
    assert [c.grad.shape for c in clips] == [(1,), (1,)]
    assert scale.shape == ()
    assert not scale.requires_grad


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x = torch.randn(5, requires_grad=True)
    y, *rest = ops.ulq_fake_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan))
    y.sum().backward()
    assert x.grad is not None
    assert not any(r.requires_grad for r in rest)
    with torch.no_grad():
        assert not ops.ulq_fake_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan))[0].requires_grad


@pytest.mark.parametrize(
    ("given", "fixed_min", "effective"),
    [
        ((0.7, 0.7, 1.3, -0.9), False, (1.3, -0.9)),
        ((0.3, 0.5, 1.0, -1.0), False, (1.0, -1.0)),  # crossed: the reference lets it through
        ((1e-8, -1e-8, 1.0, -1.0), False, (1.0, -1.0)),  # below FLT_EPSILON: the reference lets it through
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


@pytest.mark.parametrize("slices", [False, True])
def test_same_bits_for_any_number_of_threads(slices: bool) -> None:
    x, g = torch.randn(300001), torch.randn(300001)
    if slices:
        x, g = x[:300000].view(500, 600)[:, :400], g[:200000].view(500, 400)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.ulq_fake_quantize_backward(g, x, *scalars(1.0, -1.0)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


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


# What ours does where the reference lets crossed clips through or moves a minimum that is fixed.
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
        if "error" in item:  # the reference raises where there are no previous clips; ours goes on with what it has
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


@pytest.mark.parametrize("function", [ops.ulq_fake_quantize_backward, ulq.ulq_fake_quantize_backward_reference])
def test_a_gradient_of_another_shape_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="grad must have the shape of x"):
        function(torch.zeros(3), torch.zeros(4), *scalars(1.0, -1.0))


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


@pytest.mark.cpu_kernels
def test_memory_of_large_results_is_used_again_but_never_shared() -> None:
    high, low, none = torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(math.nan)

    def quantised(x: Tensor) -> Tensor:
        return ops.ulq_fake_quantize(x, high, low, none, none)[0]

    x = torch.randn(300, 400)
    first = quantised(x)
    address, kept = first.data_ptr(), first.clone()
    others = [quantised(torch.randn(300, 400)) for _ in range(4)]
    assert len({y.data_ptr() for y in (first, *others)}) == 5
    assert torch.equal(first, kept)
    view = first[3:]
    del first, others
    assert quantised(x).data_ptr() != address  # a view still holds it
    del view
    smaller = quantised(x[:250])
    assert smaller.data_ptr() == address
    assert torch.equal(smaller, kept[:250])
    smaller.resize_(600, 400)
    assert torch.equal(smaller[:250], kept[:250])
