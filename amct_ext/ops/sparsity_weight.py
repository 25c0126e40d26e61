"""Weights that are sparse, and sparse and quantised, in one pass; all weights of a model in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._common import check_axis, check_bits, check_floating, reference
from amct_ext.ops.sparsity_mask import _reference_mask
from amct_ext.ops.weight_quantize import _reference_arq


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


def arq_fake_quantize_many(
    weights: Sequence[Tensor], num_bits: int = 8, channel_axes: Sequence[int | None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """`arq_fake_quantize` of several weights in one call: `(list of y, list of scale)`.

    Args:
        weights: as `arq_fake_quantize`, any shapes and dtypes.
        num_bits: 2 to 16.
        channel_axes: one for each weight, None for one scale; left out: axis 0 everywhere.

    Returns, gradients: as `arq_fake_quantize`.

    Errors: as `arq_fake_quantize`; ValueError where the number of axes is not that of the weights.

    Source: as `arq_fake_quantize`; saves the cost of a call per weight.

        >>> ys, scales = arq_fake_quantize_many([torch.ones(2, 3), torch.ones(4)], channel_axes=[0, None])
        >>> [tuple(s.shape) for s in scales]
        [(2,), (1,)]
    """
    given = [0] * len(weights) if channel_axes is None else channel_axes
    axes = [
        -1 if axis is None else axis % max(w.dim(), 1) if -w.dim() <= axis < 0 else axis
        for axis, w in zip(given, weights, strict=False)
    ]
    axes += [0] * (len(given) - len(axes))
    return torch.ops.amct_ext.arq_fake_quantize_many(list(weights), num_bits, axes)


def check_mask(op: str, w: Tensor, mask: Tensor) -> None:
    check_floating(op, "w", w)
    torch._check_type(mask.dtype == torch.bool, lambda: f"{op}: mask must be bool, not {mask.dtype}")
    torch._check_value(
        mask.shape == w.shape,
        lambda: f"{op}: mask must have the shape of w, {tuple(w.shape)}, not {tuple(mask.shape)}",
    )


def check_many(op: str, weights: Sequence[Tensor], channel_axes: Sequence[int]) -> None:
    torch._check_value(
        len(channel_axes) == len(weights),
        lambda: (
            f"{op}: channel_axes must hold one axis (-1 for none) for each of {len(weights)} weights, "
            f"not {len(channel_axes)}"
        ),
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


@reference("arq_fake_quantize_many")
def _reference_many(
    weights: Sequence[Tensor], num_bits: int = 8, channel_axes: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    check_many("arq_fake_quantize_many", weights, channel_axes)
    pairs = [
        _reference_arq(w, num_bits, None if axis < 0 else axis) for w, axis in zip(weights, channel_axes, strict=True)
    ]
    return [y for y, _ in pairs], [scale for _, scale in pairs]
