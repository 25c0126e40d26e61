"""Sparse weights whose masked elements go on learning: SR-STE."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import accumulate_type, empty_scales
from amct_ext.ops._checks import check_axis, check_bits, check_dtype, check_floating, check_same_shape, require
from amct_ext.ops._registration import reference
from amct_ext.ops.sparsity_weight import apply_mask_reference, sparse_arq_fake_quantize_reference

__all__ = ["apply_mask_sr_ste", "sparse_arq_fake_quantize_sr_ste", "sr_ste_backward"]


def apply_mask_sr_ste(w: Tensor, mask: Tensor, decay: float = 2e-4) -> Tensor:
    """`apply_mask` with the gradient of SR-STE (sparse-refined straight-through estimator).

    Args:
        w, mask: as `apply_mask`.
        decay: 0 or more.

    Returns: as `apply_mask`. Gradient: straight through, also to masked weights, plus `decay * w` at those. Under
    torch.func it passes without the decay, which is the gradient of no function of the result.

    Errors: as `apply_mask`; ValueError for decay.

    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch".

        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> apply_mask_sr_ste(w, torch.tensor([True, False]), decay=0.1).sum().backward()
        >>> [round(v, 4) for v in w.grad.tolist()]
        [1.0, 1.2]
    """
    return torch.ops.amct_ext.apply_mask_sr_ste(w, mask, decay)


def sparse_arq_fake_quantize_sr_ste(
    w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None, decay: float = 2e-4
) -> tuple[Tensor, Tensor]:
    """`sparse_arq_fake_quantize` with the gradient of SR-STE: `(y, scale)`.

    Args: as `sparse_arq_fake_quantize` and `apply_mask_sr_ste`.

    Returns: as `sparse_arq_fake_quantize`. Gradient: as `apply_mask_sr_ste`.

    Errors: as `sparse_arq_fake_quantize`; ValueError for decay.

    Source: as `sparse_arq_fake_quantize` and `apply_mask_sr_ste`.

        >>> w, mask = torch.tensor([[1.27, 9.0]]), torch.tensor([[True, False]])
        >>> round(sparse_arq_fake_quantize_sr_ste(w, mask, channel_axis=0)[1].item(), 4)
        0.01
    """
    return torch.ops.amct_ext.sparse_arq_fake_quantize_sr_ste(w, mask, num_bits, channel_axis, decay)


def sr_ste_backward(grad: Tensor, w: Tensor, mask: Tensor, decay: float = 2e-4) -> Tensor:
    """The gradient of SR-STE: `grad`, plus `decay * w` where the mask is False.

    Args: as `apply_mask_sr_ste`, and `grad`, the gradient of its result with the shape and dtype of w.

    Returns: like grad.

    Errors: as `apply_mask_sr_ste`; TypeError or ValueError where grad is not like w.

    Source: as `apply_mask_sr_ste`.

        >>> grad, w = torch.ones(2), torch.tensor([3.0, 4.0])
        >>> sr_ste_backward(grad, w, torch.tensor([True, False]), decay=0.5).tolist()
        [1.0, 3.0]
    """
    return torch.ops.amct_ext.sr_ste_backward(grad, w, mask, decay)


def _check(op: str, w: Tensor, mask: Tensor, decay: float, **_: object) -> None:
    check_floating(op, "w", w)
    check_dtype(op, "mask", mask, torch.bool)
    check_same_shape(op, "mask", mask, "w", w)
    require(decay >= 0, ValueError, lambda: f"{op}: decay must be 0 or more, not {decay}")


def _check_arq(op: str, w: Tensor, mask: Tensor, num_bits: int, channel_axis: int | None, decay: float) -> None:
    _check(op, w, mask, decay)
    check_bits(op, num_bits)
    check_axis(op, "channel_axis", w, channel_axis)


def _check_backward(op: str, grad: Tensor, w: Tensor, mask: Tensor, decay: float) -> None:
    _check(op, w, mask, decay)
    check_dtype(op, "grad", grad, w.dtype)
    check_same_shape(op, "grad", grad, "w", w)


def _empty(w: Tensor, **_: object) -> Tensor:
    return torch.empty_like(w)


@reference("apply_mask_sr_ste", check=_check, empty=_empty)
def apply_mask_sr_ste_reference(w: Tensor, mask: Tensor, decay: float = 2e-4) -> Tensor:
    return apply_mask_reference(w, mask)


def _empty_arq(w: Tensor, channel_axis: int | None, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), empty_scales(w, channel_axis)


@reference("sparse_arq_fake_quantize_sr_ste", check=_check_arq, empty=_empty_arq)
def sparse_arq_fake_quantize_sr_ste_reference(
    w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None, decay: float = 2e-4
) -> tuple[Tensor, Tensor]:
    return sparse_arq_fake_quantize_reference(w, mask, num_bits, channel_axis)


def _empty_backward(grad: Tensor, **_: object) -> Tensor:
    return torch.empty_like(grad)


@reference("sr_ste_backward", check=_check_backward, empty=_empty_backward)
def sr_ste_backward_reference(grad: Tensor, w: Tensor, mask: Tensor, decay: float = 2e-4) -> Tensor:
    wide = accumulate_type(w)
    dropped = torch.where(mask, torch.zeros_like(w), w).to(wide)
    return torch.empty_like(grad).copy_(grad.to(wide) + decay * dropped)
