"""Normalisations: their statistics are those of the channels that are left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning, outputs, refusal, replay
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net
from torch import nn


def tokens(width=6, batch=2):
    return torch.randn(batch, 5, width)


def rms(m, y):
    return m.scale * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def grn(m, y):
    y = y.permute(0, 2, 3, 1)
    size = y.norm(p=2, dim=(1, 2), keepdim=True)
    y = m.gamma * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + m.beta + y
    return y.permute(0, 3, 1, 2)


def channels_first(m, y):
    mean, var = y.mean(1, keepdim=True), (y - y.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True)
    return (y - mean) / torch.sqrt(var + 1e-6) * m.gamma[:, None, None] + m.beta[:, None, None]


def on_images(function, **layers):
    net = Net(lambda m, x: m.out(function(m, m.a(x))), a=conv(3, 8), out=conv(8, 2), **layers)
    net.gamma, net.beta = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
    return net


def on_tokens(function, **layers):
    net = Net(lambda m, x: m.out(function(m, m.a(x))), a=nn.Linear(6, 8), out=nn.Linear(8, 2), **layers)
    net.scale = nn.Parameter(torch.rand(8) + 0.5)
    return net


def called(m, y):
    return m.norm(y)


def heads(m, y):
    b, n, _ = y.shape
    return m.norm(y.view(b, n, 4, m.head_dim)).flatten(2)


def per_head(norm):
    net = Net(lambda m, x: m.out(heads(m, m.a(x))), a=nn.Linear(6, 32), out=nn.Linear(32, 2), norm=norm)
    net.head_dim = 8
    return net


NORMS = {
    "LayerNorm": (lambda: on_tokens(called, norm=nn.LayerNorm(8)), tokens),
    "LayerNorm without factors": (lambda: on_tokens(called, norm=nn.LayerNorm(8, elementwise_affine=False)), tokens),
    "LayerNorm without term": (lambda: on_tokens(called, norm=nn.LayerNorm(8, bias=False)), tokens),
    "F.layer_norm": (lambda: on_tokens(lambda m, y: F.layer_norm(y, y.shape[-1:], m.scale)), tokens),
    "RMSNorm": (lambda: on_tokens(called, norm=nn.RMSNorm(8)), tokens),
    "RMSNorm by hand": (lambda: on_tokens(rms), tokens),
    "LayerNorm over channels and positions": (
        lambda: Net(lambda m, x: m.out(m.norm(m.a(x))), a=conv(3, 8), norm=nn.LayerNorm((8, 8, 8)), out=conv(8, 2)),
        image,
    ),
    "LayerNorm channels first": (lambda: on_images(channels_first), image),
    "LayerNorm permuted": (
        lambda: on_images(lambda m, y: m.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(8)), image,
    ),
    "GroupNorm": (lambda: on_images(called, norm=nn.GroupNorm(2, 8)), image),
    "GroupNorm of one group": (lambda: on_images(called, norm=nn.GroupNorm(1, 8)), image),
    "GroupNorm without factors": (lambda: on_images(called, norm=nn.GroupNorm(4, 8, affine=False)), image),
    "GroupNorm of a concatenation": (
        lambda: Net(lambda m, x: m.out(m.norm(torch.cat([m.a(x), m.b(x)], 1))), a=conv(3, 8), b=conv(3, 8),
                    norm=nn.GroupNorm(4, 16), out=conv(16, 2)),
        image,
    ),
    "InstanceNorm": (lambda: on_images(called, norm=nn.InstanceNorm2d(8, affine=True)), image),
    "InstanceNorm with statistics": (
        lambda: on_images(called, norm=nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), image,
    ),
    "BatchNorm": (lambda: on_images(called, norm=nn.BatchNorm2d(8)), image),
    "F.batch_norm": (
        lambda: on_images(lambda m, y: F.batch_norm(y, m.beta * 0.1, m.gamma, m.gamma, m.beta)), image,
    ),
    "global response": (lambda: on_images(grn), image),
    "local response": (lambda: on_images(lambda m, y: F.normalize(y, dim=1)), image),
    "a norm for each head": (lambda: per_head(nn.LayerNorm(8)), tokens),
    "an RMS for each head": (lambda: per_head(nn.RMSNorm(8)), tokens),
    "weight norm by hand": (
        lambda: Net(lambda m, x: m.out(F.linear(x, m.a.weight * m.g / m.a.weight.norm(dim=1, keepdim=True))),
                    a=nn.Linear(6, 8, bias=False), out=nn.Linear(8, 2)),
        tokens,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_lose_what_their_input_loses(name):
    torch.manual_seed(0)
    build, data = NORMS[name]
    net = build()
    if name == "weight norm by hand":
        net.g = nn.Parameter(torch.rand(8, 1) + 0.5)
    cut, stays = check_pruning(net, data(), mixes=True)
    assert "a" in cut, stays


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-6)], ids=["LayerNorm", "RMSNorm"])
def test_a_network_cut_by_hand(norm):
    torch.manual_seed(0)
    nn.init.uniform_(norm.weight, 0.5, 2)
    net, data = on_tokens(called, norm=norm).eval(), tokens()
    _, records = planned(net, data, ratio=0.5)
    keep = [index for index in range(8) if index not in records[0].producers[0].prune_index]
    assert len(keep) == 4
    by_hand = copy.deepcopy(net)
    by_hand.a.weight, by_hand.a.bias = nn.Parameter(net.a.weight[keep]), nn.Parameter(net.a.bias[keep])
    by_hand.norm.weight, by_hand.norm.normalized_shape = nn.Parameter(net.norm.weight[keep]), (4,)
    if isinstance(norm, nn.LayerNorm):
        by_hand.norm.bias = nn.Parameter(net.norm.bias[keep])
    by_hand.out.weight = nn.Parameter(net.out.weight[:, keep])
    assert torch.equal(outputs(replay(net, tuple(records), data), data)[0], outputs(by_hand, data)[0])


def test_groups_of_a_norm_lose_equally_many():
    torch.manual_seed(0)
    net = on_images(called, norm=nn.GroupNorm(2, 8)).eval()
    with torch.no_grad():
        net.a.weight[:4] *= 0.01  # the smallest four lie in one group
    _, records = planned(net, image(), ratio=0.5)
    removed = records[0].producers[0].prune_index
    assert records[0].producers[0].prune_group == 2 and sum(index < 4 for index in removed) == 2 == len(removed) / 2


REFUSED = {
    "a norm that is shared": (
        lambda: Net(lambda m, x: m.out(m.norm(m.a(x)).mean(-1, keepdim=True).expand(-1, -1, 6) + m.norm(x)),
                    a=nn.Linear(6, 6), norm=nn.LayerNorm(6), out=nn.Linear(6, 2)),
        tokens, "a", "combines",
    ),
    "running statistics of others": (
        lambda: Net(lambda m, x: m.out(F.batch_norm(m.a(x), m.mean, m.var)), a=nn.Linear(6, 8), out=nn.Linear(8, 2)),
        tokens, "a", "normalises axis 1, but the channels are along",
    ),
    "softmax over the channels": (
        lambda: on_images(lambda m, y: y.softmax(1)), image, "a", "works along the channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_channels_that_stay_are_told(name):
    torch.manual_seed(0)
    build, data, layer, reason = REFUSED[name]
    net = build()
    if name.startswith("running"):
        net.register_buffer("mean", torch.randn(5))
        net.register_buffer("var", torch.rand(5) + 0.5)
    assert reason in refusal(net, data(), layer)


def test_a_norm_whose_result_nothing_reads_still_has_to_fit():
    torch.manual_seed(0)
    net = Net(lambda m, x: (lambda y: (m.norm(y), m.out(y))[1])(m.a(x)), a=conv(3, 4), norm=nn.GroupNorm(2, 4),
              out=conv(4, 2))  # fmt: skip
    assert check_pruning(net, image(), ratio=0.5)[0] == {"a"}
    assert check_pruning(net, image(), ratio=0.2)[0] == {"a"}  # one of four is rounded up to one of each group
