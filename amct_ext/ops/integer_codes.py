"""Activations and weights as 8-bit codes, in the layout that the integer products read."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from amct_ext.ops._activation_clips import check_activation, effective_clips, empty_results
from amct_ext.ops._arithmetic import FLT_EPSILON, accumulate_type, along_channels, code_range
from amct_ext.ops._checks import check_bits, check_floating, require
from amct_ext.ops._registration import reference

COLUMNS = 16  # output channels of a block of packed weights

__all__ = ["pack_weight", "ulq_quantize"]


def ulq_quantize(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The codes of an activation between two learned clips: what `ulq_fake_quantize` rounds to, one byte each.

    Args: as `ulq_fake_quantize`; num_bits 2 to 8.

    Returns: `(codes, scale, offset, clip_max, clip_min, invalid)`: codes, uint8 with the shape of x, hold code + 128
        (tensors of four dimensions in channels_last memory, others contiguous); the rest as `ulq_fake_quantize`, whose
        y is (codes - 128 - offset) * scale, bit for bit. A NaN becomes the lowest code (and sets invalid).

    Gradients: none.

    Errors: TypeError for a dtype that is not floating, ValueError for num_bits or clips of more than one value.

    Source: as `ulq_fake_quantize`.

        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> ulq_quantize(torch.tensor([-2.0, 0.0, 2.0]), one, -one, none, none)[0].tolist()
        [0, 127, 255]
    """
    return torch.ops.amct_ext.ulq_quantize(x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min)


def pack_weight(w: Tensor, scale: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """The codes of a weight in the order in which the integer product reads them.

    Args:
        w: (outputs, inputs) or (outputs, inputs, height, width), floating; a fake-quantised weight gives its own codes.
        scale: one value, or one per output channel. Values below FLT_EPSILON count as FLT_EPSILON.
        num_bits: 2 to 8.

    Returns: `(packed, sums)`: packed, int8 of shape (blocks, taps, quads, 16, 4), holds the codes of `quantize_weight`
        for every block of 16 output channels, position in the filter and 4 input channels, padded with zeros; sums,
        int32 (outputs,), the sum of the codes of each output channel.

    Errors: TypeError, ValueError (num_bits, number of scales, fewer than two dimensions).

    Source: the layout that the dot-product instructions of CPUs take four at a time.

        >>> packed, sums = pack_weight(torch.tensor([[1.0, -2.0]]), torch.tensor([1.0]))
        >>> packed.shape, packed[0, 0, 0, 0].tolist(), sums.tolist()
        (torch.Size([1, 1, 1, 16, 4]), [1, -2, 0, 0], [-1])
    """
    return torch.ops.amct_ext.pack_weight(w, scale, num_bits)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_codes(x: Tensor, clip_max: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=memory_format(x.dim() == 4))
    return codes, *empty_results(x, clip_max.dtype)


@reference("ulq_quantize", check=partial(check_activation, max_bits=8), empty=_empty_codes)
def ulq_quantize_reference(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = x.to(accumulate_type(x))
    effective = effective_clips(clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min, wide.dtype)
    lowest, highest = code_range(num_bits)
    rounded = torch.round(wide / effective.scale + effective.offset)
    code = torch.clamp(torch.where(rounded.isnan(), torch.full_like(rounded, lowest), rounded), lowest, highest)
    codes = (code + 128).to(torch.uint8).contiguous(memory_format=memory_format(x.dim() == 4))
    return codes, *effective.results(wide, clip_max.dtype)


def _check_packing(op: str, w: Tensor, scale: Tensor, num_bits: int) -> None:
    check_floating(op, "w", w)
    check_bits(op, num_bits, 8)
    check_floating(op, "scale", scale)
    require(w.dim() >= 2, ValueError, lambda: f"{op}: w must have at least two dimensions, not {w.dim()}")
    require(
        scale.numel() in (1, w.shape[0]),
        ValueError,
        lambda: (
            f"{op}: scale must hold 1 or {w.shape[0]} values for a weight of shape {list(w.shape)}, "
            f"not shape {list(scale.shape)}"
        ),
    )


def packed_shape(outputs: int, inputs: int, taps: int) -> list[int]:
    """Blocks of output channels, positions in the filter, groups of four input channels."""
    return [-(-outputs // COLUMNS), taps, -(-inputs // 4), COLUMNS, 4]


def _empty_packed(w: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    packed = w.new_empty(packed_shape(w.shape[0], w.shape[1], math.prod(w.shape[2:])), dtype=torch.int8)
    return packed, w.new_empty(w.shape[0], dtype=torch.int32)


@reference("pack_weight", check=_check_packing, empty=_empty_packed)
def pack_weight_reference(w: Tensor, scale: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    wide = w.to(accumulate_type(w))
    shaped = along_channels(scale.to(wide.dtype).clamp_min(FLT_EPSILON), w, None if scale.numel() == 1 else 0)
    codes = torch.clamp(torch.round(wide / shaped), *code_range(num_bits)).nan_to_num(0.0).to(torch.int8)
    rows = codes.reshape(*w.shape[:2], math.prod(w.shape[2:])).transpose(1, 2)  # outputs, taps, inputs
    blocks, _, quads, _, _ = packed_shape(w.shape[0], w.shape[1], 1)
    padded = torch.nn.functional.pad(rows, (0, -w.shape[1] % 4, 0, 0, 0, -w.shape[0] % COLUMNS))
    padded = torch.unflatten(torch.unflatten(padded, 2, (quads, 4)), 0, (blocks, COLUMNS))
    return padded.permute(0, 2, 3, 1, 4).contiguous(), codes.flatten(1).sum(1, dtype=torch.int32)


def unpacked(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `pack_weight` packed, as (outputs, inputs, taps), float64."""
    rows = packed.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    return rows[:outputs, :inputs].to(torch.float64)
