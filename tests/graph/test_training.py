"""The part of a forward in train mode that has parameters which evaluation does not read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.graph.trace import trace


def heads(m, x):
    y = m.a(x)
    other = m.b(x).relu()
    main = m.out(y.mean((2, 3))) + other.mean()
    return (main, F.linear(y.relu().mean((2, 3)), m.factor)) if m.training else main


def net(forward=heads):
    model = Net(forward, a=conv(3, 8), b=conv(3, 8), norm=nn.BatchNorm2d(8), out=nn.Linear(8, 2))
    model.factor = nn.Parameter(torch.ones(2, 8))
    return model.eval()


def test_only_what_the_head_needs_is_there():
    model = net()
    del model.norm
    training = trace(model, image()).training
    assert [node.op for node in training.nodes] == ["Conv2d", "relu", "mean", "t", "mm"]
    assert list(training.calls) == ["a"] and len(training.outputs) == 1
    assert not model.training


def test_nothing_where_evaluation_reads_all():
    model = net(lambda m, x: F.linear(m.out(m.norm(m.a(x) + m.b(x)).mean((2, 3))), m.factor[:, :2]))
    assert trace(model, image()).training is None


def test_nothing_where_training_reads_no_more():
    assert trace(net(lambda m, x: m.out(m.a(x).mean((2, 3)))), image()).training is None


def test_nothing_where_training_fails():
    def forward(m, x):
        if m.training:
            raise ValueError("targets are missing")
        return m.out(m.a(x).mean((2, 3)))

    assert trace(net(forward), image()).training is None


def test_a_parameter_with_two_names_is_read_under_either():
    model = net(lambda m, x: m.out(m.norm(m.a(x) + m.b(x)).mean((2, 3))))
    model.factor = None
    model.again = model.out
    assert trace(model, image()).training is None
