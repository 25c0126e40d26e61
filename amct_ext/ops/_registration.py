"""Registers an op's torch reference, its checks, and what it gives for tensors without values.

Importing this module loads the op library, whose schemas the registrations refer to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Generic, ParamSpec, TypeVar

import torch

from amct_ext import _library

_library.load()

P = ParamSpec("P")
R = TypeVar("R")
OPS: list[str] = []  # names of the ops that have a reference


class Reference(Generic[P, R]):
    """What an op computes, in plain torch. Calling it checks the arguments first.

    `fake` takes the same arguments, checks them too and returns empty tensors of the shapes, dtypes and strides that
    kernels return.
    """

    def __init__(self, op: str, compute: Callable[P, R], check: Callable[..., object], empty: Callable[..., R]) -> None:
        parameters = inspect.signature(compute).parameters
        self.op = op
        self._compute, self._check, self._empty = compute, check, empty
        self._names = tuple(parameters)
        self._defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self._check(self.op, **self._by_name(args, kwargs))
        return self._compute(*args, **kwargs)

    def fake(self, *args: object, **kwargs: object) -> R:
        arguments = self._by_name(args, kwargs)
        self._check(self.op, **arguments)
        return self._empty(**arguments)

    def _by_name(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        return {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}


def _nothing_to_check(op: str, **_: object) -> None:
    pass


def reference(
    op: str, *, empty: Callable[..., R], check: Callable[..., object] = _nothing_to_check
) -> Callable[[Callable[P, R]], Reference[P, R]]:
    """Make a plain-torch function the implementation of an op on every device that has no kernel of its own.

    The function computes with torch operators alone and reads no value on the host. Tracers (torch.compile,
    torch.export, meta tensors) ask `empty` instead: through the reference they would trace all that it computes.

    Args:
        op: name in the schema.
        empty: makes the result of a call without computing it. It gets the op's arguments by name, defaults included,
            takes those it needs and ends in `**_`.
        check: raises for arguments that kernels refuse; called before the function and before
            `empty`, with the op's name and then like `empty`.
    """

    def register(compute: Callable[P, R]) -> Reference[P, R]:
        made = Reference(op, compute, check, empty)
        OPS.append(op)
        torch.library.impl(f"amct_ext::{op}", "default")(made.__call__)
        torch.library.register_fake(f"amct_ext::{op}", made.fake)
        return made

    return register
