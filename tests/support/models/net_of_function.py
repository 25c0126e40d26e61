"""Nets that the tests of graph and pruning build from a forward and layers."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A module from layers and a forward given as a function of (layers, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def image(channels=3, batch=2):
    return torch.randn(batch, channels, 6, 6)


def conv(cin=3, cout=4, **kwargs):
    return nn.Conv2d(cin, cout, 3, padding=1, **kwargs)
