"""The table of rules: which operators are followed, and what becomes of channels at others."""

from __future__ import annotations

import pytest
import torch
from support.checks.pruning_check import refusal
from support.models.conv_blocks import conv, image
from support.models.net_of_function import Net

from amct_ext.graph.values import Node
from amct_ext.prune.rules import elementwise, reduction
from amct_ext.prune.rules.table import op_rule


@pytest.mark.parametrize(
    ("op", "rule"),
    [
        ("max_pool2d_with_indices", reduction.spatial),
        ("_adaptive_avg_pool3d", reduction.spatial),
        ("_upsample_bilinear2d_aa", reduction.spatial),
        ("replication_pad1d", reduction.spatial),
        ("hardswish", elementwise.elementwise),
        ("mylib::relu", None),
        ("unfold", None),
        ("pad2d", None),
    ],
)
def test_rules_by_name(op, rule):
    assert op_rule(Node(op, op)) is rule


def test_what_torch_calls_pointwise_is_elementwise():
    assert op_rule(Node("frexp", "frexp", pointwise=True)) is elementwise.elementwise


def test_an_operator_without_a_rule_is_named_with_its_place():
    torch.manual_seed(0)

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    net = Net(lambda m, x: m.out(m.odd(m.a(x))), a=conv(3, 8), odd=Odd(), out=conv(8, 2))
    reason = refusal(net, image(), "a")
    assert "_fft_c2c in odd" in reason and "cannot follow" in reason


def test_a_form_that_a_rule_does_not_expect_keeps_the_channels(monkeypatch):
    from amct_ext.prune.rules import table

    def broken(node, context):
        raise IndexError("no such axis")

    monkeypatch.setitem(table._RULES, "flip", broken)
    net = Net(lambda m, x: m.out(m.a(x).flip(2)), a=conv(3, 8), out=conv(8, 2))
    assert "the rule for /Flip (flip) does not fit it: no such axis" in refusal(net, image(), "a")
