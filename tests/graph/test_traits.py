"""What layers can take, and why they cannot."""

from __future__ import annotations

import pytest
import torch
from support.golden.run import load_module
from support.models.net_of_function import Net, conv, image
from torch import nn
from torch.nn.utils import parametrizations

from amct_ext.graph.trace import trace


def trait(layer, data, forward=lambda m, x: m.layer(x)):
    net = Net(forward, layer=layer)
    return trace(net, data).traits(net)["layer"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("layer", "data", "reason"),
    [
        (conv(padding_mode="circular"), image(), "padding_mode is 'circular'"),
        (nn.Conv3d(2, 3, 1, dilation=(2, 1, 1)), torch.randn(1, 2, 4, 4, 4), "dilation is 2 in depth"),
        (nn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3), "num_layers is 2"),
        (nn.GRU(3, 4, bidirectional=True), torch.randn(5, 2, 3), "bidirectional is True"),
        (nn.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3), "proj_size is 2"),
        (nn.GRU(3, 4), torch.randn(5, 3), "un-batched"),
        (conv(), torch.randn(3, 6, 6), "un-batched"),
        (parametrizations.weight_norm(nn.Linear(3, 4)), torch.randn(2, 3), "weight is computed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_quantised_say_why(layer, data, reason):
    found = trait(layer, data)
    assert not found.quantizable
    assert reason in found.not_quantizable_reason


def test_pruning_has_its_own_conditions():
    circular = trait(conv(padding_mode="circular"), image())
    assert circular.filter_prunable
    assert circular.sparse_prunable
    depthwise = trait(conv(3, 6, groups=3), image())
    assert not depthwise.filter_prunable
    assert depthwise.sparse_prunable
    assert depthwise.quantizable
    assert trait(conv(1, 6), image(1)).filter_prunable  # AMCT takes it for depthwise
    unbatched = trait(conv(), torch.randn(3, 6, 6))
    assert not unbatched.filter_prunable
    assert not unbatched.sparse_prunable
    deconv = trait(nn.ConvTranspose2d(3, 4, 2), image())
    assert deconv.filter_prunable
    assert not trait(nn.ConvTranspose2d(4, 4, 2, groups=2), image(4)).filter_prunable
    assert deconv.sparse_prunable


@pytest.mark.parametrize(
    ("layer", "data", "even"),
    [
        (nn.Linear(4, 3), torch.randn(2, 4), True),
        (nn.Linear(3, 4), torch.randn(2, 3), False),
        (conv(4, 3), image(4), True),
        (conv(4, 4, groups=2), image(4), False),
        (nn.ConvTranspose2d(4, 3, 2), image(4), True),
        (nn.ConvTranspose2d(3, 4, 2), image(3), False),
        (nn.LSTM(4, 6), torch.randn(5, 2, 4), True),
        (nn.LSTM(4, 5), torch.randn(5, 2, 4), False),
    ],
)
def test_int4_weights_need_even_input_channels_in_one_group(layer, data, even):
    assert trait(layer, data).int4_weights is even


def test_a_layer_tied_to_an_embedding():
    net = Net(lambda m, x: m.head(m.table(x)), table=nn.Embedding(8, 4), head=nn.Linear(4, 8, bias=False))
    net.head.weight = net.table.weight
    traits = trace(net, torch.arange(6).view(2, 3)).traits(net)
    assert list(traits) == ["head"]
    assert traits["head"].not_quantizable_reason == "its weight is shared with table"
    assert not traits["head"].sparse_prunable


def test_recurrent_layers_with_a_common_weight():
    first, second = nn.GRU(4, 4), nn.GRU(4, 4)
    second.weight_hh_l0 = first.weight_hh_l0
    net = Net(lambda m, x: m.b(m.a(x)[0])[0], a=first, b=second)
    traits = trace(net, torch.randn(3, 2, 4)).traits(net)
    assert not traits["a"].quantizable
    assert "shared with b" in traits["a"].not_quantizable_reason


def test_reused_shared_and_idle_layers():
    def forward(m, x):
        return m.twin(m.reused(m.reused(x))) + m.other(x)

    layers = {"reused": conv(3, 3), "other": conv(3, 3), "twin": conv(3, 3), "idle": conv(3, 3)}
    layers["twin"].weight = layers["other"].weight
    net = Net(forward, **layers)
    traits = trace(net, image()).traits(net)
    assert list(traits) == ["reused", "other", "twin", "idle"]
    assert "called 2 times" in traits["reused"].not_quantizable_reason
    assert traits["other"].not_quantizable_reason == "its weight is shared with twin"
    assert traits["other"].filter_prunable
    assert "not called" in traits["idle"].not_quantizable_reason
    assert traits["reused"].filter_prunable
    assert not traits["idle"].sparse_prunable


def test_attention_projections_that_no_module_call_reaches_say_so():
    net = Net(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(8, 2, batch_first=True))
    traits = trace(net, torch.randn(2, 5, 8)).traits(net)
    assert traits["mha.out_proj"].type == "Linear"
    assert "not called" in traits["mha.out_proj"].not_quantizable_reason


def test_the_fast_path_of_a_transformer_layer_hides_no_layer():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    assert {"0.linear1", "0.linear2"} <= set(trace(net, torch.randn(2, 5, 8)).calls)


# Pairs and groups


def test_eligible_layers_are_those_that_amct_wrapped(golden):
    load, models = load_module(golden / "load.py"), load_module(golden / "models.py")
    checked = 0
    for case in load.cases():
        facts = load.facts(case)
        if not case.endswith("_quant") or "filter" in case or "prune" in case or facts["status"] != "ok":
            continue
        model, _ = models.build(facts["model"])
        graph = trace(model, load.data(case)["sample_x"])
        wrapped = {n for n, t in facts["module_types"].items() if t in ("RetrainQuant", "RNNRetrainQuant")}
        assert {n for n, t in graph.traits(model).items() if t.quantizable} == wrapped, case
        merged = {n for n, t in facts["module_types"].items() if t == "Identity"}
        assert set(graph.conv_bn().values()) == merged, case
        if "24" not in case:  # 2:4 in the same flow switches sharing off there
            shared = {frozenset((a.rpartition(".")[0], b.rpartition(".")[0])) for a, b in facts["reuse"].items()}
            groups = [set(group) for group in graph.shared_inputs()]
            assert all(any(pair <= group for group in groups) for pair in shared), case
            assert sum(len(group) - 1 for group in groups) == len(shared), case
        checked += 1
    assert checked >= 10
