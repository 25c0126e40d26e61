"""Sparse weights: fused ops against the ops they fuse, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, layout, same_bits, special_rows

from amct_ext import ops
from amct_ext.ops import sparsity_weight as sparse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_have_the_bits_of_the_references(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        mask = torch.rand(w.shape, device=device) > 0.5
        assert same_bits(sparse.apply_mask_reference(w, mask), ops.apply_mask(w, mask))
        if w.dim() < 2:
            continue
        for channel_axis in axes_of(w):
            calls = [
                (sparse.sparse_arq_fake_quantize_reference, ops.sparse_arq_fake_quantize, (w, mask, 8, channel_axis)),
                (
                    sparse.sparse_arq_fake_quantize_2to4_reference,
                    ops.sparse_arq_fake_quantize_2to4,
                    (w, 1, 8, channel_axis),
                ),
                (
                    sparse.sparse_arq_fake_quantize_2to4_reference,
                    ops.sparse_arq_fake_quantize_2to4,
                    (w, 0, 4, channel_axis),
                ),
                (sparse.sparsify_2to4_reference, ops.sparsify_2to4, (w, 1)),
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
            expected, actual = sparse.sparsify_2to4_reference(w, 1), ops.sparsify_2to4(w, 1)
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
            sparse.sparse_arq_fake_quantize_reference(w, mask, 8, 0),
            ops.sparse_arq_fake_quantize(w, mask, 8, 0),
            strict=True,
        ):
            assert same_bits(a, b), length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, mask, _ in special_rows(dtype, device):
        kept = torch.where(mask, w, torch.zeros_like(w))
        for a, b in zip(ops.arq_fake_quantize(kept, 8, 0), ops.sparse_arq_fake_quantize(w, mask, 8, 0), strict=True):
            assert same_bits(a, b), w.shape


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


def test_bad_input_is_refused() -> None:
    w, mask = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    for op in (ops.apply_mask, ops.sparse_arq_fake_quantize):
        with pytest.raises(ValueError, match="mask must have the shape of w"):
            op(w, mask[:1])
        with pytest.raises(TypeError, match="mask must be"):
            op(w, w)
