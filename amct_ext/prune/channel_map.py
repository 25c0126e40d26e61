"""Channel maps: which channel each index of a tensor belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """The channel ids of a tensor.

    ids: int64 channel ids, broadcastable to the tensor; 0: not a channel. axis: the axis that pruning shortens. If ids
    vary along other axes (heads, rows of a channel shuffle), every index of those loses equally many.
    """

    ids: Tensor
    axis: int

    @property
    def varying_axes(self) -> tuple[int, ...]:
        """The axes along which the ids vary."""
        return tuple(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    def with_leading_axes(self, by: int) -> ChannelMap:
        """The same with `by` axes in front."""
        return ChannelMap(self.ids.reshape([1] * by + list(self.ids.shape)), self.axis + by) if by else self

    def expanded(self, shape: Sequence[int]) -> Tensor:
        """ids in the shape of the tensor."""
        return self.ids.expand(list(shape))

    def rows(self) -> Tensor:
        """ids as (rows, indices along the axis); each row loses equally many."""
        return self.ids.movedim(self.axis, -1).reshape(-1, self.ids.shape[self.axis])


def from_vector(ids: Tensor, axis: int, dims: int) -> ChannelMap:
    """A map of the ids in a vector along one axis of a tensor of `dims` dimensions."""
    shape = [1] * dims
    shape[axis] = len(ids)
    return ChannelMap(ids.reshape(shape), axis)


def squeeze_constant_axes(ids: Tensor) -> Tensor:
    """ids of full size with the axes narrowed to 1 along which they do not change."""
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids
