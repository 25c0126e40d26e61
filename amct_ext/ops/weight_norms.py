"""Channel importance for filter pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from amct_ext.ops._arithmetic import accumulate_type, other_axes
from amct_ext.ops._checks import check_along_axis
from amct_ext.ops._registration import reference

__all__ = ["filter_norms"]


def filter_norms(w: Tensor, axis: int = 0) -> Tensor:
    """L2 norm of every slice of a weight along an axis.

    Args:
        w: float32, float64, float16 or bfloat16.
        axis: the channel axis.

    Returns: one value per channel, float32 (float64 for float64 weights); squares are summed in float64.

    Errors: TypeError for a dtype that is not floating, IndexError for the axis.

    Source: AMCT's balanced channel pruning (importance before its normalisation).

        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])).tolist()
        [5.0, 2.0]
    """
    return torch.ops.amct_ext.filter_norms(w, axis)


def _empty(w: Tensor, axis: int) -> Tensor:
    return w.new_empty(w.shape[axis], dtype=accumulate_type(w))


@reference("filter_norms", check=check_along_axis, empty=_empty)
def filter_norms_reference(w: Tensor, axis: int = 0) -> Tensor:
    squares = w.to(torch.float64).square()
    axes = other_axes(w, axis)
    return (squares.sum(axes) if axes else squares).sqrt().to(accumulate_type(w))
