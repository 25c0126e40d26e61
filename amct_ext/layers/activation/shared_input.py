"""A cache for several layers that read one input: the quantised input of the first serves the others."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from amct_ext.layers.forward_context import autograd_context_key

Result = TypeVar("Result")


class _Entry(NamedTuple, Generic[Result]):
    result: Result
    x: Tensor
    readers: int  # that have not taken it yet
    key: tuple[object, ...]


class SharedInputCache(Generic[Result]):
    """One result and the input it was computed from, kept until its last reader took it; copies and pickles are empty.

    An entry is valid for the very same input tensor at the same version, in the same forward of the model and in the
    same autograd context (`autograd_context_key`).
    """

    def __init__(self) -> None:
        self._entry: _Entry[Result] | None = None

    def put(self, result: Result, x: Tensor, readers: int, forward: int | None) -> None:
        """Keep ``result``, computed from ``x``, for that many further readers in the forward of this number."""
        version = _version(x) if readers > 0 else None
        key = None if version is None else (version, forward, *autograd_context_key())
        self._entry = None if key is None else _Entry(result, x, readers, key)

    def take(self, x: Tensor, forward: int | None) -> Result | None:
        """The result for ``x``; None where there is none that is valid here."""
        entry = self._entry
        if entry is None or entry.x is not x or entry.key != (_version(x), forward, *autograd_context_key()):
            return None
        self._entry = entry._replace(readers=entry.readers - 1) if entry.readers > 1 else None
        return entry.result

    @property
    def empty(self) -> bool:
        return self._entry is None

    def __reduce__(self) -> tuple[type[SharedInputCache[Result]], tuple[()]]:
        return type(self), ()


def _version(x: Tensor) -> int | None:
    """How often ``x`` was modified in place; None where torch does not count: inference tensors, compiled graphs."""
    return None if torch.compiler.is_compiling() or torch.is_inference(x) else x._version
