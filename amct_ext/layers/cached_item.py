"""What `.item()` of a buffer gave, cached for branches in Python, and the guard that tells when the buffer changed."""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from amct_ext.layers.forward_context import state_updates_disabled


class VersionGuard:
    """Remembers the identity and version of a tensor; copies and pickles are empty.

    A write through ``.data`` raises no version and is not noticed.
    """

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = -1

    def remember(self, tensor: Tensor) -> None:
        """Remember the tensor at its current version."""
        if tensor.is_inference():  # has no version
            self._tensor = None
        else:
            self._tensor, self._version = weakref.ref(tensor), tensor._version

    def unchanged(self, tensor: Tensor) -> bool:
        """Whether this is the tensor that was remembered, and at the same version."""
        return self._tensor is not None and self._tensor() is tensor and self._version == tensor._version

    def __reduce__(self) -> tuple[type[VersionGuard], tuple[()]]:
        return VersionGuard, ()


class CachedItem:
    """The number in a buffer of one element, cached on the host.

    The buffer decides: a load, an average or a copy value by value changes what `read` returns. When it reads:

    * on the CPU, every time;
    * on other devices, where a read waits, only when the buffer is another tensor or has another version;
    * the same on the CPU once the number is at least ``stable_from``, so high that no branch depends on it.

    Compiled and traced forwards take the last value. A graph of a forward before that number is reached asks the device
    besides, so values copied in before it was traced count.
    """

    def __init__(self, value: float, stable_from: float = math.inf) -> None:
        self.value = value
        self.stable_from = stable_from
        self._guard = VersionGuard()

    def read(self, buffer: Tensor) -> float:
        """The number in ``buffer``."""
        if torch.compiler.is_compiling():
            return self.value
        if self._guard.unchanged(buffer) and (self.value >= self.stable_from or not buffer.is_cpu):
            return self.value
        if not (buffer.is_meta or state_updates_disabled()):
            # On the CPU through numpy: item() goes through the dispatcher and takes a few times as long.
            self.update(buffer, buffer.numpy().item() if buffer.is_cpu else buffer.item())
        return self.value

    def update(self, buffer: Tensor, value: float) -> None:
        """Cache ``value``, which ``buffer`` holds now."""
        self.value = value
        if not torch.compiler.is_compiling():
            self._guard.remember(buffer)

    def __reduce__(self) -> tuple[type[CachedItem], tuple[float, float]]:
        return CachedItem, (self.value, self.stable_from)
