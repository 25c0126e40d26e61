"""Kernel against reference, bit for bit, over shapes, strides, dtypes and special values that hypothesis makes up."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ops.samples import DTYPES, same_bits
from torch import Tensor

from amct_ext import ops
from amct_ext.ops import activation_ulq as ulq
from amct_ext.ops import sparsity_mask as masks
from amct_ext.ops import sparsity_weight as sparse
from amct_ext.ops import weight_arq as arq
from amct_ext.ops import weight_lsq as lsq
from amct_ext.ops import weight_quantize as quantize

SPECIAL = (
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    0.5,
    -0.5,
    1.5,
    2.5,
    1e38,
    -1e38,
    65504.0,
    3.0,
    6e-8,
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def tensors(draw: st.DrawFn, special: bool = True) -> Tensor:
    """A tensor of up to four dimensions, maybe permuted, sliced or overlaid with special values and ties."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=generator) * draw(st.sampled_from([1e-30, 1e-3, 1.0, 3.0, 1e4]))
    if draw(st.booleans()):
        x = (x * 2).round() / 2
    if special and x.numel() and draw(st.booleans()):
        for value in draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=4)):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    x = x.to(draw(st.sampled_from(DTYPES)))
    x = x.permute(draw(st.permutations(range(x.dim()))))
    axis = draw(st.integers(0, x.dim() - 1))
    return x.narrow(axis, 1, x.shape[axis] - 1) if x.shape[axis] > 1 and draw(st.booleans()) else x


scales = st.sampled_from([2.0**-7, 0.01, 0.037, 1.0, 1e-9, 1e20, 5e-39])
clips = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.7, -2.3, 1e-8, 1e20, -1e-30, math.nan, math.inf, 127.0, -128.0])
bits = st.sampled_from([2, 4, 7, 8, 12, 16])


@quick
@given(x=tensors(), values=st.tuples(clips, clips, clips, clips), num_bits=bits, fixed_min=st.booleans())
def test_ulq(x: Tensor, values: tuple[float, float, float, float], num_bits: int, fixed_min: bool) -> None:
    arguments = (x, *(torch.tensor(v) for v in values), num_bits, fixed_min)
    expected, actual = ulq.ulq_fake_quantize_reference(*arguments), ops.ulq_fake_quantize(*arguments)
    assert same_bits(expected[0], actual[0])
    assert expected[5].item() == actual[5].item()
    for a, b in zip(expected[1:5], actual[1:5], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(x.shape).to(x.dtype)
    dx = ops.ulq_fake_quantize_backward(grad, x, *actual[3:5], num_bits)[0]
    assert same_bits(ulq.ulq_fake_quantize_backward_reference(grad, x, *actual[3:5], num_bits)[0], dx)


@quick
@given(w=tensors(), num_bits=bits, data=st.data())
def test_arq(w: Tensor, num_bits: int, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([None, *range(w.dim())]))
    for a, b in zip(
        arq.arq_fake_quantize_reference(w, num_bits, axis), ops.arq_fake_quantize(w, num_bits, axis), strict=True
    ):
        assert same_bits(a, b)


@quick
@given(w=tensors(), scale=scales, num_bits=bits, data=st.data())
def test_lsq_and_codes(w: Tensor, scale: float, num_bits: int, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from([None, *range(w.dim())]))
    values = torch.full((1 if axis is None else w.shape[axis],), scale)
    arguments = (w, values, num_bits, axis)
    assert same_bits(lsq.lsq_fake_quantize_reference(*arguments), ops.lsq_fake_quantize(*arguments))
    if num_bits <= 8:
        assert same_bits(quantize.quantize_weight_reference(*arguments), ops.quantize_weight(*arguments))


@quick
@given(w=tensors(), data=st.data())
def test_masks(w: Tensor, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, w.dim() - 1))
    assert same_bits(masks.mask_2to4_reference(w, axis), ops.mask_2to4(w, axis))
    expected, actual = (
        sparse.sparse_arq_fake_quantize_2to4_reference(w, axis, 8, 0),
        ops.sparse_arq_fake_quantize_2to4(w, axis, 8, 0),
    )
    assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True))


@quick
@given(near=st.integers(-40000, 40000), scale=st.floats(2.0**-20, 2.0**20, width=32), num_bits=st.sampled_from([4, 8]))
def test_values_beside_the_middle_between_two_codes(near: int, scale: float, num_bits: int) -> None:
    """Where the product with the reciprocal could round differently from the division."""
    middle = torch.tensor((near % 256 - 128 + 0.5) * scale, dtype=torch.float32)
    x = torch.stack([middle.view(torch.int32) + i for i in range(-3, 4)]).view(torch.float32)
    values = torch.tensor([scale])
    assert same_bits(lsq.lsq_fake_quantize_reference(x, values, num_bits), ops.lsq_fake_quantize(x, values, num_bits))
