"""Weights that are sparse, and sparse and quantised, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import empty_scales
from amct_ext.ops._checks import check_axis, check_bits, check_dtype, check_floating, check_same_shape
from amct_ext.ops._registration import reference
from amct_ext.ops.sparsity_mask import mask_2to4_reference
from amct_ext.ops.weight_arq import arq_fake_quantize_reference

__all__ = ["apply_mask", "sparse_arq_fake_quantize", "sparse_arq_fake_quantize_2to4", "sparsify_2to4"]


def apply_mask(w: Tensor, mask: Tensor) -> Tensor:
    """Keep a weight where a mask says so, zero elsewhere (also where the weight is NaN or Inf).

    Args:
        w: float32, float64, float16 or bfloat16.
        mask: bool, shape of w.

    Returns: y like w. Gradient: masked the same way.

    Errors: TypeError for a dtype, ValueError where the shapes differ.

    Source: AMCT's selective pruning.

        >>> apply_mask(torch.tensor([1.0, 2.0]), torch.tensor([True, False])).tolist()
        [1.0, 0.0]
    """
    return torch.ops.amct_ext.apply_mask(w, mask)


def sparsify_2to4(w: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Make the 2:4 mask of a weight and apply it, in one pass: `(y, mask)`.

    Args: as `mask_2to4`.

    Returns: y like w, mask as `mask_2to4` gives it. Gradient: masked.

    Errors: as `mask_2to4`.

    Source: AMCT's selective pruning.

        >>> sparsify_2to4(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))[0].tolist()
        [[0.0, -2.0, 3.0, 0.0]]
    """
    return torch.ops.amct_ext.sparsify_2to4(w, axis)


def sparse_arq_fake_quantize(
    w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """`arq_fake_quantize` of a masked weight, in one pass: `(y, scale)`.

    Args:
        w, num_bits, channel_axis: as `arq_fake_quantize`.
        mask: bool, shape of w.

    Returns: as `arq_fake_quantize`. Gradient: masked.

    Errors: as `arq_fake_quantize` and `apply_mask`.

    Source: AMCT's combined compression.

        >>> w, mask = torch.tensor([[1.27, 9.0]]), torch.tensor([[True, False]])
        >>> round(sparse_arq_fake_quantize(w, mask, channel_axis=0)[1].item(), 4)
        0.01
    """
    return torch.ops.amct_ext.sparse_arq_fake_quantize(w, mask, num_bits, channel_axis)


def sparse_arq_fake_quantize_2to4(
    w: Tensor, axis: int = 1, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """2:4 mask, range and fake quantisation of a weight in one pass: `(y, scale, mask)`.

    Args: as `mask_2to4` and `arq_fake_quantize`.

    Returns: the mask of w, and `sparse_arq_fake_quantize` with it. Gradient: masked.

    Errors: as `mask_2to4` and `arq_fake_quantize`.

    Source: AMCT's combined compression on a step that refreshes its masks.

        >>> y, scale, mask = sparse_arq_fake_quantize_2to4(torch.tensor([[0.1, 1.27, -0.5, 0.2]]), channel_axis=0)
        >>> mask.int().tolist(), round(scale.item(), 4)
        ([[0, 1, 1, 0]], 0.01)
    """
    return torch.ops.amct_ext.sparse_arq_fake_quantize_2to4(w, axis, num_bits, channel_axis)


def _check_masked(op: str, w: Tensor, mask: Tensor, **_: object) -> None:
    check_floating(op, "w", w)
    check_dtype(op, "mask", mask, torch.bool)
    check_same_shape(op, "mask", mask, "w", w)


def _empty_masked(w: Tensor, **_: object) -> Tensor:
    return torch.empty_like(w)


@reference("apply_mask", check=_check_masked, empty=_empty_masked)
def apply_mask_reference(w: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(w).copy_(torch.where(mask, w, torch.zeros_like(w)))  # laid out as w, not as mask


def _empty_sparsified(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), mask_2to4_reference.fake(w, axis)


@reference("sparsify_2to4", empty=_empty_sparsified)
def sparsify_2to4_reference(w: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    mask = mask_2to4_reference(w, axis)
    return apply_mask_reference(w, mask), mask


def _check_sparse_arq(op: str, w: Tensor, mask: Tensor, num_bits: int, channel_axis: int | None) -> None:
    _check_masked(op, w, mask)
    check_bits(op, num_bits)
    check_axis(op, "channel_axis", w, channel_axis)


def _empty_sparse_arq(w: Tensor, channel_axis: int | None, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(w), empty_scales(w, channel_axis)


@reference("sparse_arq_fake_quantize", check=_check_sparse_arq, empty=_empty_sparse_arq)
def sparse_arq_fake_quantize_reference(
    w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    return arq_fake_quantize_reference(apply_mask_reference(w, mask), num_bits, channel_axis)


def _empty_sparse_arq_2to4(
    w: Tensor, axis: int, num_bits: int, channel_axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return *arq_fake_quantize_reference.fake(w, num_bits, channel_axis), mask_2to4_reference.fake(w, axis)


@reference("sparse_arq_fake_quantize_2to4", empty=_empty_sparse_arq_2to4)
def sparse_arq_fake_quantize_2to4_reference(
    w: Tensor, axis: int = 1, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    y, mask = sparsify_2to4_reference(w, axis)
    return (*arq_fake_quantize_reference(y, num_bits, channel_axis), mask)
