"""Activation quantisation with learned clips (ULQ: universal linear quantisation)."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._activation_clips import affine, check_activation, effective_clips, empty_results
from amct_ext.ops._arithmetic import accumulate_type, code_range, empty_scalar
from amct_ext.ops._checks import check_bits, check_floating, check_same_shape, check_scalar, check_value, require
from amct_ext.ops._registration import reference

__all__ = ["ulq_fake_quantize", "ulq_fake_quantize_", "ulq_fake_quantize_backward"]


def ulq_fake_quantize(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fake-quantise an activation between two learned clips.

    Args:
        x: any shape, float32, float64, float16 or bfloat16.
        clip_max, clip_min: one value each, floating; the clips that are trained.
        prev_clip_max, prev_clip_min: one value each; the clips of the previous forward, used where the new ones have
            collapsed or changed sign. NaN stands for "none yet".
        num_bits: 2 to 16.
        fixed_min: take clip_min as 0 whatever it holds (an activation behind a ReLU).

    Returns:
        `(y, scale, offset, clip_max, clip_min, invalid)`: y like x; four 0-dim tensors of the clips' dtype with the
        values that were used; `invalid`, a 0-dim bool, true when x holds NaN or Inf or the scale is not finite. Nothing
        is read on the host.

    Gradients: straight through inside the clips, zero outside; `clip_max` and `clip_min` each receive the sum of the
    rounding error over the levels plus what was cut off at their side. The other outputs are not differentiable.

    Errors: TypeError for a dtype that is not floating, ValueError for num_bits out of range or clips of more than one
    value.

    Source: the ULQ retraining rule of AMCT (LSQ+, Bhalgat et al. 2020, with clips in place of scale and offset).

        >>> x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0])
        >>> one, none = torch.tensor(1.0), torch.tensor(float("nan"))
        >>> y, scale, offset, *_ = ulq_fake_quantize(x, one, -one, none, none)
        >>> [round(v, 4) for v in y.tolist()], round(scale.item(), 6), offset.item()
        ([-0.9961, -0.502, 0.0, 0.502, 1.0039], 0.007843, -1.0)
    """
    return torch.ops.amct_ext.ulq_fake_quantize(
        x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min
    )


def ulq_fake_quantize_(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    scale: Tensor,
    offset: Tensor,
    invalid: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ulq_fake_quantize` that writes what it used into the state of a quantiser: one call for a layer's forward.

    Args:
        x, num_bits, fixed_min: as `ulq_fake_quantize`.
        clip_max, clip_min, prev_clip_max, prev_clip_min: one value each, floating; all become the clips that were used.
        scale, offset: one value each, floating; become those that were used.
        invalid: bool, one value; becomes true when x holds NaN or Inf or the scale is not finite, and else stays.

    Returns: `(y, used_max, used_min)`: y like x, and the clips that were used as tensors of their own.

    Gradients: those of `ulq_fake_quantize`. The clips may be parameters: they are written as an optimiser would.

    Errors: as `ulq_fake_quantize`; TypeError and ValueError for a state of another type or size.

    Source: AMCT writes the effective clips back to the parameters in every forward.

        >>> x, invalid = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor(False)
        >>> high, low, last_high, last_low, scale, offset = (torch.tensor(v) for v in (-1.0, -1.0, 2.0, -1.0, 0.0, 0.0))
        >>> y, used_max, used_min = ulq_fake_quantize_(x, high, low, last_high, last_low, scale, offset, invalid)
        >>> high.item(), round(scale.item(), 6), offset.item(), invalid.item()
        (2.0, 0.011765, -43.0, False)
    """
    return torch.ops.amct_ext.ulq_fake_quantize_(
        x, clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset, invalid, num_bits, fixed_min
    )


def ulq_fake_quantize_backward(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `ulq_fake_quantize`: `(dx, d_clip_max, d_clip_min)`.

    Args:
        grad: gradient of y, shape of x.
        x: the input of the forward.
        clip_max, clip_min: the *effective* clips that the forward returned.
        num_bits: as in the forward.

    Returns: dx with the dtype of grad, the two clip gradients 0-dim with the clips' dtype. The CPU kernel adds eight
    values at a time in the arithmetic type, those sums in float64 over fixed blocks: the same bits for any number of
    threads.

    Errors: ValueError where grad and x differ in shape; else as the forward.

    Source: AMCT's ULQ backward.

        >>> x, one = torch.tensor([-2.0, 0.0, 2.0]), torch.tensor(1.0)
        >>> dx, d_max, d_min = ulq_fake_quantize_backward(torch.ones(3), x, one, -one)
        >>> dx.tolist()
        [0.0, 1.0, 0.0]
    """
    return torch.ops.amct_ext.ulq_fake_quantize_backward(grad, x, clip_max, clip_min, num_bits)


def _check_state(op: str, scale: Tensor, offset: Tensor, invalid: Tensor) -> None:
    check_value(op, "scale", scale)
    check_value(op, "offset", offset)
    check_scalar(op, "invalid", invalid)
    require(invalid.dtype == torch.bool, TypeError, lambda: f"{op}: invalid must be Bool, not {invalid.dtype}")


def _check_backward(op: str, grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int) -> None:
    check_floating(op, "grad", grad)
    check_floating(op, "x", x)
    check_bits(op, num_bits)
    check_scalar(op, "clip_max", clip_max)
    check_scalar(op, "clip_min", clip_min)
    check_same_shape(op, "grad", grad, "x", x)


def _empty(x: Tensor, clip_max: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *empty_results(x, clip_max.dtype)


@reference("ulq_fake_quantize", check=check_activation, empty=_empty)
def ulq_fake_quantize_reference(
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
    code = torch.clamp(torch.round(wide / effective.scale + effective.offset), *code_range(num_bits))
    return ((code - effective.offset) * effective.scale).to(x.dtype), *effective.results(wide, clip_max.dtype)


def _empty_with_state(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    scale: Tensor,
    offset: Tensor,
    invalid: Tensor,
    num_bits: int,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "ulq_fake_quantize_"
    check_activation(op, x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits)
    _check_state(op, scale, offset, invalid)
    return torch.empty_like(x), empty_scalar(x, clip_max.dtype), empty_scalar(x, clip_max.dtype)


@reference("ulq_fake_quantize_", empty=_empty_with_state)
def ulq_fake_quantize_with_state_reference(
    x: Tensor,
    clip_max: Tensor,
    clip_min: Tensor,
    prev_clip_max: Tensor,
    prev_clip_min: Tensor,
    scale: Tensor,
    offset: Tensor,
    invalid: Tensor,
    num_bits: int = 8,
    fixed_min: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_state("ulq_fake_quantize_", scale, offset, invalid)
    results = torch.ops.amct_ext.ulq_fake_quantize(
        x, clip_max, clip_min, prev_clip_max, prev_clip_min, num_bits, fixed_min
    )
    return write_used((clip_max, clip_min, prev_clip_max, prev_clip_min, scale, offset), invalid, results)


def write_used(
    state: tuple[Tensor, ...], invalid: Tensor, results: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Write results of `ulq_fake_quantize` to clips, previous clips, scale, offset; returns y and the clips."""
    y, used_scale, used_offset, used_max, used_min, bad = results
    torch._foreach_copy_(state, (used_max, used_min, used_max, used_min, used_scale, used_offset))
    invalid.logical_or_(bad)
    return y, used_max, used_min


def _empty_backward(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, dtype=grad.dtype)
    return dx, empty_scalar(x, clip_max.dtype), empty_scalar(x, clip_min.dtype)


@reference("ulq_fake_quantize_backward", check=_check_backward, empty=_empty_backward)
def ulq_fake_quantize_backward_reference(
    grad: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_type(x)
    high, low = clip_max.reshape(()).to(acc), clip_min.reshape(()).to(acc)
    scale, offset = affine(high, low, num_bits)
    lowest, highest = code_range(num_bits)
    wide, upstream = x.to(acc), grad.to(acc)
    above = wide > scale * (highest - offset)
    below = wide < scale * (lowest - offset)
    z = torch.where(above, high, torch.where(below, low, wide)) / scale
    zero = torch.zeros((), dtype=acc, device=x.device)
    error = ((torch.round(z) - z) * upstream).sum(dtype=torch.float64) / (2**num_bits - 1)
    cut_above = torch.where(above, upstream, zero).sum(dtype=torch.float64)
    cut_below = torch.where(below, upstream, zero).sum(dtype=torch.float64)
    dx = torch.where(above | below, torch.zeros_like(grad), grad)
    return dx, (error + cut_above).to(clip_max.dtype), (cut_below - error).to(clip_min.dtype)
