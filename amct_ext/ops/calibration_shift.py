"""The shift search (searchN): which power of two an INT32 accumulator may lose to fit into INT16."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._checks import check_axis, check_dtype, check_floating, require
from amct_ext.ops._registration import reference

SHIFTS = 16

__all__ = ["best_shift", "shift_error_"]


def shift_error_(x: Tensor, deq_scale: Tensor, errors: Tensor, channel_axis: int = 1) -> None:
    """Add one batch to the squared errors of the shifts 1 to 16, in place.

    With S = round(x / deq_scale) as a 32-bit integer, shift N costs the sum of (clip(floor(S / 2^N)) * 2^N - S)^2, clip
    meaning the INT16 range.

    Args:
        x: output of a quantised layer; float32, float64, float16 or bfloat16.
        deq_scale: one value or one per channel: scale of the activation times scale of the weight.
        errors: float64, (channels, 16) or (1, 16) for one shift for the whole layer; updated. Use one row with several
            scales to share a shift between channels.
        channel_axis: where the channels are.

    The errors of a batch are sums of squares of integers. The CPU kernel adds them up exactly and rounds once, so they
    have the same bits for any number of threads, instruction set and memory layout; the reference adds in float64.

    NaN in x (or a scale that is not positive and finite) makes the errors of its channel NaN; no value is read on the
    host.

    Errors: TypeError, ValueError (number of scales, shape of errors), IndexError (channel_axis).

    Source: the shift search of AMCT before it became open (its effect is what INT8 devices with INT16 vectors compute).

        >>> errors = torch.zeros(1, 16, dtype=torch.float64)
        >>> shift_error_(torch.tensor([[3.0], [5.0]]), torch.tensor([1.0]), errors)
        >>> errors[0, :3].tolist()
        [2.0, 10.0, 34.0]
    """
    torch.ops.amct_ext.shift_error_(x, deq_scale, errors, channel_axis)


def best_shift(errors: Tensor) -> Tensor:
    """The shift with the smallest error for each row, int32; the smaller one of equals.

    Args:
        errors: float64, (channels, 16), as `shift_error_` left them.

    Returns: int32 of shape (channels,), values 1 to 16.

    Errors: TypeError, ValueError for another dtype or shape.

    Source: as `shift_error_`.

        >>> best_shift(torch.ones(2, 16, dtype=torch.float64)).tolist()
        [1, 1]
    """
    return torch.ops.amct_ext.best_shift(errors)


def _check_errors(op: str, x: Tensor, deq_scale: Tensor, errors: Tensor, channel_axis: int) -> None:
    check_floating(op, "x", x)
    check_floating(op, "deq_scale", deq_scale)
    check_axis(op, "channel_axis", x, channel_axis)
    channels = x.shape[channel_axis]
    check_dtype(op, "errors", errors, torch.float64)
    require(
        deq_scale.numel() in (1, channels),
        ValueError,
        lambda: f"{op}: deq_scale must hold 1 or {channels} values, not shape {tuple(deq_scale.shape)}",
    )
    require(
        errors.dim() == 2 and errors.shape[0] in (1, channels) and errors.shape[1] == SHIFTS,
        ValueError,
        lambda: f"{op}: errors must have shape ({channels}, {SHIFTS}) or (1, {SHIFTS}), not {tuple(errors.shape)}",
    )


@reference("shift_error_", check=_check_errors, empty=lambda **_: None)
def shift_error_reference(x: Tensor, deq_scale: Tensor, errors: Tensor, channel_axis: int = 1) -> None:
    channels = x.shape[channel_axis]
    rows = x.movedim(channel_axis, 0).reshape(channels, x.numel() // max(channels, 1)).to(torch.float64)
    scale = deq_scale.reshape(-1, 1).to(torch.float64)
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.full_like(scale, torch.nan))
    total = torch.clamp(torch.round(rows / scale), -(2.0**31), 2.0**31 - 1)
    sums = []
    for shift in range(1, SHIFTS + 1):
        step = torch.full_like(total, 2**shift)
        kept = torch.clamp(torch.floor(total / step), -32768, 32767) * step
        sums.append((kept - total).square().sum(1))
    batch = torch.stack(sums, 1)
    errors.add_(batch if errors.shape[0] == channels else batch.sum(0, keepdim=True))


def _check_rows(op: str, errors: Tensor) -> None:
    check_dtype(op, "errors", errors, torch.float64)
    require(
        errors.dim() == 2 and errors.shape[1] == SHIFTS,
        ValueError,
        lambda: f"{op}: errors must have shape (channels, {SHIFTS}), not {tuple(errors.shape)}",
    )


def _empty_shifts(errors: Tensor) -> Tensor:
    return errors.new_empty(errors.shape[0], dtype=torch.int32)


@reference("best_shift", check=_check_rows, empty=_empty_shifts)
def best_shift_reference(errors: Tensor) -> Tensor:
    smallest = errors.amin(1, keepdim=True)
    before = (errors <= smallest).to(torch.int32).cumsum(1).eq(0).sum(1)
    return before.clamp_max(SHIFTS - 1).to(torch.int32) + 1
