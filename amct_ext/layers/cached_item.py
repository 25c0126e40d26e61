"""Noticing that somebody else wrote to a tensor, and a number in a buffer that decides a branch in Python."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from amct_ext.layers.forward_context import state_updates_disabled


class VersionGuard:
    """Remembers a tensor as it is; copies and pickles remember nothing.

    A write through ``.data`` raises no version and is not noticed.
    """

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = -1

    def remember(self, tensor: Tensor) -> None:
        """Take the tensor's present content as known."""
        if tensor.is_inference():  # has no version
            self._tensor = None
        else:
            self._tensor, self._version = weakref.ref(tensor), tensor._version

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether this is the tensor that was remembered, and nobody wrote to it since."""
        return self._tensor is not None and self._tensor() is tensor and self._version == tensor._version

    def __reduce__(self) -> tuple[type[VersionGuard], tuple[()]]:
        return VersionGuard, ()


class CachedItem:
    """The number in a buffer of one element, as the host knows it.

    The buffer is the truth: whoever writes to it (a load, an average, a copy value by value) is believed. Once the
    number is ``settled`` (so high that it decides nothing any more), and on devices other than the CPU, where reading
    waits, it is read again only where the buffer is another tensor or has another version; else each time. Compiled and
    traced forwards take the last value; a graph for what has not happened yet asks the device besides, so values copied
    in before it was made count.
    """

    def __init__(self, value: float, settled: float = math.inf) -> None:
        self.value = value
        self.settled = settled
        self._watch = VersionGuard()

    def read(self, buffer: Tensor) -> float:
        """The number in ``buffer``."""
        if torch.compiler.is_compiling():
            return self.value
        if self._watch.unchanged(buffer) and (self.value >= self.settled or not buffer.is_cpu):
            return self.value
        if not (buffer.is_meta or state_updates_disabled()):
            # On the CPU past torch's dispatcher, which costs a few times as much.
            self.wrote(buffer, buffer.numpy().item() if buffer.is_cpu else buffer.item())
        return self.value

    def wrote(self, buffer: Tensor, value: float) -> None:
        """Note that ``buffer`` holds ``value`` now."""
        self.value = value
        if not torch.compiler.is_compiling():
            self._watch.remember(buffer)

    def __reduce__(self) -> tuple[type[CachedItem], tuple[float, float]]:
        return CachedItem, (self.value, self.settled)
