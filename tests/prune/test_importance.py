"""Importance from the weights of a whole group (GROUP_L2), and which measure a group is ranked by."""

from __future__ import annotations

import pytest
import torch
from support.models.net_of_function import Net, conv, image
from torch import Tensor, nn

from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune
from amct_ext.errors import InvalidDataError
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import plan_channels
from amct_ext.prune.groups import ChannelGroup
from amct_ext.prune.importance import by_input, group_norms
from amct_ext.prune.selection import measure_of
from amct_ext.prune.walk import discover


def plan_of(net: nn.Module, data: Tensor, importance: dict[str, str | None]) -> Plan:
    traits = trace(net, data).traits(net)
    prune = {name: FilterPrune(0.5, False, measure) for name, measure in importance.items()}
    layers = {name: LayerPlan(name, trait.type, None, prune.get(name)) for name, trait in traits.items()}
    return Plan(1, layers, prune_active=True)


def group_of(net: nn.Module, data: Tensor, *producers: str) -> ChannelGroup:
    (group,) = discover(trace(net, data), plan_of(net, data, dict.fromkeys(producers)), net).prunable
    return group


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 5), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 9, 3, groups=3), nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 12, 3, groups=6), nn.ConvTranspose2d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ConvTranspose2d(6, 12, 3, groups=6),
    ],
    ids=str,
)  # fmt: skip
def test_slices_are_the_weights_that_read_a_channel(layer: nn.Module) -> None:
    slices = by_input(layer.weight.detach(), layer)
    for channel in range(6):
        x = torch.zeros(1, 6) if isinstance(layer, nn.Linear) else torch.zeros(1, 6, 5, 5)
        x[:, channel] = 1
        (gradient,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
        expected = layer.weight.detach()[gradient != 0].sort().values
        assert torch.equal(slices[channel].flatten().sort().values, expected)


def norms(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().transpose(0, axis).flatten(1).norm(dim=1)


def sum_of(*members: Tensor) -> Tensor:
    return torch.stack([member / member.mean() for member in members]).sum(0)


def test_producers_and_readers_count_alike_whatever_their_size() -> None:
    net = Net(lambda m, x: [m.c(y := m.a(x).relu()), m.d(y)], a=conv(3, 8), c=conv(8, 40), d=conv(8, 2))
    found = group_norms(group_of(net, image(), "a"), net)
    expected = sum_of(norms(net.a.weight, 0), norms(net.c.weight, 1), norms(net.d.weight, 1))
    torch.testing.assert_close(found, expected)


def test_batchnorm_and_depthwise_convolutions_have_a_say() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 16, groups=8), conv(16, 2)).eval()
    nn.init.uniform_(net[1].weight, -2, 2)
    group = group_of(net, image(), "0")
    deep = net[3].weight.detach().double().reshape(8, -1).norm(dim=1)
    read = net[4].weight.detach().double().reshape(2, 8, 2, 9).square().sum((0, 2, 3)).sqrt()
    rest = norms(net[0].weight, 0), deep, read
    torch.testing.assert_close(group_norms(group, net), sum_of(*rest, net[1].weight.detach().double().abs()))
    net[1] = nn.BatchNorm2d(8, affine=False)
    torch.testing.assert_close(group_norms(group, net), sum_of(*rest))


def test_a_flattened_channel_takes_several_places_of_its_reader() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    read = net[3].weight.detach().double().reshape(3, 4, 36).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(group_norms(group_of(net, image(), "0"), net), sum_of(norms(net[0].weight, 0), read))


def test_joined_channels_are_read_where_they_lie() -> None:
    net = Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 4), b=conv(3, 6), c=conv(10, 3))
    expected = sum_of(norms(net.b.weight, 0), norms(net.c.weight, 1)[4:])
    torch.testing.assert_close(group_norms(group_of(net, image(), "b"), net), expected)


def test_a_member_of_zeros_has_no_say() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3), nn.ReLU(), conv(3, 2)).eval()
    nn.init.zeros_(net[2].weight)
    order = group_norms(group_of(net, image(), "0"), net).argsort()
    assert torch.equal(order, norms(net[0].weight, 0).argsort())


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_weights_that_cannot_be_ranked_are_named(name: str) -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2)).eval()
    group = group_of(net, image(), "0")
    net.get_submodule(name).weight.data.view(-1)[0] = torch.nan
    with pytest.raises(InvalidDataError, match=f"{name}: the weight holds NaN or Inf"):
        group_norms(group, net)


@pytest.mark.parametrize(
    ("a", "b", "chosen"),
    [(None, None, "BALANCED_L2"), ("BALANCED_L2", "GROUP_L2", "GROUP_L2"), ("GATE_TAYLOR", None, "GATE_TAYLOR"),
     ("GROUP_L2", "GATE_TAYLOR", "GATE_TAYLOR")],
)  # fmt: skip
def test_of_coupled_layers_the_measure_that_looks_at_most_decides(a: str | None, b: str | None, chosen: str) -> None:
    net = Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2))
    plan = plan_of(net, image(), {"a": a, "b": b})
    (group,) = discover(trace(net, image()), plan, net).prunable
    assert measure_of(group, plan) == chosen


def test_a_channel_that_no_layer_reads_goes_first() -> None:
    net = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 2)).eval()
    for channel in (1, 2):
        net[0].weight.data[channel] *= 100  # to the producer's norm they matter most
        net[1].weight.data[channel] = 1e-3
        net[3].weight.data[:, channel] = 0
    removed = {}
    for measure in ("BALANCED_L2", "GROUP_L2"):
        plan = plan_of(net, image(), {"0": measure})
        (record,) = plan_channels(discover(trace(net, image()), plan, net), plan, net)
        removed[measure] = record.producers[0].prune_index
    assert removed == {"BALANCED_L2": (0, 3), "GROUP_L2": (1, 2)}
