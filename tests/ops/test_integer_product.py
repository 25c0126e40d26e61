"""Integer products: codes and packing against the references, sums against exact arithmetic on the codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support.op_samples import DTYPES, inputs, layout, same_bits
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import integer_accumulators as accumulators
from amct_ext.ops import integer_codes as coding
from amct_ext.ops import integer_product as reference

CLIPS = ((1.7, -0.9), (0.0, -1.0), (2.0, 0.0), (30.0, -20.0), (1e-9, 0.0))


def scalars(*values: float, device: torch.device | str = "cpu") -> list[Tensor]:
    return [torch.tensor(v, device=device) for v in values]


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


def exact(total: Tensor, scale: Tensor, w_scale: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """Integer sums (as float64, which holds them) times scales plus bias, rounded to float32 once."""
    shape = [1] * total.dim()
    shape[axis] = -1
    y = total * (scale.double() * w_scale.double()).view(shape)
    return (y if bias is None else y + bias.double().view(shape)).float()


def weight(outputs: int, inputs: int, size: tuple[int, ...], extreme: bool, device: torch.device) -> Tensor:
    if extreme:
        return torch.where(torch.rand(outputs, 1, *[1] * len(size), device=device) < 0.5, -128.0, 127.0).expand(
            outputs, inputs, *size
        )
    return torch.randint(-128, 128, (outputs, inputs, *size), device=device).float()


GEOMETRIES = list(
    itertools.product(((1, 1), (3, 3), (5, 2)), ((1, 1), (2, 1), (3, 2)), ((0, 0), (1, 1), (2, 3)), ((1, 1), (2, 3)))
)
# Offsets at both ends and between them.
RANGES = ((1.0, 0.0), (0.0, -1.0), (0.9, -1.3))


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("clips", RANGES)
def test_convolutions_are_exact(clips: tuple[float, float], extreme: bool, device: torch.device) -> None:
    channels = itertools.cycle(((3, 5), (1, 1), (4, 16), (17, 70), (64, 33), (6, 129)))
    for kernel, stride, padding, dilation in GEOMETRIES:
        inputs_, outputs = next(channels)
        x = torch.randn(2, inputs_, 11, 13, device=device)
        if extreme:
            x = torch.where(torch.rand(2, 1, 1, 1, device=device) < 0.5, 9.0, -9.0).expand_as(x)
        codes, scale, offset, *_ = ops.ulq_quantize(x, *scalars(*clips, math.nan, math.nan, device=device))
        w = weight(outputs, inputs_, kernel, extreme, device)
        w_scale = torch.rand(outputs, device=device) + 0.001
        bias = torch.randn(outputs, device=device) if stride[0] != 2 else None
        packed, sums = ops.pack_weight(w * w_scale.view(-1, 1, 1, 1), w_scale)
        total = F.conv2d(codes.double() - 128 - offset.double(), w.double(), None, stride, padding, dilation)
        assert total.abs().max() < 2**31
        expected = exact(total, scale, w_scale, bias, 1)
        for last in (False, True):
            arguments = (codes, scale, offset, packed, sums, w_scale, bias, kernel, stride, padding, dilation, last)
            y = ops.integer_conv2d(*arguments)
            assert torch.equal(y, expected), (kernel, stride, padding, dilation)
            again = reference.integer_conv2d_reference(*arguments)
            assert torch.equal(y, again) and layout(y) == layout(again)
        arguments = (codes, offset, packed, sums, kernel, stride, padding, dilation)
        sums_, again = (
            ops.integer_conv2d_accumulators(*arguments),
            accumulators.integer_conv2d_accumulators_reference(*arguments),
        )
        assert torch.equal(sums_.double(), total) and same_bits(sums_, again) and layout(sums_) == layout(again)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
def test_what_follows_a_convolution(last: bool, device: torch.device) -> None:
    """An addend and bounds are those of ops behind it; float64 factors and terms are rounded with the rest, once."""
    clips = scalars(0.9, -1.3, math.nan, math.nan, device=device)
    for images, inputs_, outputs, size in ((1, 3, 16, 4), (2, 5, 70, 11), (3, 17, 100, 7), (0, 4, 20, 5)):
        codes, scale, offset, *_ = ops.ulq_quantize(torch.randn(images, inputs_, size, size, device=device), *clips)
        w, w_scale = weight(outputs, inputs_, (3, 3), False, device), torch.rand(outputs, device=device) + 0.001
        packed, sums = ops.pack_weight(w * w_scale.view(-1, 1, 1, 1), w_scale)
        factor = torch.randn(outputs, dtype=torch.float64, device=device) * w_scale
        product = (codes, scale, offset, packed, sums, factor, torch.randn_like(factor))
        geometry = ((3, 3), (2, 1), (1, 1), (1, 1))
        y = ops.integer_conv2d(*product, *geometry, last)
        total = F.conv2d(codes.double() - 128 - offset.double(), w.double(), None, *geometry[1:])
        assert torch.equal(y, exact(total, scale, factor, product[-1], 1))
        addend = torch.randn_like(y) * y.std() if images else y
        for more, low, high in ((None, 0.0, None), (addend, None, None), (addend, -0.1, 0.3), (None, None, 0.2)):
            expected = y if more is None else y + more
            if low is not None or high is not None:
                expected = expected.clamp(low, high)
            other = more if more is None else more.contiguous()  # of either layout
            arguments = (*product, *geometry, last, other, low, high)
            made = ops.integer_conv2d(*arguments)
            assert torch.equal(made, expected) and layout(made) == layout(y)
            again = reference.integer_conv2d_reference(*arguments)
            assert torch.equal(made, again) and layout(made) == layout(again)
        for low, high, bits, fixed in ((0.0, None, 8, False), (None, 0.2, 4, True)):
            once = ops.integer_conv2d_codes(*product, *geometry, low, high, *clips, bits, fixed)
            twice = ops.ulq_quantize(
                ops.integer_conv2d(*product, *geometry, last, None, low, high), *clips, bits, fixed
            )
            assert all(same_bits(a, b) and layout(a) == layout(b) for a, b in zip(once, twice, strict=True))


def test_bounds_and_codes_of_what_is_no_number(device: torch.device) -> None:
    codes, (scale, offset) = torch.full((1, 4, 2, 2), 130, dtype=torch.uint8, device=device), scalars(0.1, -3.0)
    packed, sums = ops.pack_weight(torch.ones(18, 4, 1, 1, device=device), torch.ones(18, device=device))
    w_scale = torch.ones(18, device=device)
    w_scale[1] = w_scale[17] = math.nan
    product = (codes, scale.to(device), offset.to(device), packed, sums, w_scale, None)
    geometry = ((1, 1), (1, 1), (0, 0), (1, 1))
    y = ops.integer_conv2d(*product, *geometry, False, None, 0.0, 6.0)
    assert y.isnan().all(dim=(0, 2, 3)).nonzero().flatten().tolist() == [1, 17] and int(y.isnan().sum()) == 8
    clips = scalars(1.0, -1.0, math.nan, math.nan, device=device)
    made = ops.integer_conv2d_codes(*product, *geometry, 0.0, None, *clips)
    assert bool(made[5]) and made[0][0, :2, 0, 0].tolist() == [255, 0]
    with pytest.raises(ValueError, match="addend must have the shape"):
        ops.integer_conv2d(*product, *geometry, False, y[:, :1])
    with pytest.raises(TypeError, match="addend"):
        ops.integer_conv2d(*product, *geometry, False, y.double())
    with pytest.raises(ValueError, match="num_bits"):
        ops.integer_conv2d_codes(*product, *geometry, None, None, *clips, 9)


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_products_are_exact(extreme: bool, device: torch.device) -> None:
    shapes = (((1,), 1, 1), ((5,), 7, 3), ((2, 3), 64, 65), ((97,), 130, 200), ((8,), 20000, 20), ((7, 1), 65793, 2))
    for (rows, inputs_, outputs), clips in itertools.product(shapes, RANGES):
        x = torch.randn(*rows, inputs_, device=device)
        if extreme:
            x = torch.where(torch.rand(*rows, 1, device=device) < 0.5, 9.0, -9.0).expand_as(x)
        codes, scale, offset, *_ = ops.ulq_quantize(x, *scalars(*clips, math.nan, math.nan, device=device))
        w, w_scale = weight(outputs, inputs_, (), extreme, device), torch.full((1,), 0.0173, device=device)
        packed, sums = ops.pack_weight(w * w_scale, w_scale)
        total = F.linear(codes.double() - 128 - offset.double(), w.double())
        assert total.abs().max() < 2**31
        bias = torch.randn(outputs, device=device) if outputs % 2 else None
        arguments = (codes, scale, offset, packed, sums, w_scale, bias)
        y = ops.integer_linear(*arguments)
        assert torch.equal(y, exact(total, scale, w_scale.expand(outputs), bias, -1))
        assert torch.equal(y, reference.integer_linear_reference(*arguments))
        arguments_ = (codes, offset, packed, sums)
        sums_ = ops.integer_linear_accumulators(*arguments_)
        assert torch.equal(sums_.double(), total)
        assert same_bits(sums_, accumulators.integer_linear_accumulators_reference(*arguments_))
        views = (codes.expand_as(codes).clone(), codes.unsqueeze(0).expand(2, *codes.shape))
        assert torch.equal(ops.integer_linear(views[0], *arguments[1:]), y)
        assert torch.equal(ops.integer_linear(views[1], *arguments[1:]), y.expand(2, *y.shape))


def test_threads_do_not_matter() -> None:
    x, w = torch.randn(3, 40, 15, 15), torch.randn(150, 40, 3, 3)
    codes, scale, offset, *_ = ops.ulq_quantize(x, *scalars(1.0, -1.0, math.nan, math.nan))
    y, w_scale = ops.arq_fake_quantize(w, 8, 0)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        packed, sums = ops.pack_weight(y, w_scale)
        results.append(ops.integer_conv2d(codes, scale, offset, packed, sums, w_scale, None, (3, 3), (2, 2), (1, 1)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_scale_that_is_no_number_spoils_its_channel(device: torch.device) -> None:
    codes = torch.full((2, 4), 130, dtype=torch.uint8, device=device)
    scale, offset = scalars(0.1, -3.0, device=device)
    w_scale = torch.tensor([1.0, math.nan], device=device)
    packed, sums = ops.pack_weight(torch.ones(2, 4, device=device), torch.ones(2, device=device))
    y = ops.integer_linear(codes, scale, offset, packed, sums, w_scale)
    assert y[:, 0].isfinite().all() and y[:, 1].isnan().all()
    none = ops.integer_linear(codes, scale * math.nan, offset * math.nan, packed, sums, w_scale)
    assert none.isnan().all()


def test_errors(device: torch.device) -> None:
    x, (high, low) = torch.randn(2, 8, device=device), scalars(1.0, -1.0, device=device)
    with pytest.raises(ValueError, match="num_bits"):
        ops.ulq_quantize(x, high, low, high, low, 9)
    with pytest.raises(TypeError, match="float32"):
        ops.ulq_quantize(x.int(), high, low, high, low)
    with pytest.raises(ValueError, match="1 or 2"):
        ops.pack_weight(x, torch.ones(3, device=device))
    with pytest.raises(ValueError, match="two dimensions"):
        ops.pack_weight(x[0], torch.ones(1, device=device))
    codes, scale, offset, *_ = ops.ulq_quantize(x, high, low, high, low)
    packed, sums = ops.pack_weight(torch.randn(3, 8, device=device), scale.reshape(1))
    arguments = [codes, scale, offset, packed, sums, torch.ones(3, device=device)]
    for place, wrong, error, match in (
        (0, codes.int(), TypeError, "codes"),
        (0, codes[:, :3], ValueError, "packed must have shape"),
        (1, torch.ones(2, device=device), ValueError, "x_scale"),
        (5, torch.ones(2, device=device), ValueError, "w_scale"),
    ):
        with pytest.raises(error, match=match):
            ops.integer_linear(*arguments[:place], wrong, *arguments[place + 1 :])
    with pytest.raises(ValueError, match="bias"):
        ops.integer_linear(*arguments, torch.ones(2, device=device))
    with pytest.raises(ValueError, match="four dimensions"):
        ops.integer_conv2d(*arguments, None, (1, 1))
    image = torch.zeros(1, 8, 2, 2, dtype=torch.uint8, device=device)
    packed, sums = ops.pack_weight(torch.randn(3, 8, 3, 3, device=device), scale.reshape(1))
    with pytest.raises(ValueError, match="larger than the padded input"):
        ops.integer_conv2d(image, scale, offset, packed, sums, arguments[5], None, (3, 3))
    with pytest.raises(ValueError, match="positive"):
        ops.integer_conv2d(image, scale, offset, packed, sums, arguments[5], None, (3, 3), (0, 1), (1, 1))
    with pytest.raises(ValueError, match="integer_conv2d_accumulators: the filter is larger"):
        ops.integer_conv2d_accumulators(image, offset, packed, sums, (3, 3))
    with pytest.raises(TypeError, match="integer_linear_accumulators: codes must"):
        ops.integer_linear_accumulators(image.int(), offset, packed, sums)
