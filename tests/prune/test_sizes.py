"""Shapes and attributes that change when channels go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.checks.planned_channels import planned
from support.checks.pruning_check import check_pruning, plan_for
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.graph.trace import trace
from amct_ext.prune.channels import apply_channels
from amct_ext.prune.sizes import changed_attributes, expected_shape
from amct_ext.prune.walk import discover


def with_sizes(net, **sizes):
    vars(net).update(sizes)
    return net.eval()


def attention(m, x):
    b, n, _ = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return m.out(y.transpose(1, 2).reshape(b, n, m.num_heads * m.head_dim))


def split(m, x):
    one, two = m.a(x).split(m.split_sizes, 1)
    return m.one(one) + m.two(two)


# name -> (network, input, attribute of it, value after half of the channels went)
ATTRIBUTES = {
    "head_dim": (
        lambda: with_sizes(Net(attention, qkv=nn.Linear(6, 48), out=nn.Linear(16, 6)), num_heads=2, head_dim=8),
        torch.randn(2, 5, 6), "head_dim", 4,
    ),
    "split_sizes": (
        lambda: with_sizes(Net(split, a=conv(3, 12), one=conv(8, 2), two=conv(4, 2)), split_sizes=[8, 4]),
        image(), "split_sizes", None,
    ),
    "split_sizes as a tuple": (
        lambda: with_sizes(Net(split, a=conv(3, 12), one=conv(8, 2), two=conv(4, 2)), split_sizes=(8, 4)),
        image(), "split_sizes", None,
    ),
    "d_model": (
        lambda: with_sizes(Net(lambda m, x: m.out(m.a(x).reshape(-1, m.d_model)), a=nn.Linear(6, 10),
                               out=nn.Linear(10, 2)), d_model=10),
        torch.randn(2, 5, 6), "d_model", 5,
    ),
    "normalized_shape": (
        lambda: with_sizes(Net(lambda m, x: m.out(F.layer_norm(m.a(x), m.normalized_shape)), a=nn.Linear(6, 10),
                               out=nn.Linear(10, 2)), normalized_shape=(10,)),
        torch.randn(2, 5, 6), "normalized_shape", (5,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_follow(name):
    torch.manual_seed(0)
    build, data, attribute, wanted = ATTRIBUTES[name]
    net = build()
    found, records = planned(net, data, ratio=0.5)
    removed = found.removed_mask(records, net)
    new = changed_attributes(net, found, removed)["", attribute]
    before = getattr(net, attribute)
    assert type(new) is type(before)
    if wanted is not None:
        assert new == wanted
    else:
        removed = records[0].producers[0].prune_index
        assert list(new) == [8 - sum(index < 8 for index in removed), 4 - sum(index >= 8 for index in removed)]
    cut, _ = check_pruning(net, data, mixes=True)
    assert cut
    assert getattr(net, attribute) == before


def test_other_attributes_with_the_same_number_stay():
    net = with_sizes(Net(lambda m, x: m.out(m.a(x).reshape(-1, m.d_model)), a=nn.Linear(6, 10), out=nn.Linear(10, 2)),
                     d_model=10, classes=10, num_heads=10)  # fmt: skip
    found, records = planned(net, torch.randn(2, 5, 6), ratio=0.5)
    assert changed_attributes(net, found, found.removed_mask(records, net)).keys() == {("", "d_model")}


def test_norms_say_their_new_size():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.RMSNorm(10), nn.Linear(10, 8), nn.PReLU(8),
                        nn.Linear(8, 2)).eval()  # fmt: skip
    data = torch.randn(3, 6)
    found, records = planned(net, data, ratio=0.5)
    assert apply_channels(net, found, records, data) == records
    assert net[1].normalized_shape == net[2].normalized_shape == (5,) and net[4].num_parameters == 4


LITERAL = {
    "slices": lambda m, x: m.out((lambda y: torch.cat([y[:, :4] * 2, y[:, 4:]], 1))(m.a(x))),
    "a view": lambda m, x: m.out(m.a(x).view(2, 10, 6, 6).relu()),
    "parts": lambda m, x: m.out(torch.cat([p * 2 for p in m.a(x).split([4, 6], 1)], 1)),
    "an expanded gate": lambda m, x: m.out(m.a(x) * x[:, :1].expand(-1, 10, -1, -1)),
}


@pytest.mark.parametrize("name", LITERAL)
def test_sizes_written_into_a_forward_keep_the_channels_with_a_warning(name, caplog):
    torch.manual_seed(0)
    net, data = Net(LITERAL[name], a=conv(3, 10), out=conv(10, 2)).eval(), image()
    wanted = net(data)
    found, records = planned(net, data, ratio=0.5)
    kept = apply_channels(net, found, records, data)
    assert kept == () and torch.equal(net(data), wanted)
    assert "a is not pruned: the pruned model would fail or differ: " in caplog.text


def test_expected_shapes():
    net = Net(lambda m, x: m.out(m.a(x).flatten(1)), a=conv(3, 8), out=nn.Linear(288, 2)).eval()
    graph = trace(net, image())
    found = discover(graph, plan_for(graph, net), net)
    _, records = planned(net, image(), ratio=0.5)
    removed = found.removed_mask(records, net)
    shapes = [expected_shape(node.outputs[0], found, removed) for node in graph.nodes]
    assert shapes == [(2, 4, 6, 6), (2, 144), (2, 2)]
