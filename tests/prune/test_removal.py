"""Channels are removed rightly: the pruned network computes what the masked one does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.pruning_check import check_pruning
from support.models.conv_blocks import Bottleneck, Dense, Inverted, conv, head, image
from support.models.net_of_function import Net
from torch import nn


def inception(m, x):
    x = F.elu(m.stem(x))
    parts = [m.one(x), m.three(F.gelu(m.three_in(x))), m.pool_proj(F.avg_pool2d(x, 3, 1, 1))]
    return m.head(m.tail(m.bn(torch.cat(parts, 1))))


def up_and_skip(m, x):
    a = F.mish(m.down1(x))
    b = F.softplus(m.down2(F.max_pool2d(a, 2)))
    up = F.interpolate(m.mid(b), scale_factor=2, mode="bilinear")
    return m.out(torch.cat([F.pad(up, (1, 1, 1, 1))[:, :, 1:-1, 1:-1], a], 1))


# name -> (network, input, layers that must have lost channels)
NETWORKS = {
    "resnet": (
        lambda: nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), Bottleneck(8, 8), Bottleneck(8, 16, 2),
                              Bottleneck(16, 16), head(16)),
        image(), {"0", "3.a", "3.b", "3.c", "4.a", "4.b", "4.c", "4.down.0", "5.a", "5.b", "5.c"},
    ),
    "mobilenet": (
        lambda: nn.Sequential(conv(3, 8), Inverted(8, 16, 8), Inverted(8, 16, 12, nn.SiLU), head(12)),
        image(), {"0", "1.expand", "1.project", "1.se.reduce", "2.expand", "2.project", "2.se.reduce"}
        | {"1.se.expand", "2.se.expand"},
    ),
    "depthwise multiplier": (
        lambda: nn.Sequential(conv(3, 6), Inverted(6, 10, 6, nn.ReLU6, 2), conv(6, 12, groups=6), nn.Tanh(),
                              conv(12, 24, groups=12, bias=False), nn.BatchNorm2d(24), conv(24, 7), head(7)),
        image(), {"0", "1.expand", "1.project", "1.se.reduce", "1.se.expand", "6"},
    ),
    "densenet": (
        lambda: nn.Sequential(conv(3, 8), Dense(8, 6, 3), nn.BatchNorm2d(26), conv(26, 10, 1), nn.AvgPool2d(2),
                              Dense(10, 6, 2), head(22)),
        image(), {"0", "1.parts.0.2", "1.parts.1.2", "1.parts.2.2", "3", "5.parts.0.2", "5.parts.1.2"},
    ),
    "inception": (
        lambda: Net(inception, stem=conv(3, 8), one=conv(8, 5, 1), three_in=conv(8, 6, 1), three=conv(6, 7),
                    pool_proj=conv(8, 4, 1), bn=nn.BatchNorm2d(16), tail=conv(16, 6), head=head(6)),
        image(), {"stem", "one", "three_in", "three", "pool_proj", "tail"},
    ),
    "unet": (
        lambda: Net(up_and_skip, down1=conv(3, 8), down2=conv(8, 12), mid=conv(12, 10), out=conv(18, 2)),
        image(), {"down1", "down2", "mid"},
    ),
    "flatten without pooling": (
        lambda: nn.Sequential(conv(3, 8), nn.MaxPool2d(2), nn.Hardtanh(), nn.Flatten(), nn.Linear(128, 9), nn.Tanh(),
                              nn.Linear(9, 3)),
        image(), {"0", "4"},
    ),
    "flatten of a multiplied concat": (
        lambda: Net(lambda m, x: m.f(torch.cat([m.d(m.a(x)), m.b(x)], 1).flatten(1)),
                    a=conv(3, 4), d=conv(4, 8, groups=4), b=conv(3, 5), f=nn.Linear(13 * 64, 3)),
        image(), {"a", "b"},
    ),
    "one image": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.Flatten(), nn.Linear(384, 4), nn.ReLU(),
                              nn.Linear(4, 2)),
        image(batch=1), {"0", "2", "4"},
    ),
    "groups": (
        lambda: nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 24, groups=4), nn.BatchNorm2d(24),
                              conv(24, 16, groups=8), conv(16, 6), head(6)),
        image(), {"0", "2", "4", "5"},
    ),
    "concat with a branch that stays": (
        lambda: Net(lambda m, x: m.d(m.bn(torch.cat([m.stays(x), m.b(x), x], 1))),
                    stays=conv(3, 8), b=conv(3, 6), bn=nn.BatchNorm2d(17), d=conv(17, 2)),
        image(), {"b"},
    ),
    "transposed": (
        lambda: nn.Sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 8), conv(8, 8, groups=8),
                              nn.ConvTranspose2d(8, 16, 2, 2, groups=8), nn.ConvTranspose2d(16, 4, 2, 2, groups=4),
                              conv(4, 2)),
        image(), {"0", "2", "3"},
    ),
    "circular padding": (
        lambda: nn.Sequential(conv(3, 8, padding_mode="circular"), nn.ReLU(), conv(8, 6, padding_mode="reflect"),
                              head(6)),
        image(), {"0", "2"},
    ),
    "mlp with BatchNorm1d and residual": (
        lambda: Net(lambda m, x: m.out(_residual(m, m.a(x))), a=nn.Linear(6, 12), b=nn.Linear(12, 20),
                    bn=nn.BatchNorm1d(20), c=nn.Linear(20, 12), out=nn.Linear(12, 3)),
        torch.randn(4, 6), {"a", "b", "c"},
    ),
    "gated linear units on tokens": (
        lambda: Net(lambda m, x: x + m.down(F.silu(m.gate(m.norm(x))) * m.up(m.norm(x))),
                    norm=nn.LayerNorm(8), gate=nn.Linear(8, 20), up=nn.Linear(8, 20), down=nn.Linear(20, 8)),
        torch.randn(2, 5, 8), {"gate", "up"},
    ),
    "BatchNorm over tokens": (
        lambda: nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(20, 12, bias=False),
                              nn.BatchNorm1d(5, affine=False), nn.Linear(12, 3)),
        torch.randn(2, 5, 8), {"0", "3"},
    ),
    "BatchNorm over rows, and one that is called twice": (
        lambda: Net(lambda m, x: m.out(m.twice(m.twice(m.a(m.rows(m.tokens(x)).permute(0, 3, 1, 2)).transpose(1, 2)))),
                    tokens=nn.Linear(3, 12), rows=nn.BatchNorm2d(5), a=conv(12, 10), twice=nn.BatchNorm2d(5),
                    out=conv(5, 2)),
        torch.randn(2, 5, 6, 3), {"tokens"},
    ),
    "channels last linear": (
        lambda: Net(lambda m, x: m.c(m.b(F.gelu(m.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)).mean((-2, -1)),
                    a=nn.Linear(3, 10), b=nn.Linear(10, 6), c=conv(6, 4)),
        image(), {"a", "b"},
    ),
    "attention over positions": (
        lambda: Net(lambda m, x: m.out((lambda y: y * torch.sigmoid(m.att(y)))(m.a(x))),
                    a=conv(3, 8), att=conv(8, 1), out=conv(8, 2)),
        image(), {"a"},
    ),
    "normalised over positions": (
        lambda: Net(lambda m, x: m.out(_over_positions(m.a(x))), a=conv(3, 8), out=conv(8, 2)),
        image(), {"a"},
    ),
    "unsqueeze, stack, expand": (
        lambda: Net(lambda m, x: m.out(_axes(m.a(x), m.b(x))), a=conv(3, 8), b=conv(3, 8), out=conv(8, 2)),
        image(), {"a", "b"},
    ),
}  # fmt: skip


def _residual(m, a):
    return a + m.c(F.leaky_relu(m.bn(m.b(a))))


def _over_positions(y):
    y = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), keepdim=True) + 1e-3).sqrt()
    return y * F.softmax(y.flatten(2), -1).view_as(y) + F.layer_norm(y, y.shape[-2:]) + y.flip(3).roll(1, 2)


def _axes(a, b):
    both = torch.stack([a, b], 1).sum(1).unsqueeze(0).squeeze(0)
    pooled = a.amax((2, 3))[:, :, None, None].expand_as(a)
    return torch.cat([both, pooled.transpose(2, 3)], 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    build, data, expected = NETWORKS[name]
    skip = ("stays",)
    cut, stays = check_pruning(build(), data, skip=skip)
    assert cut == expected, stays
