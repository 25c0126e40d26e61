"""Layers that a parent uses functionally: which are found, and with which parent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.models.net_of_function import Net
from torch import nn

from amct_ext.graph.functional_layers import find_functional_layers
from amct_ext.graph.inputs import Inputs
from amct_ext.graph.recorder import record

X = torch.randn(3, 8)


def found(run, **layers):
    """The functional layers of a module 'inner' with this forward, and their parents."""
    inner = Net(run, **layers)
    net = Net(lambda m, x: m.last(m.inner(x)), inner=inner, last=nn.Linear(8, 2))
    nodes = record(net, X).nodes
    return {name: product.parent for name, product in find_functional_layers(net, Inputs((X,)), nodes).items()}


def test_a_weight_that_a_parent_passes_to_a_function():
    assert found(lambda m, x: F.linear(x, m.fc.weight, m.fc.bias), fc=nn.Linear(8, 8)) == {"inner.fc": "inner"}


def test_a_layer_below_another_module():
    holder = nn.Module()
    holder.fc = nn.Linear(8, 8)
    run = lambda m, x: F.linear(x, m.holder.fc.weight, m.holder.fc.bias)  # noqa: E731
    assert found(run, holder=holder) == {"inner.holder.fc": "inner"}


def test_what_is_none():
    fc = nn.Linear(8, 8)
    assert found(lambda m, x: m.fc(x), fc=fc) == {}
    assert found(lambda m, x: F.linear(x, m.fc.weight[:8] * 1, m.fc.bias), fc=fc) == {}  # another weight
    assert found(lambda m, x: F.linear(x, m.fc.weight, 2 * m.fc.bias), fc=fc) == {}  # another bias
    assert found(lambda m, x: F.linear(F.linear(x, m.fc.weight, m.fc.bias), m.fc.weight, m.fc.bias), fc=fc) == {}
    only_eval = lambda m, x: x if m.training else F.linear(x, m.fc.weight, m.fc.bias)  # noqa: E731
    assert found(only_eval, fc=fc) == {}


def test_the_model_is_left_as_it_was():
    net = Net(lambda m, x: F.linear(x, m.fc.weight, m.fc.bias), fc=nn.Linear(8, 8), norm=nn.BatchNorm1d(8))
    outer = nn.Sequential(net).train()
    find_functional_layers(outer, Inputs((X,)), record(outer, X).nodes)
    assert not any("forward" in vars(module) for module in outer.modules()) and outer.training
    assert net.norm.num_batches_tracked == 0
