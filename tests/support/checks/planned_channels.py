"""Small nets to prune, and what is planned for them."""

from __future__ import annotations

from support.checks.pruning_check import plan_for
from support.models.net_of_function import conv
from torch import nn

from amct_ext.graph.trace import trace
from amct_ext.prune.channels import plan_channels
from amct_ext.prune.walk import discover


def plain():
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)]
    return nn.Sequential(*layers).eval()


def planned(model, data, **settings):
    graph = trace(model, data)
    plan = plan_for(graph, model, **settings)
    found = discover(graph, plan, model)
    return found, plan_channels(found, plan, model)


def unpruned_reasons(model, data):
    graph = trace(model, data)
    return discover(graph, plan_for(graph, model), model).unpruned_reasons()
