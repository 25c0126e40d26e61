"""Integer products: scaled and rounded once, against exact arithmetic on the codes and the references."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.ops.integer_products import RANGES, convolutions, exact, matrices, weight
from support.ops.samples import layout, same_bits, scalars

from amct_ext import ops
from amct_ext.ops import integer_product as reference


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize("clips", RANGES)
def test_convolutions_are_exact(clips: tuple[float, float], extreme: bool, device: torch.device) -> None:
    for product in convolutions(clips, extreme, device):
        expected = exact(product.total, product.scale, product.w_scale, product.bias, 1)
        for last in (False, True):
            arguments = (*product.operands, *product.geometry, last)
            y = ops.integer_conv2d(*arguments)
            assert torch.equal(y, expected), product.geometry
            again = reference.integer_conv2d_reference(*arguments)
            assert torch.equal(y, again) and layout(y) == layout(again)


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
    for product in matrices(extreme, device):
        codes, *others = product.operands
        y = ops.integer_linear(codes, *others)
        w_scale = product.w_scale.expand(len(product.sums))
        assert torch.equal(y, exact(product.total, product.scale, w_scale, product.bias, -1))
        assert torch.equal(y, reference.integer_linear_reference(codes, *others))
        views = (codes.expand_as(codes).clone(), codes.unsqueeze(0).expand(2, *codes.shape))
        assert torch.equal(ops.integer_linear(views[0], *others), y)
        assert torch.equal(ops.integer_linear(views[1], *others), y.expand(2, *y.shape))


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


def test_bad_input_is_refused(device: torch.device) -> None:
    x, (high, low) = torch.randn(2, 8, device=device), scalars(1.0, -1.0, device=device)
    codes, scale, offset, *_ = ops.ulq_quantize(x, high, low, high, low)
    packed, sums = ops.pack_weight(torch.randn(3, 8, device=device), scale.reshape(1))
    arguments = [codes, scale, offset, packed, sums, torch.ones(3, device=device)]
    for index, wrong, error, match in (
        (0, codes.int(), TypeError, "codes"),
        (0, codes[:, :3], ValueError, "packed must have shape"),
        (1, torch.ones(2, device=device), ValueError, "x_scale"),
        (5, torch.ones(2, device=device), ValueError, "w_scale"),
    ):
        with pytest.raises(error, match=match):
            ops.integer_linear(*arguments[:index], wrong, *arguments[index + 1 :])
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
