"""Groups of coupled channels, as records name them, and reasons for keeping channels."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned, unpruned_reasons
from support.models.net_of_function import Net, conv, image
from torch import nn


def test_a_record_names_every_node_with_its_own_indices():
    net = Net(
        lambda m, x: m.out(m.depth(torch.cat([m.bn(m.a(x)) + m.b(x), m.c(x)], 1)).flatten(1)),
        a=conv(3, 4), bn=nn.BatchNorm2d(4), b=conv(3, 4), c=conv(3, 2), depth=conv(6, 12, groups=6),
        out=nn.Linear(432, 2),
    )  # fmt: skip
    _, (first, second) = planned(net.eval(), image(), ratio=0.5)
    assert [(node.name, node.type, node.begin, node.end) for node in first.producers] == [
        ("a", "Conv", 0, 4), ("b", "Conv", 0, 4)
    ]  # fmt: skip
    assert [(node.name, node.type, node.begin, node.end) for node in first.consumers] == [
        ("bn", "BatchNormalization", 0, 4), ("/Add", "Add", 0, 4), ("/Concat", "Concat", 0, 4), ("depth", "Conv", 0, 4),
        ("out", "Gemm", 0, 288),
    ]  # fmt: skip
    assert [(node.name, node.begin, node.end) for node in second.consumers] == [
        ("/Concat", 4, 6), ("depth", 4, 6), ("out", 288, 432)
    ]  # fmt: skip
    (removed,) = second.producers[0].prune_index
    assert second.consumers[1].prune_index == (4 + removed,)
    assert second.consumers[2].prune_index == tuple(range(288 + 72 * removed, 288 + 72 * (removed + 1)))


def test_groups_are_written_as_amct_writes_them():
    net = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2)).eval()
    _, (first, second) = planned(net, image(), ratio=0.5)
    assert (first.producers[0].group, first.producers[0].prune_group, first.consumers[0].group) == (None, 4, 4)
    assert (second.producers[0].group, second.producers[0].prune_group, second.consumers[0].group) == (4, 4, None)


@pytest.mark.parametrize(
    ("linear", "data", "kind"),
    [
        (nn.Linear(4, 3), torch.randn(2, 4), "Gemm"),
        (nn.Linear(4, 3, bias=False), torch.randn(2, 4), "MatMul"),
        (nn.Linear(4, 3), torch.randn(2, 5, 4), "MatMul"),
    ],
)
def test_the_operator_of_a_linear_depends_on_input_and_bias(linear, data, kind):
    _, (record,) = planned(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 2)), data)
    assert record.producers[0].type == kind


def reuse(m, x):
    return m.out(m.twice(m.twice(m.a(x))))


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (lambda: nn.Sequential(conv(3, 4)), "0", "an output of the model"),
        (lambda: Net(reuse, a=conv(3, 4), twice=conv(4, 4), out=conv(4, 2)), "a", None),
        (lambda: Net(reuse, a=conv(3, 4), twice=conv(4, 4), out=nn.ReLU()), "a", "an output of the model"),
        (lambda: nn.Sequential(conv(3, 4), nn.GroupNorm(4, 4), conv(4, 2)), "0", None),
        (lambda: nn.Sequential(conv(3, 4), nn.Softmax(1), conv(4, 2)), "0", "works along the channels"),
        (lambda: Net(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2)), "a", "a model input, whose"),
        (lambda: Net(lambda m, x: m.b(F.conv2d(m.a(x), m.b.weight)), a=conv(3, 4), b=conv(4, 4)), "a",
         "also reads its parameter b.weight"),
        (lambda: Net(lambda m, x: m.b(m.a(x)[:, ::2]), a=conv(3, 4), b=conv(2, 2)), "a", "takes every 2th channel"),
        (lambda: Net(lambda m, x: m.b(m.a(x)[:, :1] * m.a.bias.sum()), a=conv(3, 4), b=conv(1, 2)), "a", "a.bias"),
        (lambda: Net(lambda m, x: m.b(m.a(x).roll(1, 1)), a=conv(3, 4), b=conv(4, 2)), "a", "by a fixed number"),
        (lambda: Net(lambda m, x: m.b(m.a(x).argmax(1, keepdim=True).float()), a=conv(3, 4), b=conv(1, 2)), "a",
         "works along the channels"),
        (lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 0), value=1.0)), a=conv(3, 4), b=conv(5, 2)), "a",
         "pads along"),
        (lambda: Net(lambda m, x: m.b(torch.fft.rfft(m.a(x)).real), a=conv(3, 4), b=conv(4, 2)), "a",
         "(_fft_r2c), which channel removal cannot follow"),
        (lambda: Net(lambda m, x: m.g(torch.cat([m.a(x), m.b(x)], 1)).mean(), a=conv(3, 3), b=conv(3, 3),
                     g=conv(6, 6, groups=4 // 2)), "a", None),
        (lambda: Net(lambda m, x: m.g(torch.cat([m.a(x), x], 1)).mean(), a=conv(3, 3), g=conv(6, 6, groups=2)), "a",
         "equally many of the channels in each of its parts"),
        (lambda: Net(lambda m, x: m.b(m.a(x)) + m.a.weight.sum(), a=conv(3, 4), b=conv(4, 2)), "a", "a.weight"),
    ],
)  # fmt: skip
def test_channels_that_stay_have_a_reason(network, layer, reason):
    found = unpruned_reasons(network(), image())
    assert layer not in found if reason is None else reason in found[layer], found


def test_a_batchnorm_over_tokens_without_statistics_mixes_the_channels():
    net = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(20, 3))
    assert "1 normalises over the channels" in unpruned_reasons(net, torch.randn(2, 5, 8))["0"]


def test_layers_with_a_common_weight_stay():
    net = nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3), conv(3, 2))
    net[2].weight = net[0].weight
    assert "shares a parameter with 2" in unpruned_reasons(net, image())["0"]


def test_a_skipped_layer_keeps_its_channels_and_may_lose_inputs():
    net = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 2)).eval()
    _, records = planned(net, image(), skip=("1",))
    assert [[node.name for node in (*r.producers, *r.consumers)] for r in records] == [["0", "1"]]


def test_a_rule_that_raises_keeps_the_channels_and_leaves_a_trace(monkeypatch, caplog):
    def broken(node, context):
        raise KeyError("no such argument")

    monkeypatch.setattr("amct_ext.prune.walk.op_rule", lambda node: broken)
    net = Net(lambda m, x: m.out(m.a(x).relu()), a=conv(3, 4), out=conv(4, 2))
    with caplog.at_level(logging.DEBUG, "amct_ext"):
        reasons = unpruned_reasons(net, image())
    assert reasons["a"] == "the rule for /Relu (relu) does not fit it: 'no such argument'"
    (record,) = [record for record in caplog.records if "its rule raised" in record.message]
    assert record.exc_info is not None and record.exc_info[0] is KeyError
