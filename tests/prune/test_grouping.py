"""From single channels to groups: blocks, members, subgroups, and groups that lose together."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning, plan_for, replay
from support.models.net_of_function import Net, conv, image

from amct_ext.errors import RecordError
from amct_ext.graph.trace import trace
from amct_ext.prune.walk import discover


def groups(net, data):
    net.eval()
    graph = trace(net, data)
    return discover(graph, plan_for(graph, net), net).groups


def split_and_added():
    return Net(
        lambda m, x: m.out((lambda y: torch.cat([y[:, :4] + m.b(x), y[:, 4:]], 1))(m.a(x))),
        a=conv(3, 10), b=conv(3, 4), out=conv(10, 2),
    )  # fmt: skip


def test_blocks_of_a_layer_that_are_coupled_differently_are_groups_of_their_own():
    first, second, _ = groups(split_and_added(), image())
    assert first.count == 4 and second.count == 6
    assert [(m.name, m.begin) for m in first.producers] == [("a", 0), ("b", 0)]
    assert [(m.name, m.begin) for m in second.producers] == [("a", 4)]
    assert [(m.name, m.begin) for m in second.consumers if m.name == "out"] == [("out", 4)]


def test_a_layer_in_several_records_is_cut_once():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(torch.cat([m.a(x)[:, : m.width] + m.b(x), m.a2(x)], 1)), a=conv(3, 4), a2=conv(3, 6),
              b=conv(3, 4), out=conv(10, 2))  # fmt: skip
    net.width = 4
    assert check_pruning(net, image())[0] == {"a", "b", "a2"}


def grouped_concat():
    """A convolution with two groups over the concatenation of two layers: each must lose as many as the other."""
    return Net(
        lambda m, x: m.out(F.relu(m.grouped(torch.cat([m.a(x), m.b(x)], 1)))),
        a=conv(3, 6), b=conv(3, 6), grouped=conv(12, 8, groups=2), out=conv(8, 2),
    )  # fmt: skip


def test_groups_that_lose_alike_are_linked():
    one, two, *_ = groups(grouped_concat(), image())
    assert one.tied_groups == [one, two] == two.tied_groups
    assert one.subgroups.tolist() == [0] * 6 and two.subgroups.tolist() == [1] * 6
    assert one.num_equal_subgroups is None


def test_linked_groups_lose_in_proportion():
    torch.manual_seed(0)
    net = grouped_concat().eval()
    with torch.no_grad():
        net.a.weight *= 0.01
    _, records = planned(net, image(), ratio=0.5)
    assert [len(record.producers[0].prune_index) for record in records[:2]] == [3, 3]


def test_a_record_that_breaks_one_of_linked_groups_is_refused():
    torch.manual_seed(0)
    net = grouped_concat().eval()
    _, records = planned(net, image(), ratio=0.5)
    broken = [
        replace(
            records[0],
            producers=tuple(replace(n, prune_index=n.prune_index[:-1]) for n in records[0].producers),
            consumers=tuple(replace(n, prune_index=n.prune_index[:-1]) for n in records[0].consumers),
        ),
        *records[1:],
    ]
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RecordError, match=r"the 2 groups of grouped must lose equally many channels, not \[2, 3\]"):
        replay(net, tuple(broken), image())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_channels_in_an_order_of_their_own_are_listed():
    net = Net(lambda m, x: m.out(F.channel_shuffle(m.a(x), 2)), a=conv(3, 8), out=conv(8, 2))
    first, *_ = groups(net, image())
    (member,) = (m for m in first.consumers if m.name == "out")
    # Pairs (0, 4), (1, 5), ... go together: of the same column in both rows of the shuffle.
    assert first.count == 4 and [m.begin for m in first.producers] == [0, 4]
    assert member.indices([1]) == (2, 3)


def test_a_record_that_lists_places_is_refused_where_these_are_others():
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out((lambda y: torch.cat([y, y.chunk(2, 1)[0]], 1))(m.a(x))), a=conv(3, 8),
              out=conv(12, 2)).eval()  # fmt: skip
    _, (record,) = planned(net, image(), ratio=0.5)
    at = next(i for i, node in enumerate(record.consumers) if node.name == "out")
    node = record.consumers[at]
    half = [index for index in record.producers[0].prune_index if index < 4]
    assert node.prune_index == (*record.producers[0].prune_index, *(8 + index for index in half))
    other = replace(
        node, prune_index=tuple(sorted({*node.prune_index[:-1], next(i for i in range(8, 12) if i - 8 not in half)}))
    )
    broken = replace(record, consumers=(*record.consumers[:at], other, *record.consumers[at + 1 :]))
    with pytest.raises(RecordError, match=r"out loses .* but the channels of a are its"):
        replay(net, (broken,), image())


def test_parts_that_cannot_lose_alike_keep_their_channels():
    net = Net(lambda m, x: m.out(m.grouped(torch.cat([m.a(x), x], 1))), a=conv(3, 3), grouped=conv(6, 8, groups=2),
              out=conv(8, 2))  # fmt: skip
    first, second, _ = groups(net, image())
    assert first.frozen_reason == "grouped needs equally many of the channels in each of its parts"
    assert second.num_equal_subgroups == 2 and not second.frozen_reason
