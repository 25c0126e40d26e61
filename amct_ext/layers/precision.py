"""State that keeps its precision when the model around it is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

_LOW = (torch.bfloat16, torch.float16)


class KeepsPrecision(nn.Module):
    """A module whose floating state stays at least float32 (and float64 stays) under ``model.half()`` and the like.

    Clips and scales decide integers: in bfloat16 a scale has two or three right digits, and codes collapse.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def applied(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrower = tensor.dtype == torch.float64 and result.dtype == torch.float32
            if tensor.is_floating_point() and (result.dtype in _LOW or narrower):
                return tensor.to(result.device)
            return result

        apply: Callable[..., Self] = super()._apply  # untyped in torch
        return apply(applied, recurse)
