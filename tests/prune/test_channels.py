"""Physical removal, the comparison with the unpruned model, and the way back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import plain, planned
from support.checks.pruning_check import masked, outputs
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.prune import channels
from amct_ext.prune.channels import apply_channels
from amct_ext.prune.runs import Difference


def test_parameters_keep_what_the_user_set():
    net = plain().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    net[0].weight.no_decay = True
    found, records = planned(net, image())
    apply_channels(net, found, records, image())
    assert isinstance(net[3].weight, nn.Parameter)
    assert net[3].weight.requires_grad
    assert not net[0].weight.requires_grad
    assert net[0].weight.no_decay
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert {name for name, _ in net.named_parameters()} == {name for name, _ in plain().named_parameters()}
    net(image()).sum().backward()


def test_nothing_is_disturbed_by_the_comparison():
    net = plain().train()
    net[1].eval()
    found, records = planned(net, image())
    statistics, data, random = net[1].running_mean.clone(), image(), torch.get_rng_state()
    (kept, _) = apply_channels(net, found, records, data)
    stay = [channel for channel in range(8) if channel not in kept.producers[0].prune_index]
    assert torch.equal(net[1].running_mean, statistics[stay])
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not net[1].training
    assert net[1].num_batches_tracked == 0


def test_an_importable_copy_stays_usable():
    net = plain()
    found, records = planned(net, image())
    apply_channels(net, found, records, image())
    again = copy.deepcopy(net)
    assert torch.equal(again(torch.ones(1, 3, 6, 6)), net(torch.ones(1, 3, 6, 6)))


def test_a_group_whose_size_is_written_into_the_model_is_dropped(caplog):
    def forward(m, x):
        y = F.relu(m.b(F.relu(m.a(x)))).view(-1, 6 * 36)  # 6 is written down: b cannot shrink
        return m.out(y)

    net = Net(forward, a=conv(3, 8), b=conv(8, 6), out=nn.Linear(216, 2)).eval()
    whole = copy.deepcopy(net)
    data = image()
    found, records = planned(net, data)
    assert len(records) == 2
    with caplog.at_level(logging.WARNING, "amct_ext"):
        kept = apply_channels(net, found, records, data)
    assert kept == records[:1]
    assert "b is not pruned: the pruned model would fail" in caplog.text
    assert net.b.out_channels == 6
    assert net.a.out_channels == 5
    torch.testing.assert_close(outputs(net, data), outputs(masked(whole, kept), data))


def test_a_head_that_only_runs_in_training_loses_what_it_reads():
    def forward(m, x):
        y = F.relu(m.a(x))
        main = m.head(y.mean((2, 3)))
        return (main, m.aux(m.norm(m.aux_conv(y)).mean((2, 3)))) if m.training else main

    parts = {"aux_conv": conv(8, 4), "norm": nn.BatchNorm2d(4), "aux": nn.Linear(4, 2)}
    net = Net(forward, a=conv(3, 8), head=nn.Linear(8, 2), **parts).eval()
    before = copy.deepcopy(net.state_dict())
    found, records = planned(net, image())
    assert [record.producers[0].name for record in records] == ["a"]
    assert [(node.name, node.type) for node in records[0].consumers] == [("head", "Gemm"), ("aux_conv", "Conv")]
    assert apply_channels(net, found, records, image()) == records
    assert (net.a.out_channels, net.aux_conv.in_channels, net.aux_conv.out_channels) == (5, 5, 4)
    assert torch.equal(net.norm.running_mean, before["norm.running_mean"])
    net.train()(image())


def test_channels_that_training_adds_to_others_stay():
    def forward(m, x):
        y = m.a(x)
        return m.head((y + m.aux(x) if m.training else y).mean((2, 3)))

    net = Net(forward, a=conv(3, 8), aux=conv(3, 8), head=nn.Linear(8, 2)).eval()
    found, records = planned(net, image())
    assert records == () and "combines the channels with the output of aux" in found.unpruned_reasons()["a"]


def test_a_head_that_training_cannot_read_smaller_is_seen():
    def forward(m, x):
        y = F.relu(m.a(x))
        return y.mean((2, 3)).sum(1) if not m.training else (y.mean((2, 3)).sum(1), y.view(-1, 8, 36)[:, :, 0])

    net = Net(forward, a=conv(3, 8)).eval()
    found, records = planned(net, image())
    assert [record.producers[0].name for record in records] == ["a"]
    assert apply_channels(net, found, records, image()) == ()
    net.train()(image())


def test_outputs_whose_size_depends_on_the_weights_do_not_hinder():
    net = Net(lambda m, x: (lambda y: y[y > 0])(m.b(F.relu(m.a(x)))), a=conv(3, 8), b=conv(8, 4)).eval()
    found, records = planned(net, image())
    assert apply_channels(net, found, records, image()) == records
    assert net.a.out_channels == 5


@pytest.mark.parametrize(("op", "stays"), [("index", True), ("convolution", False)])
def test_a_threshold_that_rounding_moves_a_value_across_is_no_fault(op, stays, monkeypatch):
    """A detector keeps scores above a number: the last bit may decide, and the outputs then have other sizes."""

    def forward(m, x):
        scores = m.out(F.relu(F.conv2d(m.a(x), m.w))).flatten()
        return scores[scores > 0]

    net = Net(forward, a=conv(3, 8), out=conv(8, 2)).eval()
    net.w = nn.Parameter(torch.randn(8, 8, 1, 1))
    found, records = planned(net, image())
    (node,) = [node for node in found.graph.nodes if node.op == op]
    monkeypatch.setattr(channels, "largest_error", lambda *_: torch.inf)
    monkeypatch.setattr(channels, "first_divergence", lambda *_: Difference(node, "it differs"))
    kept = apply_channels(net, found, records, image())
    assert bool(kept) == (net.a.out_channels < 8) == stays
