"""Running a model in float64, whatever precision its code asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InDouble(TorchDispatchMode):
    """Operators compute in float64: tensors of fewer bits are widened, results that are asked for in fewer bits too.

    What an operator writes into keeps its type. Complex numbers stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if writes:
            written = args[0] if args else None
            narrow = isinstance(written, torch.Tensor) and written.dtype in _NARROW
            return func(*args, **(kwargs or {})) if narrow else func(*_wide(args), **_wide(kwargs or {}))
        return _wide(func(*_wide(args), **_wide(kwargs or {})))


def _wide(tree: Any) -> Any:
    return pytree.tree_map(_widened, tree)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _NARROW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
