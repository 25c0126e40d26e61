"""Several layers read one input: what the first makes of it serves the others."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Shared(Generic[Made]):
    """A result and the input that it was made of, kept until the last reader took it; copies and pickles are empty."""

    def __init__(self) -> None:
        self._kept: tuple[Made, Tensor, int] | None = None

    def keep(self, made: Made, x: Tensor, readers: int) -> None:
        """Keep what was made of ``x`` for so many further readers: no activation outlives the forward."""
        self._kept = (made, x, readers) if readers > 0 else None

    def take(self, x: Tensor) -> Made | None:
        """What was made of ``x``; None where it was another tensor, or nobody has made anything of it."""
        if self._kept is None or self._kept[1] is not x:
            return None
        made, _, readers = self._kept
        self.keep(made, x, readers - 1)
        return made

    @property
    def empty(self) -> bool:
        return self._kept is None

    def __reduce__(self) -> tuple[type[Shared[Made]], tuple[()]]:
        return type(self), ()
