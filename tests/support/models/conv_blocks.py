"""Blocks of convolutional networks, for tests that remove their channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv(cin, cout, kernel=3, **kwargs):
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **kwargs)


def image(channels=3, batch=2, size=8):
    return torch.randn(batch, channels, size, size)


class Bottleneck(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.a, self.na = conv(cin, cout // 2, 1, bias=False), nn.BatchNorm2d(cout // 2)
        self.b, self.nb = conv(cout // 2, cout // 2, stride=stride, bias=False), nn.BatchNorm2d(cout // 2)
        self.c, self.nc = conv(cout // 2, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.down = None
        if stride != 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = F.relu(self.na(self.a(x)))
        y = self.nc(self.c(F.relu(self.nb(self.b(y)), inplace=True)))
        y += x if self.down is None else self.down(x)
        return F.relu(y)


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, channels, 1)

    def forward(self, x):
        gate = F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.expand(gate))


class Inverted(nn.Module):
    def __init__(self, cin, hidden, cout, act=nn.Hardswish, multiplier=1):
        super().__init__()
        wide = hidden * multiplier
        self.expand, self.n1 = conv(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth, self.n2 = conv(hidden, wide, groups=hidden), nn.BatchNorm2d(wide)
        self.se, self.project, self.n3 = SqueezeExcite(wide), conv(wide, cout, 1), nn.BatchNorm2d(cout)
        self.act, self.same = act(), cin == cout

    def forward(self, x):
        y = self.act(self.n1(self.expand(x)))
        y = self.se(self.act(self.n2(self.depth(y))))
        y = self.n3(self.project(y))
        return x + y if self.same else y


class Dense(nn.Module):
    def __init__(self, cin, growth, layers):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv(width, growth))
            for width in range(cin, cin + layers * growth, growth)
        )

    def forward(self, x):
        for part in self.parts:
            x = torch.cat([x, part(x)], 1)
        return x


def head(channels, classes=5):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
