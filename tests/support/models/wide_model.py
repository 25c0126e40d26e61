"""A model with enough channels for multiples of 16, and the bit operations of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amct_ext.graph.trace import trace
from amct_ext.prune.cost import layer_cost


def operations(model: nn.Module, sample: Tensor) -> int:
    graph = trace(model, sample)
    modules = dict(model.named_modules())
    layers = [name for name in graph.calls if isinstance(modules[name], (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    return sum(layer_cost(modules[name], graph.calls[name]).bit_operations() for name in layers)


class Wide(nn.Module):
    """Channels enough for multiples of 16, a grouped and a depthwise convolution, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 48, 1)
        self.depthwise, self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=48), nn.Conv2d(48, 32, 3, groups=4)
        self.up, self.fc = nn.ConvTranspose2d(80, 20, 2, stride=2), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(self.b(torch.relu(self.a(x)))))
        x = torch.cat([x[:, :, 1:-1, 1:-1], self.grouped(x)], 1)
        return self.fc(self.up(x).mean((2, 3)))


def wide() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Wide()
