"""A convolutional model whose products are deferred in an evaluation on integers."""

from __future__ import annotations

from pathlib import Path

import torch
from support.models.single_layer import compressed
from torch import Tensor, nn

import amct_ext


class Net(nn.Module):
    """Convolutions with all that can follow one: BatchNorm, bounds, addition, pooling, another convolution."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 20, 3, padding=1, bias=False), self._norm(norm, 20), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.inner = nn.Sequential(
            nn.Conv2d(20, 33, 1),
            self._norm(norm, 33),
            nn.ReLU6(),
            nn.Conv2d(33, 20, 3, padding=1),
            self._norm(norm, 20),
        )
        self.branch = nn.Sequential(nn.Conv2d(20, 20, 1, bias=False), self._norm(norm, 20))
        self.head = nn.Conv2d(20, 6, 1)

    @staticmethod
    def _norm(wanted: bool, channels: int) -> nn.Module:
        if not wanted:
            return nn.Identity()
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.inner(x)
        y += self.branch(x)
        return self.head(torch.relu(y))


def evaluated(net: nn.Module, folder: Path, x: Tensor) -> nn.Module:
    """Compressed, with the statistics of some training, in eval mode and on integers."""
    model = compressed(net, x, folder)
    model.train()
    for _ in range(3):
        model(torch.randn_like(x))
    model.eval()
    with torch.no_grad():
        model(x)  # searches shifts
    amct_ext.configure(model, forward="integer")
    return model
