"""Attention made of its parts: the number that divides its products is made up for when heads get smaller."""

from __future__ import annotations

import math

import pytest
import torch
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning
from support.models.net_of_function import Net
from torch import nn

from amct_ext.prune.channels import apply_channels


class Attention(nn.Module):
    """Four heads of eight; `scale` says where the factor comes from, and what it is put on."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.head_dim = scale, 8
        self.q, self.k, self.v, self.out = (nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16))
        self.root = 8**-0.5
        with torch.no_grad():
            for layer in (self.q, self.k):
                layer.weight.mul_(4)  # a softmax that is far from even

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        match self.scale:
            case "size of queries":
                scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
            case "attribute":
                scores = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5
            case "both":
                scores = (q * q.size(-1) ** -0.25) @ (k.transpose(-2, -1) * q.size(-1) ** -0.25)
            case "tensor":
                scores = q @ (k.transpose(-2, -1) / torch.sqrt(torch.tensor(q.size(-1), dtype=q.dtype) * 1.0))
            case "kept":
                scores = (q * self.root) @ k.transpose(-2, -1)
            case "nonlinear":
                scores = (q.relu() @ k.relu().transpose(-2, -1)) / math.sqrt(q.size(-1))
            case "random":
                scores = q @ k.transpose(-2, -1) * (1 + torch.rand(()).item())
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def tokens():
    return torch.randn(2, 5, 16)


@pytest.mark.parametrize("scale", ["size of queries", "attribute", "both", "tensor", "kept"])
def test_the_softmax_stays(scale):
    torch.manual_seed(0)
    cut, stays = check_pruning(nn.Sequential(Attention(scale), nn.Linear(16, 3)), tokens(), mixes=True)
    assert cut >= {"0.q", "0.k", "0.v"}, stays


def test_queries_stay_where_no_layer_makes_up_for_it(caplog):
    torch.manual_seed(0)
    net = nn.Sequential(Attention("nonlinear"), nn.Linear(16, 3)).eval()
    found, records = planned(net, tokens())
    kept = apply_channels(net, found, records, tokens())
    assert net[0].q.out_features == net[0].k.out_features == 32 and net[0].v.out_features < 32
    assert "0.q is not pruned: the pruned model would fail or differ: /0/Div (div) uses their number" in caplog.text
    assert 0 < len(kept) < len(records)


def test_numbers_that_change_for_another_reason_are_left_alone():
    torch.manual_seed(0)
    net = nn.Sequential(Attention("random"), nn.Linear(16, 3)).eval()
    found, records = planned(net, tokens())
    bias = net[0].q.bias.detach().clone()
    apply_channels(net, found, records, tokens())
    assert set(net[0].q.bias.tolist()) <= set(bias.tolist())


def test_a_layer_makes_up_for_a_factor_of_its_own_size():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(m.a(x) / m.a.out_features), a=nn.Linear(16, 10), out=nn.Linear(10, 2))
    cut, stays = check_pruning(net, tokens())
    assert cut == {"a"}, stays


def test_parts_of_one_layer_are_scaled_apart():
    """Queries, keys and values of one layer: the rows of the queries alone are multiplied."""

    def forward(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return m.out(((q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1) @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = nn.Sequential(Net(forward, qkv=nn.Linear(16, 96), out=nn.Linear(32, 16)), nn.Linear(16, 3))
    cut, stays = check_pruning(net, tokens(), mixes=True)
    assert "0.qkv" in cut, stays
