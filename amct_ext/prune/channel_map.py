"""Which channel each index of a tensor belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """Channels in a tensor.

    ids: int64, as many dimensions as the tensor, of size 1 along axes where the channel does not change; 0 for what
    stays. axis: the axis that gets shorter when channels go. Along other axes where ids vary (the heads of an
    attention, the rows of a channel shuffle) nothing goes; each of their indices loses equally many.
    """

    ids: Tensor
    axis: int

    @property
    def varying(self) -> tuple[int, ...]:
        """The axes along which the channel changes."""
        return tuple(axis for axis, size in enumerate(self.ids.shape) if size > 1)

    def shifted(self, by: int) -> ChannelMap:
        """The same with `by` axes in front."""
        return ChannelMap(self.ids.reshape([1] * by + list(self.ids.shape)), self.axis + by) if by else self

    def full(self, shape: Sequence[int]) -> Tensor:
        """ids in the shape of the tensor."""
        return self.ids.expand(list(shape))

    def rows(self) -> Tensor:
        """ids as (rows, indices along the axis): each row loses equally many."""
        return self.ids.movedim(self.axis, -1).reshape(-1, self.ids.shape[self.axis])


def along(ids: Tensor, axis: int, dims: int) -> ChannelMap:
    """A map of the ids in a vector along one axis of a tensor of `dims` dimensions."""
    shape = [1] * dims
    shape[axis] = len(ids)
    return ChannelMap(ids.reshape(shape), axis)


def compressed(ids: Tensor) -> Tensor:
    """ids of full size with the axes narrowed to 1 along which they do not change."""
    for axis in range(ids.dim()):
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids
