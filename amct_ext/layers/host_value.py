"""Noticing that somebody else wrote to a tensor, and a number in a buffer that decides a branch in Python."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from amct_ext.layers.phase import leaves_no_trace


class Watch:
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

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


class HostValue:
    """The number in a buffer of one element, as the host knows it.

    The buffer is the truth: whoever writes to it (a load, an average, a copy value by value) is believed. On the CPU it
    is read each time. Reading from another device waits for it, so there the last value counts until the buffer is
    another tensor or has another version. Compiled and traced forwards take the last value; a graph for what has not
    happened yet asks the device besides, so values copied in before it was made count.
    """

    def __init__(self, value: float) -> None:
        self.value = value
        self._watch = Watch()

    def read(self, buffer: Tensor) -> float:
        """The number in ``buffer``."""
        kind = buffer.device.type
        if torch.compiler.is_compiling() or kind == "meta" or leaves_no_trace():
            return self.value
        if kind == "cpu":
            self.value = buffer.numpy().item()  # past torch's dispatcher, which costs a few times as much
        elif not self._watch.unchanged(buffer):
            self.wrote(buffer, buffer.item())
        return self.value

    def wrote(self, buffer: Tensor, value: float) -> None:
        """Note that ``buffer`` holds ``value`` now."""
        self.value = value
        if not torch.compiler.is_compiling():
            self._watch.remember(buffer)

    def __reduce__(self) -> tuple[type[HostValue], tuple[float]]:
        return HostValue, (self.value,)
