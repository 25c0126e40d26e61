"""2:4 sparsity: masks by magnitude, their refresh, their packing for the record."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import accumulate_type
from amct_ext.ops._checks import check_along_axis, check_dtype, check_same_shape, check_scalar, require
from amct_ext.ops._registration import reference

__all__ = ["mask_2to4", "pack_mask", "refresh_mask_", "unpack_mask"]


def mask_2to4(w: Tensor, axis: int = 1) -> Tensor:
    """Keep the two largest magnitudes of every four neighbours along an axis.

    Args:
        w: float32, float64, float16 or bfloat16.
        axis: the input-channel axis (1 for convolutions and Linear, 0 for transposed convolutions).

    Returns: bool tensor with the shape (and memory layout) of w, true where a weight is kept. The last group is padded
    with zeros that take part in the choice; an axis of one or two weights is kept whole; NaN counts as the largest.

    Equal magnitudes: earlier ones are kept, except in a group whose first weight is the smallest alone. There, of three
    equal others the middle one goes, of two the earlier. It is the order in which AMCT's CPU selection falls,
    made a rule here so that every device agrees.

    Errors: TypeError for a dtype that is not floating, IndexError for the axis.

    Source: AMCT's selective (M4N2) pruning.

        >>> mask_2to4(torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 0.0]])).int().tolist()
        [[0, 1, 1, 0, 1, 1]]
    """
    return torch.ops.amct_ext.mask_2to4(w, axis)


def refresh_mask_(w: Tensor, mask: Tensor, step: Tensor, update_freq: int, axis: int = 1) -> None:
    """Advance a mask by one training step: maybe renew it from w, then count.

    The mask is renewed where `step` is a multiple of `update_freq`, with `update_freq` 0 at step 0 only; then step
    grows by one. Both are updated in place, and nothing is read on the host.

    Args:
        w: as `mask_2to4`.
        mask: bool, shape of w; updated.
        step: int64, one value; updated.
        update_freq: 0 or more.
        axis: as `mask_2to4`.

    Errors: as `mask_2to4`; TypeError for the dtype of mask or step, ValueError for a shape or a negative update_freq.

    Source: AMCT's selective pruning, counting training steps only.

        >>> mask, step = torch.ones(1, 4, dtype=torch.bool), torch.tensor(0)
        >>> refresh_mask_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), mask, step, update_freq=0)
        >>> mask.tolist(), step.item()
        ([[False, False, True, True]], 1)
    """
    torch.ops.amct_ext.refresh_mask_(w, mask, step, update_freq, axis)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into 64-bit words, the form the record carries.

    Args:
        mask: bool, any shape; read in C order.

    Returns: int64, one word for every 64 values, the last padded with zeros. Within a byte the first value is the
    highest bit, bytes are in memory order (little endian words).

    Errors: TypeError for another dtype.

    Source: AMCT's record (`selective_mask`).

        >>> pack_mask(torch.tensor([False, True, False, False, False, False, False, True])).tolist()
        [65]
    """
    return torch.ops.amct_ext.pack_mask(mask)


def unpack_mask(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that `pack_mask` packed.

    Args:
        words: int64, one dimension.
        shape: shape of the mask.

    Returns: bool tensor of that shape.

    Errors: TypeError for another dtype; ValueError where the number of words does not fit the shape.

    Source: AMCT's record (`selective_mask`).

        >>> unpack_mask(torch.tensor([65]), (2, 4)).int().tolist()
        [[0, 1, 0, 0], [0, 0, 0, 1]]
    """
    return torch.ops.amct_ext.unpack_mask(words, list(shape))


def _kept_of_four(magnitude: Tensor) -> Tensor:
    """The rule on groups of four along the last axis; magnitudes are ordered numbers, no NaN."""
    a, b, c, d = magnitude.unbind(-1)
    # Position in the order "largest first, earlier before later among equals"; the first two are kept.
    keep = torch.stack(
        [
            (b > a).int() + (c > a) + (d > a) < 2,
            (a >= b).int() + (c > b) + (d > b) < 2,
            (a >= c).int() + (b >= c) + (d > c) < 2,
            (a >= d).int() + (b >= d) + (c >= d) < 2,
        ],
        dim=-1,
    )
    first_smallest = (a < b) & (a < c) & (a < d)
    all_equal = (b == c) & (c == d)
    drop_b = (b <= c) & (b <= d) & ~all_equal
    drop_c = ((c < b) & (c <= d)) | all_equal
    others = torch.stack([torch.zeros_like(drop_b), ~drop_b, ~drop_c, drop_b | drop_c], dim=-1)
    return torch.where(first_smallest.unsqueeze(-1), others, keep)


def _ordinal(magnitude: Tensor, nan: Tensor) -> Tensor:
    """Integers in the order of the magnitudes, NaN last: bit patterns of non-negative floats are ordered."""
    bits = magnitude.view(torch.int64 if magnitude.dtype == torch.float64 else torch.int32)
    return bits + nan.to(bits.dtype)


def _empty_mask(w: Tensor, **_: object) -> Tensor:
    return torch.empty_like(w, dtype=torch.bool)


@reference("mask_2to4", check=check_along_axis, empty=_empty_mask)
def mask_2to4_reference(w: Tensor, axis: int = 1) -> Tensor:
    mask = torch.empty_like(w, dtype=torch.bool)
    count = w.shape[axis]
    if count <= 2 or w.numel() == 0:
        return mask.fill_(True)
    magnitude = w.to(accumulate_type(w)).abs().movedim(axis, -1)
    # Bit patterns of NaN are not ordered: it counts as infinity, plus one.
    rank = torch.where(magnitude.isnan(), torch.full_like(magnitude, torch.inf), magnitude)
    rank = torch.nn.functional.pad(rank, (0, -count % 4))
    nan = torch.nn.functional.pad(magnitude.isnan(), (0, -count % 4))
    keep = _kept_of_four(torch.unflatten(_ordinal(rank, nan), -1, (-1, 4)))
    return mask.copy_(keep.flatten(-2)[..., :count].movedim(-1, axis))


def _check_refresh(op: str, w: Tensor, mask: Tensor, step: Tensor, update_freq: int, axis: int) -> None:
    check_dtype(op, "mask", mask, torch.bool)
    check_dtype(op, "step", step, torch.int64)
    check_same_shape(op, "mask", mask, "w", w)
    check_scalar(op, "step", step)
    require(update_freq >= 0, ValueError, lambda: f"{op}: update_freq must be 0 or more, not {update_freq}")
    check_along_axis("mask_2to4", w, axis)


@reference("refresh_mask_", check=_check_refresh, empty=lambda **_: None)
def refresh_mask_reference(w: Tensor, mask: Tensor, step: Tensor, update_freq: int, axis: int = 1) -> None:
    renew = (step == 0 if update_freq == 0 else step % update_freq == 0).reshape([1] * w.dim())
    mask.copy_(torch.where(renew, mask_2to4_reference(w, axis), mask))
    step.add_(1)


def _bit_weights(device: torch.device) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)


def _words(count: int) -> int:
    """How many 64-bit words so many values take."""
    return (count + 63) // 64


def _check_packing(op: str, mask: Tensor) -> None:
    check_dtype(op, "mask", mask, torch.bool)


def _empty_words(mask: Tensor) -> Tensor:
    return mask.new_empty(_words(mask.numel()), dtype=torch.int64)


@reference("pack_mask", check=_check_packing, empty=_empty_words)
def pack_mask_reference(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1)
    words = _words(flat.numel())
    bits = torch.nn.functional.pad(flat.to(torch.uint8), (0, words * 64 - flat.numel())).view(words, 8, 8)
    packed = (bits * _bit_weights(mask.device)).sum(-1, dtype=torch.uint8)
    return packed.reshape(-1).view(torch.int64)


def _check_unpacking(op: str, words: Tensor, shape: Sequence[int]) -> None:
    check_dtype(op, "words", words, torch.int64)
    expected = _words(math.prod(shape))
    require(
        words.dim() == 1 and words.numel() == expected,
        ValueError,
        lambda: (
            f"{op}: a mask of shape {tuple(shape)} takes {expected} words in one dimension, "
            f"not shape {tuple(words.shape)}"
        ),
    )


def _empty_unpacked(words: Tensor, shape: Sequence[int]) -> Tensor:
    return words.new_empty(shape, dtype=torch.bool)


@reference("unpack_mask", check=_check_unpacking, empty=_empty_unpacked)
def unpack_mask_reference(words: Tensor, shape: Sequence[int]) -> Tensor:
    packed = words.contiguous().view(torch.uint8).unsqueeze(-1)
    bits = (packed & _bit_weights(words.device)).ne(0).reshape(-1)
    return bits[: math.prod(shape)].reshape(shape).clone()
