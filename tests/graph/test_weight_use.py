"""Weights of a forward: elements, multiplications, who reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.models.net_of_function import Net
from torch import nn

from amct_ext.graph.recorder import record
from amct_ext.graph.weight_use import is_weight, weight_uses


def uses(net, x):
    return weight_uses(record(net, x).nodes, net)


def test_layers_count_their_multiplications():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2), nn.Flatten(), nn.Linear(576, 2))
    found = uses(net, torch.randn(1, 3, 6, 6)).weights
    assert {name: (use.weights, use.macs) for name, use in found.items()} == {
        "0": (8 * 27, 8 * 27 * 36),
        "1": (8 * 4 * 4, 8 * 4 * 4 * 36),  # applied at each position of its input
        "3": (1152, 1152),
    }


def test_ops_name_the_parameter_and_the_op():
    net = Net(lambda m, x: x @ m.u + F.linear(x, m.fc.weight), u=nn.Parameter(torch.randn(8, 4)), fc=nn.Linear(8, 4))
    found = uses(net, torch.randn(5, 8)).weights
    assert found["u"].reader == "/Mm" and found["fc"].reader and found["fc"].type == "Linear"
    assert found["u"].macs == found["fc"].macs == 5 * 32


def test_a_tied_weight_is_counted_where_it_is_multiplied():
    net = Net(lambda m, x: F.linear(m.table(x), m.table.weight), table=nn.Embedding(10, 4))
    (use,) = uses(net, torch.tensor([[1, 2]])).weights.values()
    assert use.weights == 40 and not use.is_lookup and use.macs == 2 * 40
    (alone,) = uses(nn.Sequential(nn.Embedding(10, 4)), torch.tensor([[1, 2]])).weights.values()
    assert alone.is_lookup and alone.weights == 40 and alone.macs == 0


def test_products_of_activations():
    net = Net(lambda m, x: (m.fc(x) @ x.transpose(1, 2)) @ x, fc=nn.Linear(4, 4))
    assert uses(net, torch.randn(2, 3, 4)).activation_macs == 2 * (3 * 4 * 3 + 3 * 3 * 4)


def test_vectors_are_no_weights():
    assert is_weight((4, 3)) and not is_weight((4,)) and not is_weight((4, 1, 1))
