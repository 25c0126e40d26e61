"""State that keeps its precision when the model around it is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_LOW = (torch.bfloat16, torch.float16)


class KeepsPrecision(nn.Module):
    """A module whose floating state never falls below float32 (and float64 stays), whatever ``model.half()`` asks for.

    Clips and scales decide integers: in bfloat16 a scale has two or three right digits, and codes collapse.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrower = tensor.dtype == torch.float64 and result.dtype == torch.float32
            if tensor.is_floating_point() and (result.dtype in _LOW or narrower):
                return tensor.to(result.device)
            return result

        return super()._apply(moved, recurse)
