"""Channels pass through elementwise functions; those that meet become one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.pruning_check import check_pruning, refusal
from support.models.conv_blocks import conv, head, image
from support.models.net_of_function import Net
from torch import nn


def through(function, **layers):
    """A network with a function of one tensor between two convolutions."""
    return Net(lambda m, x: m.out(function(m, m.a(x))), a=conv(3, 8), out=conv(8, 2), **layers)


def noisy(m, y):
    return y + 0 * torch.zeros_like(y).bernoulli_(0.5) + torch.rand_like(y) * 0


def in_place(m, y):
    return y.mul_(2).add_(1).clamp_(-1, 1).relu_()


def filled(m, y):
    return y * torch.full_like(y, 2.0) + torch.ones_like(y).fill_(3) + torch.zeros_like(y).zero_()


FUNCTIONS = {
    "activations": lambda m, y: F.gelu(F.silu(F.elu(F.celu(F.selu(F.leaky_relu(y)))))),
    "hard activations": lambda m, y: F.hardswish(F.hardsigmoid(F.hardtanh(y, -2, 2)) * y),
    "log sigmoid": lambda m, y: F.logsigmoid(y) + F.softplus(y) + F.mish(y) + F.softsign(y),
    "thresholds": lambda m, y: F.threshold(F.relu6(y), 0.1, 20) + F.hardshrink(y) + F.softshrink(y),
    "casts": lambda m, y: y.double().to(torch.float32),
    "dropout": lambda m, y: F.dropout2d(F.dropout(y, 0.5, m.training), 0.5, m.training),
    "random": noisy,
    "filled": filled,
    "in place": in_place,
    "choices": lambda m, y: torch.where(y > 0, y, y.exp()).nan_to_num(),
    "comparisons": lambda m, y: y.masked_fill(y.ge(0.5), 0.25) + torch.maximum(y, y.tanh()),
    "powers": lambda m, y: (y.square() + 1).rsqrt() + y.abs().pow(1.5) + torch.lerp(y, y.sin(), 0.3),
    "scalars": lambda m, y: 2 - y / 3 + torch.tensor(0.5),
    "sums": lambda m, y: torch.addcmul(y, y, y.sigmoid(), value=0.5) + torch.addcdiv(y, y, y.exp()),
    "gated": lambda m, y: y * y.mean((2, 3), keepdim=True).sigmoid() + y.mean(1, keepdim=True) * 0,
    "positions": lambda m, y: y + torch.linspace(0, 1, 8) + torch.ones(8, 1),
    "PReLU": lambda m, y: m.one(m.each(y)),
    "the same twice": lambda m, y: y + y,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_pass_through(name):
    torch.manual_seed(1)
    layers = {"each": nn.PReLU(8), "one": nn.PReLU()} if name == "PReLU" else {}
    for prelu in layers.values():
        nn.init.uniform_(prelu.weight, -1, 1)
    cut, _ = check_pruning(through(FUNCTIONS[name], **layers), image(), mixes=name == "gated")
    assert cut == {"a"}


def test_layer_scale_is_cut_with_the_channels_it_multiplies():
    net = through(lambda m, y: y * m.gamma[:, None, None] + m.shift)
    net.gamma = nn.Parameter(torch.rand(8) + 0.5)
    net.register_buffer("shift", torch.randn(1, 8, 1, 1))
    assert check_pruning(net, image())[0] == {"a"}


def test_frozen_batchnorm_of_buffers():
    def frozen(m, y):
        scale = m.weight * (m.var + 1e-5).rsqrt()
        return y * scale.reshape(1, -1, 1, 1) + (m.bias - m.mean * scale).reshape(1, -1, 1, 1)

    net = through(frozen)
    for name in ("weight", "bias", "mean", "var"):
        net.register_buffer(name, torch.rand(8) + 0.5)
    assert check_pruning(net, image())[0] == {"a"}


def shuffled(m, x):
    a, b = m.a(x), m.b(x)
    return m.out(torch.cat([a, b, a, x], 1))


JOINED = {
    "sum of three": (
        lambda: Net(lambda m, x: m.out(m.a(x) + m.b(x) * m.c(x)), a=conv(3, 8), b=conv(3, 8), c=conv(3, 8),
                    out=conv(8, 2)),
        {"a", "b", "c"},
    ),
    "concatenation, one part twice": (
        lambda: Net(shuffled, a=conv(3, 6), b=conv(3, 4), out=conv(19, 2)), {"a", "b"},
    ),
    "concatenation met by another": (
        lambda: Net(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)), a=conv(3, 6), b=conv(3, 4),
                    c=conv(3, 10), out=conv(10, 2)),
        {"a", "b", "c"},
    ),
    "stacked and summed": (
        lambda: Net(lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], 2).sum(2)), a=conv(3, 8), b=conv(3, 8),
                    out=conv(8, 2)),
        {"a", "b"},
    ),
    "stacked at the end": (
        lambda: Net(lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], -1).amax(-1)), a=conv(3, 8), b=conv(3, 8),
                    out=conv(8, 2)),
        {"a", "b"},
    ),
    "stacked, then flattened into channels": (
        lambda: Net(lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2)), a=conv(3, 8), b=conv(3, 8),
                    out=conv(16, 2)),
        {"a", "b"},
    ),
    "side by side": (
        lambda: Net(lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 3)), a=conv(3, 8), b=conv(3, 8), out=conv(8, 2)),
        {"a", "b"},
    ),
    "one gate for all channels": (
        lambda: Net(lambda m, x: m.out(m.a(x) * m.g(x).sigmoid()), a=conv(3, 8), g=conv(3, 1), out=conv(8, 2)), {"a"},
    ),
    "token and position embeddings": (
        lambda: Net(lambda m, x: m.out(torch.cat([m.token.expand(2, -1, -1), m.a(x)], 1) + m.place),
                    a=nn.Linear(5, 8), out=nn.Linear(8, 3)),
        {"a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINED)
def test_channels_that_meet_go_together(name):
    torch.manual_seed(0)
    build, wanted = JOINED[name]
    net, data = build(), image()
    if name.startswith("token"):
        net.token, net.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(7, 8))
        data = torch.randn(2, 6, 5)
    cut, _ = check_pruning(net, data)
    assert cut == wanted


REFUSED = {
    "a constant for each channel": (
        through, lambda m, y: y * torch.linspace(0, 1, 8)[:, None, None], "/Mul combines the channels with",
    ),
    "the model's input": (
        lambda f: Net(f, a=conv(3, 3), out=conv(3, 2)), lambda m, x: m.out(m.a(x) + x), "a model input",
    ),
    "an output": (lambda f: Net(f, a=conv(3, 4), out=conv(4, 2)),
                  lambda m, x: (lambda y: (m.out(y), y))(m.a(x)), "output"),
    "beside channels that stay": (
        lambda f: Net(f, a=conv(3, 3), out=conv(3, 2)), lambda m, x: m.out(torch.cat([m.a(x), x], 2)),
        "beside others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_stay_are_told(name):
    torch.manual_seed(0)
    build, function, reason = REFUSED[name]
    assert reason in refusal(build(function), image(), "a")


def test_one_channel_that_is_spread_stays_and_the_others_go():
    net = Net(lambda m, x: m.out(m.a(x) * m.g(x)), a=conv(3, 8), g=conv(3, 1), out=conv(8, 2))
    cut, stays = check_pruning(net, image())
    assert cut == {"a"} and "broadcasts one channel to several" in stays["g"]


def test_a_sum_of_a_head_behind_a_linear():
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), head(8))
    assert check_pruning(net, image())[0] == {"0"}
