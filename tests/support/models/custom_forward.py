"""Models whose forward a test writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.models import small
from torch import Tensor, nn

SPARSE_QUANT = small.SPARSE % 0 + small.QUANT


class Written(nn.Module):
    """A model whose forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def linear(inputs: int = 8, outputs: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)
