"""Where a forward reads tensors on the host: `if t.max() > 3`, `.item()`, `.tolist()`, `int(t)`, `assert`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READS = {
    "item",
    "tolist",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
    "__array__",
    "__bool__",
    "__complex__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
}
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, os.path.dirname(__file__))
)


class HostReads(TorchFunctionMode):
    """Tells `note(tensor, function name)` of every read. Reads inside torch functions are not reported."""

    def __init__(self, note: Callable[[torch.Tensor, str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS and args and isinstance(args[0], torch.Tensor):
            self._note(args[0], name)
        return func(*args, **(kwargs or {}))


def caller() -> str:
    """`file:line` of the innermost code that is neither torch's nor ours, '' where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = os.path.abspath(frame.f_code.co_filename)
        if not file.startswith(_LIBRARIES):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
