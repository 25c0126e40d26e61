"""Sparse weights: fused ops against the ops they fuse, gradients, many weights in one call."""

from __future__ import annotations

import math

import pytest
import torch
from support.op_samples import DTYPES, axes_of, inputs, layout, same_bits

from amct_ext import ops
from amct_ext.ops import sparsity_weight as sparse
from amct_ext.ops import weight_arq as arq


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_have_the_bits_of_the_references(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        mask = torch.rand(w.shape, device=device) > 0.5
        assert same_bits(sparse._reference_apply(w, mask), ops.apply_mask(w, mask))
        if w.dim() < 2:
            continue
        for channel_axis in axes_of(w):
            calls = [
                (sparse._reference_sparse, ops.sparse_arq_fake_quantize, (w, mask, 8, channel_axis)),
                (sparse._reference_sparse_2to4, ops.sparse_arq_fake_quantize_2to4, (w, 1, 8, channel_axis)),
                (sparse._reference_sparse_2to4, ops.sparse_arq_fake_quantize_2to4, (w, 0, 4, channel_axis)),
                (sparse._reference_sparsify, ops.sparsify_2to4, (w, 1)),
            ]
            for reference, op, arguments in calls:
                for a, b in zip(reference(*arguments), op(*arguments), strict=True):
                    assert same_bits(a, b), (op.__name__, w.shape, w.stride(), channel_axis)
                    assert layout(a) == layout(b)


def test_rows_of_every_length(device: torch.device) -> None:
    """Kernels move short rows in pieces that run over; every length and count must come out right."""
    for inner in (*range(1, 19), 25, 49, 63, 64, 65, 257):
        for channels in (3, 4, 8, 17, 64):
            w = torch.randn(3, channels, inner, device=device)
            expected, actual = sparse._reference_sparsify(w, 1), ops.sparsify_2to4(w, 1)
            assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True)), (inner, channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for length in (1, 3, 8, 15, 16, 17, 33, 64, 257, 1000):
        w = torch.randn(6, length, device=device).to(dtype)
        w[1] = w[1].abs()
        mask = torch.rand(w.shape, device=device) > 0.5
        mask[2] = False
        mask[3] = True
        w[4, 0] = math.nan
        mask[4, 0] = False
        for a, b in zip(
            sparse._reference_sparse(w, mask, 8, 0), ops.sparse_arq_fake_quantize(w, mask, 8, 0), strict=True
        ):
            assert same_bits(a, b), length


def test_gradients_are_masked(device: torch.device) -> None:
    w = torch.randn(4, 8, 3, 3, device=device)
    mask = ops.mask_2to4(w)
    g = torch.randn_like(w)
    for op, arguments in (
        (ops.apply_mask, (mask,)),
        (ops.sparsify_2to4, (1,)),
        (ops.sparse_arq_fake_quantize, (mask, 8, 0)),
        (ops.sparse_arq_fake_quantize_2to4, (1, 8, 0)),
    ):
        leaf = w.clone().requires_grad_()
        out = op(leaf, *arguments)
        y = out[0] if isinstance(out, tuple) else out
        y.backward(g)
        assert torch.equal(leaf.grad, torch.where(mask, g, 0))


def test_what_is_dropped_does_not_matter(device: torch.device) -> None:
    w = torch.tensor([[1.27, math.nan, math.inf, 0.5]], device=device)
    mask = torch.tensor([[True, False, False, True]], device=device)
    y, scale = ops.sparse_arq_fake_quantize(w, mask, 8, 0)
    torch.testing.assert_close(scale.cpu(), torch.tensor([0.01]))
    assert y[0, 1:3].tolist() == [0.0, 0.0]


def test_many_weights_at_once(device: torch.device) -> None:
    weights = [torch.randn(s, device=device, requires_grad=True) for s in ((4, 3), (6,), (2, 5, 3, 3), (0, 3))]
    axes = [0, None, -3, 0]
    ys, scales = ops.arq_fake_quantize_many(weights, 4, axes)
    for w, axis, y, scale in zip(weights, axes, ys, scales, strict=True):
        expected = ops.arq_fake_quantize(w, 4, axis)
        assert same_bits(expected[0], y)
        assert same_bits(expected[1], scale)
        assert not scale.requires_grad
    (ys[0].sum() * 2 + ys[2].sum()).backward()
    assert torch.equal(weights[0].grad, torch.full_like(weights[0], 2))
    assert torch.equal(weights[2].grad, torch.ones_like(weights[2]))
    assert weights[1].grad is None or not weights[1].grad.any()


def test_many_weights_have_the_same_bits_for_any_number_of_threads() -> None:
    weights = [torch.randn(s) for s in ((300, 700), (3, 5), (64, 64, 3, 3), (1, 9000), (2, 40000))]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for w, y, scale in zip(weights, *ops.arq_fake_quantize_many(weights), strict=True):
                expected = arq._reference_arq(w, 8, 0)
                assert same_bits(expected[0], y)
                assert same_bits(expected[1], scale)
    finally:
        torch.set_num_threads(before)


def test_bad_input_is_refused() -> None:
    w, mask = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for op in (ops.apply_mask, ops.sparse_arq_fake_quantize):
        with pytest.raises(ValueError, match="mask must have the shape of w"):
            op(w, mask[:1])
        with pytest.raises(TypeError, match="mask must be"):
            op(w, w)
    with pytest.raises(ValueError, match="one axis"):
        ops.arq_fake_quantize_many([w], 8, [0, 0])
    with pytest.raises(IndexError, match="out of range"):
        ops.arq_fake_quantize_many([w], 8, [2])
