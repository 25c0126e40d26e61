"""SR-STE: values of the masked ops, gradients that reach masked weights too."""

from __future__ import annotations

import math

import pytest
import torch
from support.ops.samples import DTYPES, axes_of, inputs, layout, same_bits, special_rows

from amct_ext import ops
from amct_ext.ops import sparsity_sr_ste as sr_ste


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_have_the_bits_of_the_references(dtype: torch.dtype, device: torch.device) -> None:
    for w in inputs(dtype, device):
        mask, grad = torch.rand(w.shape, device=device) > 0.5, torch.randn_like(w)
        expected = sr_ste.sr_ste_backward_reference(grad, w, mask, 0.1)
        seen = ops.sr_ste_backward(grad, w, mask, 0.1)
        assert same_bits(expected, seen), (w.shape, w.stride())
        assert layout(expected) == layout(seen)
        assert same_bits(ops.apply_mask(w, mask), ops.apply_mask_sr_ste(w, mask, 0.1))
        for axis in axes_of(w):
            pair = ops.sparse_arq_fake_quantize(w, mask, 4, axis), ops.sparse_arq_fake_quantize_sr_ste(w, mask, 4, axis)
            assert all(same_bits(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_rows_of_every_length(dtype: torch.dtype, device: torch.device) -> None:
    for w, mask, _ in special_rows(dtype, device):
        grad = w.flip(0)
        for decay in (0.0, 2e-4, 3.0):
            expected = sr_ste.sr_ste_backward_reference(grad, w, mask, decay)
            assert same_bits(expected, ops.sr_ste_backward(grad, w, mask, decay)), w.shape


@pytest.mark.parametrize("quantized", [False, True])
def test_the_gradient_reaches_masked_weights_which_decay(quantized: bool, device: torch.device) -> None:
    w = torch.randn(4, 8, 3, 3, device=device).requires_grad_()
    mask = ops.mask_2to4(w.detach())
    y = ops.sparse_arq_fake_quantize_sr_ste(w, mask, 8, 0, 0.5)[0] if quantized else ops.apply_mask_sr_ste(w, mask, 0.5)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(w.grad, g + 0.5 * w.detach() * ~mask)
    assert torch.equal(w.grad[mask], g[mask])
    assert not y[~mask].any()


def test_a_gradient_is_differentiated_again(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device).requires_grad_()
    mask = ops.mask_2to4(w.detach())
    (first,) = torch.autograd.grad((ops.apply_mask_sr_ste(w, mask, 0.5) * w.sin()).sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    plain = w.detach().clone().requires_grad_()
    kept = torch.where(mask, plain, 0)
    want = plain.sin() + 0.5 * torch.where(mask, 0, plain) + (kept.detach() - plain.detach() + plain) * plain.cos()
    torch.testing.assert_close(first, want)
    again = 0.5 * w.detach() * ~mask  # the second pass through the op adds its decay too
    torch.testing.assert_close(second, torch.autograd.grad(want.sum(), plain)[0] + again)


def test_torch_func_passes_the_gradient_without_the_decay(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    mask, g = ops.mask_2to4(w), torch.randn(4, 8, device=device)
    seen = torch.func.grad(lambda t: (ops.apply_mask_sr_ste(t, mask, 0.5) * g).sum())(w)
    torch.testing.assert_close(seen, g)


def test_bad_arguments(device: torch.device) -> None:
    w = torch.randn(4, 8, device=device)
    for call in (ops.apply_mask_sr_ste, sr_ste.apply_mask_sr_ste_reference):
        with pytest.raises(ValueError, match="decay must be 0 or more"):
            call(w, w > 0, -1.0)
        with pytest.raises(ValueError, match="decay must be 0 or more"):
            call(w, w > 0, math.nan)
        with pytest.raises(TypeError, match="mask must be"):
            call(w, w)
    for call in (ops.sr_ste_backward, sr_ste.sr_ste_backward_reference):
        with pytest.raises(TypeError, match="grad must be"):
            call(w.half(), w, w > 0)
        with pytest.raises(ValueError, match="shape of w"):
            call(w[0], w, w > 0)
