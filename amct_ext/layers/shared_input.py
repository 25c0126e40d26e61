"""Several layers read one input: what the first makes of it serves the others."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from amct_ext.layers.forward_context import autograd_context_key

Made = TypeVar("Made")


class SharedInputCache(Generic[Made]):
    """A result and the input that it was made of, kept until the last reader took it; copies and pickles are empty."""

    def __init__(self) -> None:
        self._kept: tuple[Made, Tensor, int, tuple[object, ...]] | None = None

    def keep(self, made: Made, x: Tensor, readers: int, forward: int | None) -> None:
        """Keep what was made of ``x`` for so many further readers in the same part of a forward of the model."""
        version = _version(x) if readers > 0 else None
        self._kept = None if version is None else (made, x, readers, (version, forward, *autograd_context_key()))

    def take(self, x: Tensor, forward: int | None) -> Made | None:
        """What was made of ``x`` in this part of this forward; None where nothing was, or ``x`` was modified since."""
        if (
            self._kept is None
            or self._kept[1] is not x
            or self._kept[3] != (_version(x), forward, *autograd_context_key())
        ):
            return None
        made, _, readers, where = self._kept
        self._kept = (made, x, readers - 1, where) if readers > 1 else None
        return made

    @property
    def empty(self) -> bool:
        return self._kept is None

    def __reduce__(self) -> tuple[type[SharedInputCache[Made]], tuple[()]]:
        return type(self), ()


def _version(x: Tensor) -> int | None:
    """How often ``x`` was modified in place; None where nobody counts: inference tensors, a graph being compiled."""
    return None if torch.compiler.is_compiling() or torch.is_inference(x) else x._version
