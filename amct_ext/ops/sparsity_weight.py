"""Weights that are sparse, and sparse and quantised, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._common import check_axis, check_bits, check_floating, reference
from amct_ext.ops.sparsity_mask import _reference_mask
from amct_ext.ops.weight_arq import _reference_arq


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


def check_mask(op: str, w: Tensor, mask: Tensor) -> None:
    check_floating(op, "w", w)
    torch._check_type(mask.dtype == torch.bool, lambda: f"{op}: mask must be bool, not {mask.dtype}")
    torch._check_value(
        mask.shape == w.shape,
        lambda: f"{op}: mask must have the shape of w, {tuple(w.shape)}, not {tuple(mask.shape)}",
    )


@reference("apply_mask")
def _reference_apply(w: Tensor, mask: Tensor) -> Tensor:
    check_mask("apply_mask", w, mask)
    return torch.empty_like(w).copy_(torch.where(mask, w, torch.zeros_like(w)))  # laid out as w, not as mask


@reference("sparsify_2to4")
def _reference_sparsify(w: Tensor, axis: int = 1) -> tuple[Tensor, Tensor]:
    mask = _reference_mask(w, axis)
    return _reference_apply(w, mask), mask


@reference("sparse_arq_fake_quantize")
def _reference_sparse(
    w: Tensor, mask: Tensor, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    op = "sparse_arq_fake_quantize"
    check_mask(op, w, mask)
    check_bits(op, num_bits)
    check_axis(op, "channel_axis", w, channel_axis)
    return _reference_arq(_reference_apply(w, mask), num_bits, channel_axis)


@reference("sparse_arq_fake_quantize_2to4")
def _reference_sparse_2to4(
    w: Tensor, axis: int = 1, num_bits: int = 8, channel_axis: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    y, mask = _reference_sparsify(w, axis)
    return (*_reference_arq(y, num_bits, channel_axis), mask)
