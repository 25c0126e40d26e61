"""Which channels of a group go."""

from __future__ import annotations

import pytest
import torch
from support.checks.planned_channels import plain, planned
from support.models.net_of_function import Net, conv, image

from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune
from amct_ext.errors import InvalidDataError
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import plan_channels
from amct_ext.prune.selection import importance, least_important, removal_count
from amct_ext.prune.walk import discover


@pytest.mark.parametrize(
    ("channels", "ratio", "ascend", "num_subgroups", "count"),
    [
        (20, 0.25, False, 1, 5),
        (20, 0.25, True, 1, 4),
        (160, 0.3, True, 1, 48),
        (8, 0.5, True, 1, -8),
        (5, 0.5, False, 1, 2),  # 2.5 is rounded to even
        (7, 0.5, False, 1, 4),  # 3.5 too
        (4, 0.99, False, 1, 3),
        (12, 0.3, False, 4, 4),
        (8, 0.9, False, 4, 4),
    ],
)
def test_removal_count(channels, ratio, ascend, num_subgroups, count):
    assert removal_count(channels, ratio, ascend, num_subgroups) == count


def test_equal_filters_go_in_order_and_have_no_say_among_others():
    same = torch.ones(6, 2)
    assert least_important(importance([same]), 0.5, False) == (0, 1, 2)
    other = torch.tensor([3.0, 1, 6, 2, 5, 4]).unsqueeze(1)
    assert least_important(importance([same, other]), 0.5, False) == (0, 1, 3)


def test_each_block_loses_equally_many():
    scores = torch.tensor([1.0, 2, 3, 4, 50, 60, 70, 80])
    assert least_important(scores, 0.5, False, 2) == (0, 1, 4, 5)
    assert least_important(scores, 0.5, False, 1) == (0, 1, 2, 3)


def test_coupled_layers_take_the_smallest_ratio_and_any_rounding():
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 40), b=conv(3, 40), c=conv(40, 2))
    graph = trace(net, image())
    prune = {"a": FilterPrune(0.5, False), "b": FilterPrune(0.25, True)}
    layers = {name: LayerPlan(name, trait.type, None, prune.get(name)) for name, trait in graph.traits(net).items()}
    plan = Plan(1, layers, False, False, False, True)
    (record,) = plan_channels(discover(graph, plan, net), plan, net)
    assert [node.name for node in record.producers] == ["a", "b"]
    assert len(record.producers[0].prune_index) == 8  # 30 remain, rounded up to 32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_cannot_be_ranked_are_named(bad):
    net = plain()
    net[3].weight.data[0, 0, 0, 0] = bad
    with pytest.raises(InvalidDataError, match="3: the weight holds NaN or Inf"):
        planned(net, image())
