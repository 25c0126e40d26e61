"""A block whose branches a method merges into one layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Branches(nn.Module):
    """RepVGG's block: branches in training that a method merges into one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(x) if hasattr(self, "merged") else self.wide(x) + self.narrow(x)

    def switch_to_deploy(self) -> None:
        merged = nn.Conv2d(8, 8, 3, padding=1)
        merged.weight.data = self.wide.weight.data + F.pad(self.narrow.weight.data, (1, 1, 1, 1))
        merged.bias.data = self.wide.bias.data + self.narrow.bias.data  # type: ignore[union-attr]
        self.merged = merged
        del self.wide, self.narrow
