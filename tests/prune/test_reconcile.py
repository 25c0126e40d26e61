"""Sizes that a forward takes from somewhere else: what they reshape loses as many channels as what they come from."""

from __future__ import annotations

import copy

import pytest
import torch
from support.checks.pruning_check import plan_for, randomize_norms
from torch import nn

from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import apply_channels, plan_channels
from amct_ext.prune.equivalence import largest_error, run_masked
from amct_ext.prune.walk import discover


class Attention(nn.Module):
    """Four heads; sizes come from the input, or from one attribute for queries and values."""

    def __init__(self, way):
        super().__init__()
        self.way, self.head_dim, self.scale = way, 4, 0.5
        self.qk, self.v, self.out = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        b, n, c = x.shape
        if self.way == "attribute":
            q, k = self.qk(x).view(b, n, 2, -1, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            v = self.v(x).view(b, n, -1, self.head_dim).transpose(1, 2)
        else:
            q, k = self.qk(x).reshape(b, n, 2, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
            v = self.v(x).reshape(b, n, 4, c // 4).transpose(1, 2)
        y = ((q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v).transpose(1, 2)
        return self.out(y.flatten(2) if self.way == "attribute" else y.reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 16), Attention(way), nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x))


def pruned(net, data, ratio):
    randomize_norms(net)
    graph = trace(net, data)
    plan = plan_for(graph, net, ratio)
    found = discover(graph, plan, net)
    whole, asked = copy.deepcopy(net), []

    def choose(equal_removals):
        asked.extend(equal_removals)
        again = discover(graph, plan, net, equal_removals)
        return again, plan_channels(again, plan, net)

    kept = apply_channels(net, found, plan_channels(found, plan, net), data, choose=choose)
    removed_mask = found.removed_mask(kept, whole)
    inputs = parse_inputs(net, data)
    assert largest_error(inputs.evaluate(net), run_masked(whole, inputs, found, removed_mask)[1]) < 1e-5
    return {node.name for record in kept for node in record.producers if node.prune_index}, asked


@pytest.mark.parametrize("way", ["attribute", "input"])
@pytest.mark.parametrize("ratio", [0.3, 0.4, 0.5])
def test_all_lose_alike(way, ratio):
    torch.manual_seed(0)
    net, data = Block(way).eval(), torch.randn(2, 5, 6)
    cut, _ = pruned(net, data, ratio)
    assert cut == {"first", "attention.qk", "attention.v", "attention.out"}
    assert net.attention.qk.out_features == 2 * net.attention.v.out_features
    if way == "input":
        assert net.first.out_features == net.attention.v.out_features


def test_what_is_demanded_is_told():
    torch.manual_seed(0)
    _, asked = pruned(Block("input").eval(), torch.randn(2, 5, 6), 0.3)
    assert asked and all(len(each.rows) > 1 and each.where.startswith("/attention/") for each in asked)


def test_a_demand_that_cannot_be_met_is_not_made():
    """The first layer's channels are an output too, and stay: values keep theirs, all else goes."""

    class Both(Block):
        def forward(self, x):
            x = self.first(x)
            return self.last(x + self.attention(x)), x

    torch.manual_seed(0)
    net = Both("input").eval()
    cut, _ = pruned(net, torch.randn(2, 5, 6), 0.5)
    assert "attention.v" not in cut and net.first.out_features == 16
