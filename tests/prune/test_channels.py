"""Choice of channels, reasons for keeping them, physical removal, trial and way back, records of a file."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from support.graph_nets import Net, conv
from support.pruning_proof import masked, outputs, plan_for
from torch import nn

from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune
from amct_ext.errors import InvalidDataError, RecordError
from amct_ext.graph.trace import trace
from amct_ext.prune.channels import apply_channels, discover, plan_channels
from amct_ext.prune.selection import importance, least_important, removal_count
from amct_ext.record.types import ChannelRecord, PruneNode


def image(channels=3, batch=2):
    return torch.randn(batch, channels, 6, 6)


def plain():
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 2)]
    return nn.Sequential(*layers).eval()


def planned(model, data, **settings):
    graph = trace(model, data)
    plan = plan_for(graph, model, **settings)
    return graph, plan_channels(discover(graph, plan, model), plan, model)


def why_not(model, data):
    graph = trace(model, data)
    return discover(graph, plan_for(graph, model), model).why_not()


# Choice


@pytest.mark.parametrize(
    ("channels", "ratio", "ascend", "blocks", "count"),
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
def test_removal_count(channels, ratio, ascend, blocks, count):
    assert removal_count(channels, ratio, ascend, blocks) == count


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


# Records


def test_a_record_names_every_node_with_its_own_places():
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
    (gone,) = second.producers[0].prune_index
    assert second.consumers[1].prune_index == (4 + gone,)
    assert second.consumers[2].prune_index == tuple(range(288 + 72 * gone, 288 + 72 * (gone + 1)))


def test_groups_are_written_as_the_reference_writes_them():
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


# Reasons


def reuse(m, x):
    return m.out(m.twice(m.twice(m.a(x))))


@pytest.mark.parametrize(
    ("network", "layer", "reason"),
    [
        (lambda: nn.Sequential(conv(3, 4)), "0", "an output of the model"),
        (lambda: Net(reuse, a=conv(3, 4), twice=conv(4, 4), out=conv(4, 2)), "a", "called 2 times"),
        (lambda: nn.Sequential(conv(3, 4), nn.GroupNorm(2, 4), conv(4, 2)), "0", "native_group_norm"),
        (lambda: nn.Sequential(conv(3, 4), nn.PixelShuffle(2), conv(1, 2)), "0", "pixel_shuffle"),
        (lambda: nn.Sequential(conv(3, 4), nn.Softmax(1), conv(4, 2)), "0", "works along the channels"),
        (lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), conv(4, 2)), "0", "parameter 1.weight"),
        (lambda: nn.Sequential(conv(3, 4), nn.LayerNorm((4, 6, 6)), conv(4, 2)), "0", "normalises over the channels"),
        (lambda: nn.Sequential(conv(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2), conv(4, 2)), "0",
         "cuts or mixes"),
        (lambda: Net(lambda m, x: m.c(m.a(x).unsqueeze(1)), a=conv(3, 4), c=nn.Conv3d(1, 1, 1)), "a",
         "channels of Conv3d inputs are not removed"),
        (lambda: Net(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2)), "a", "a model input, whose"),
        (lambda: Net(lambda m, x: m.b(m.a(x)[:, :2]), a=conv(3, 4), b=conv(2, 2)), "a", "works along the channels"),
        (lambda: Net(lambda m, x: m.b(F.conv2d(m.a(x), m.b.weight)), a=conv(3, 4), b=conv(4, 4)), "a",
         "(convolution), which channel removal cannot follow"),
        (lambda: Net(lambda m, x: m.b(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=conv(3, 4), b=conv(4, 2)), "a",
         "(split) works along"),
        (lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 0))), a=conv(3, 4), b=conv(5, 2)), "a",
         "pads along"),
        (lambda: Net(lambda m, x: m.b(x.mean(1, keepdim=True) * m.a(x).mean(1, keepdim=True)), a=conv(3, 4),
                     b=conv(1, 2)), "a", "works along the channels"),
        (lambda: Net(lambda m, x: m.g(torch.cat([m.a(x), m.b(x)], 1)).mean(), a=conv(3, 4), b=conv(3, 2),
                     g=conv(6, 6, groups=2)), "b", "across joined tensors"),
        (lambda: Net(lambda m, x: m.b(m.a(x)) + m.a.weight.sum(), a=conv(3, 4), b=conv(4, 2)), "a", "a.weight"),
    ],
)  # fmt: skip
def test_channels_that_stay_have_a_reason(network, layer, reason):
    found = why_not(network(), image())
    assert reason in found[layer], found


def test_a_batchnorm_over_tokens_without_statistics_mixes_the_channels():
    net = nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(20, 3))
    assert "1 normalises over the channels" in why_not(net, torch.randn(2, 5, 8))["0"]


def test_layers_with_a_common_weight_stay():
    net = nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3), conv(3, 2))
    net[2].weight = net[0].weight
    assert "shares a parameter with 2" in why_not(net, image())["0"]


def test_a_skipped_layer_keeps_its_channels_and_may_lose_inputs():
    net = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 2)).eval()
    _, records = planned(net, image(), skip=("1",))
    assert [[node.name for node in (*r.producers, *r.consumers)] for r in records] == [["0", "1"]]


# Removal


def test_parameters_keep_what_the_user_set():
    net = plain().to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    net[0].weight.no_decay = True
    graph, records = planned(net, image())
    apply_channels(net, graph, records, image())
    assert isinstance(net[3].weight, nn.Parameter)
    assert net[3].weight.requires_grad
    assert not net[0].weight.requires_grad
    assert net[0].weight.no_decay
    assert net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert {name for name, _ in net.named_parameters()} == {name for name, _ in plain().named_parameters()}
    net(image()).sum().backward()


def test_nothing_is_disturbed_by_the_trial():
    net = plain().train()
    net[1].eval()
    graph, records = planned(net, image())
    statistics, data, random = net[1].running_mean.clone(), image(), torch.get_rng_state()
    (kept, _) = apply_channels(net, graph, records, data)
    stay = [channel for channel in range(8) if channel not in kept.producers[0].prune_index]
    assert torch.equal(net[1].running_mean, statistics[stay])
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not net[1].training
    assert net[1].num_batches_tracked == 0


def test_an_importable_copy_stays_usable():
    net = plain()
    graph, records = planned(net, image())
    apply_channels(net, graph, records, image())
    again = copy.deepcopy(net)
    assert torch.equal(again(torch.ones(1, 3, 6, 6)), net(torch.ones(1, 3, 6, 6)))


def test_a_group_whose_size_is_written_into_the_model_is_dropped(caplog):
    def forward(m, x):
        y = F.relu(m.b(F.relu(m.a(x)))).view(-1, 6 * 36)  # 6 is written down: b cannot shrink
        return m.out(y)

    net = Net(forward, a=conv(3, 8), b=conv(8, 6), out=nn.Linear(216, 2)).eval()
    whole = copy.deepcopy(net)
    data = image()
    graph, records = planned(net, data)
    assert len(records) == 2
    with caplog.at_level(logging.WARNING, "amct_ext"):
        kept = apply_channels(net, graph, records, data)
    assert kept == records[:1]
    assert "b is not pruned: the model would fail" in caplog.text
    assert net.b.out_channels == 6
    assert net.a.out_channels == 5
    torch.testing.assert_close(outputs(net, data), outputs(masked(whole, kept), data))


def test_a_head_that_only_runs_in_training_is_seen():
    def forward(m, x):
        y = F.relu(m.a(x))
        main = m.head(y.mean((2, 3)))
        return (main, m.aux(y.mean((2, 3)))) if m.training else main

    net = Net(forward, a=conv(3, 8), head=nn.Linear(8, 2), aux=nn.Linear(8, 2)).eval()
    graph, records = planned(net, image())
    assert [record.producers[0].name for record in records] == ["a"]
    assert apply_channels(net, graph, records, image()) == ()
    assert net.a.out_channels == 8
    net.train()(image())


def test_outputs_whose_size_depends_on_the_weights_do_not_hinder():
    net = Net(lambda m, x: (lambda y: y[y > 0])(m.b(F.relu(m.a(x)))), a=conv(3, 8), b=conv(8, 4)).eval()
    graph, records = planned(net, image())
    assert apply_channels(net, graph, records, image()) == records
    assert net.a.out_channels == 5


# Records of a file


def change(record: ChannelRecord, side: str, position: int, **fields) -> ChannelRecord:
    nodes = list(getattr(record, side))
    nodes[position] = dataclasses.replace(nodes[position], **fields)
    return dataclasses.replace(record, **{side: tuple(nodes)})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: change(r, "producers", 0, name="conv9"), "no layer conv9"),
        (lambda r: change(r, "consumers", 0, name="conv9"), "no layer conv9"),
        (lambda r: change(r, "producers", 0, end=16), r"8 channels.*0\.\.16"),
        (lambda r: change(r, "producers", 0, type="Gemm"), "type of 0 is Gemm, but it is a Conv2d"),
        (lambda r: change(r, "producers", 0, name="1", type="BatchNormalization"), "only Conv2d and Linear"),
        (lambda r: change(r, "producers", 0, prune_index=(8,)), "8 of 0 lies outside 0..7"),
        (lambda r: change(r, "producers", 0, prune_index=tuple(range(8))), "all its channels"),
        (lambda r: change(r, "consumers", 1, prune_index=(1,)), "that does not fit together"),
        (lambda r: change(r, "consumers", 1, begin=4, end=12), r"8 channels.*4\.\.12"),
        (lambda r: change(r, "consumers", 1, prune_index=(1, 1, 2)), "twice"),
        (lambda r: dataclasses.replace(r, producers=()), "no producer"),
        (lambda r: dataclasses.replace(r, consumers=r.consumers[:1]), "does not fit the model"),
        (lambda r: dataclasses.replace(r, producers=r.producers + r.producers), None),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_and_changes_nothing(broken, message):
    net = plain()
    graph, (first, second) = planned(net, image())
    before = dict(net.named_parameters())
    if message is None:
        records = (first, first)
        message = "producer of prune_record 1 already"
    else:
        records = (second, broken(first))
    with pytest.raises(RecordError, match=rf"prune_record 2.*{message}"):
        apply_channels(net, graph, records, image(), strict=True)
    assert all(value is before[name] for name, value in net.named_parameters())
    assert (net[0].out_channels, net[1].num_features, net[3].in_channels) == (8, 8, 8)


def test_blocks_of_a_file_must_be_equal():
    net = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2)).eval()
    graph, (first, _) = planned(net, image(), ratio=0.5)
    uneven = ChannelRecord(
        tuple(dataclasses.replace(node, prune_index=(0, 1, 2, 4)) for node in first.producers),
        tuple(dataclasses.replace(node, prune_index=(0, 1, 2, 4)) for node in first.consumers),
    )
    with pytest.raises(RecordError, match="4 groups of 1 must lose equally many"):
        apply_channels(net, graph, (uneven,), image(), strict=True)


def test_unknown_adds_and_concats_are_ignored():
    net = plain()
    graph, records = planned(net, image())
    node = PruneNode("Add_8", "Add", 0, 8, prune_index=records[0].producers[0].prune_index)
    odd = dataclasses.replace(records[0], consumers=(node, *records[0].consumers))
    assert apply_channels(net, graph, (odd, records[1]), image(), strict=True) == (odd, records[1])
    assert net[0].out_channels == 5


def test_a_record_replays_to_the_same_model():
    first, second = plain(), plain()
    second.load_state_dict(first.state_dict())
    graph, records = planned(first, image())
    apply_channels(first, graph, records, image())
    apply_channels(second, trace(second, image()), records, image(), strict=True)
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
