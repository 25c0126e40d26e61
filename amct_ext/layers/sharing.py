"""Several layers read one input: what the first makes of it serves the others."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Shared(Generic[Made]):
    """A result and the input that it was made of, kept until the last reader took it; copies and pickles are empty."""

    def __init__(self) -> None:
        self._kept: tuple[Made, Tensor, int, int] | None = None

    def keep(self, made: Made, x: Tensor, readers: int) -> None:
        """Keep what was made of ``x`` for so many further readers: no activation outlives the forward."""
        version = _version(x) if readers > 0 else None
        self._kept = None if version is None else (made, x, readers, version)

    def take(self, x: Tensor) -> Made | None:
        """What was made of ``x``; None where it was another tensor or holds something else now, or nothing was made."""
        if self._kept is None or self._kept[1] is not x:
            return None
        made, _, readers, version = self._kept
        if _version(x) != version:
            self._kept = None
            return None
        self.keep(made, x, readers - 1)
        return made

    @property
    def empty(self) -> bool:
        return self._kept is None

    def __reduce__(self) -> tuple[type[Shared[Made]], tuple[()]]:
        return type(self), ()


def _version(x: Tensor) -> int | None:
    """How often ``x`` was modified in place; None where nobody counts: inference tensors, a graph being compiled."""
    return None if torch.compiler.is_compiling() or torch.is_inference(x) else x._version
