"""What forbids to change the shape of a layer or parameter."""

from __future__ import annotations

import pytest
import torch
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.graph.trace import trace
from amct_ext.prune.fixed_shapes import fixed_shape_reasons, shared_parameters


def tied():
    net = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))
    net.c.weight = net.b.weight
    return net


CASES = {
    "a shared weight": (tied, "b", "it shares a parameter with c"),
    "a weight that an op reads": (
        lambda: Net(lambda m, x: m.a(x) * m.a.weight.sum(), a=conv(3, 4)), "a",
        "/Sum also reads its parameter a.weight",
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 4))), "0", "its weight is computed",
    ),
    "BatchNorm with a parametrised weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None)), "0",
        "its weight is computed (parametrisation or weight norm)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_obstacles(name):
    build, layer, reason = CASES[name]
    net = build().eval()
    assert reason in fixed_shape_reasons(trace(net, image()), net)[layer]


def test_plain_layers_have_none():
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    assert fixed_shape_reasons(trace(net, image()), net) == {}


def test_names_of_shared_parameters_and_buffers():
    net = tied()
    net.register_buffer("one", torch.zeros(2))
    net.register_buffer("two", net.one)
    assert shared_parameters(net) == {
        "b.weight": "b.weight, c.weight", "c.weight": "b.weight, c.weight", "one": "one, two", "two": "one, two",
    }  # fmt: skip
