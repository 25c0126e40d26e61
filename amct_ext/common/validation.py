"""Checks of the public functions' arguments."""

from __future__ import annotations

import os
from typing import Any

_MAX_NAME_LENGTH = 254


def check_types(**arguments: tuple[Any, ...]) -> None:
    """Each ``name=(value, type, ...)``; raises TypeError, naming the argument, where the value is none of the types."""
    for name, (value, *types) in arguments.items():
        if not isinstance(value, tuple(types)):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
            raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def check_record_name(path: str, argument: str = "record_file") -> None:
    """Raise ValueError where ``path`` cannot name a file."""
    name = os.path.basename(path)
    if not path or not name or len(name) > _MAX_NAME_LENGTH:
        raise ValueError(
            f"{argument} must name a file (1 to {_MAX_NAME_LENGTH} characters after the last '/'), not '{path}'"
        )


def check_callable(**arguments: object) -> None:
    """Each ``name=value``; raises TypeError, naming the argument, where the value is neither callable nor None."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be callable or None, not {type(value).__name__}")
