"""The recorded forward: what becomes a node, what the model notices of it, what layers can take."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from golden_run import load_module
from torch import nn
from torch.nn.utils import parametrizations

from amct_ext.errors import InputDataError, ModelError
from amct_ext.graph import trace


class Net(nn.Module):
    """A module from layers and a forward given as a function of (layers, x)."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def image(channels=3, batch=2):
    return torch.randn(batch, channels, 6, 6)


def conv(cin=3, cout=4, **kwargs):
    return nn.Conv2d(cin, cout, 3, padding=1, **kwargs)


def ops(graph):
    return [node.op for node in graph.nodes]


# Nodes and values


def test_layer_calls_are_single_nodes_and_functions_are_ops():
    net = Net(lambda m, x: F.relu(m.bn(m.c(x))).mean((2, 3)), c=conv(), bn=nn.BatchNorm2d(4))
    graph = trace(net, image())
    assert ops(graph) == ["Conv2d", "BatchNorm2d", "relu", "mean"]
    assert [node.module for node in graph.nodes] == ["c", "bn", None, None]
    assert graph.nodes[1].inputs[0] is graph.nodes[0].outputs[0]
    assert graph.nodes[0].inputs[0] is graph.inputs[0]
    assert graph.outputs == (graph.nodes[-1].outputs[0],)


@pytest.mark.parametrize(
    "relu",
    [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, lambda x: F.relu(x).clone()],
    ids=["module", "inplace", "F.relu", "torch.relu", "relu_", "clone"],
)
def test_every_relu_feeds_the_next_layer(relu):
    net = Net(lambda m, x: m.b(relu(m.a(x))), a=conv(), b=conv(4))
    assert trace(net, image()).fed_by_relu("b")


@pytest.mark.parametrize(
    "other",
    [nn.ReLU6(), lambda x: x.clamp(min=0), lambda x: F.max_pool2d(F.relu(x), 2), lambda x: x],
    ids=["relu6", "clamp", "pooled", "nothing"],
)
def test_only_a_relu_counts_as_relu(other):
    net = Net(lambda m, x: m.b(other(m.a(x))), a=conv(), b=conv(4))
    graph = trace(net, image())
    assert not graph.fed_by_relu("b")
    assert not graph.fed_by_relu("a")
    assert not graph.fed_by_relu("nowhere")


def test_ops_that_change_nothing_pass_their_value_on():
    def forward(m, x):
        return m.b(F.dropout(m.a(x).detach().contiguous().clone(), training=m.training).float())

    net = Net(forward, a=conv(), b=conv(4))
    graph = trace(net, image())
    assert graph.calls["b"][0].inputs[0] is graph.calls["a"][0].outputs[0]


def test_in_place_ops_make_new_values_also_for_aliases():
    def forward(m, x):
        y = m.a(x)
        whole, part = y[:], y[:, :2]
        y += 1
        return m.b(y), m.c(whole), m.d(part)

    graph = trace(Net(forward, a=conv(), b=conv(4), c=conv(4), d=conv(2)), image())
    added = next(node for node in graph.nodes if node.op == "add").outputs[0]
    assert graph.calls["b"][0].inputs[0] is added
    assert graph.calls["c"][0].inputs[0].producer.op in ("add", "slice")
    assert graph.calls["d"][0].inputs[0].producer.op == "overwritten_part"


def test_parameters_buffers_and_constants_have_no_producer():
    net = Net(lambda m, x: x * m.scale + m.offset + torch.tensor(2.0), scale=nn.Parameter(torch.ones(3, 1, 1)))
    net.register_buffer("offset", torch.zeros(1))
    kinds = {(value.kind, value.name) for value in trace(net, image()).sources}
    assert {("input", ""), ("parameter", "scale"), ("buffer", "offset")} <= kinds


@dataclass
class Pair:
    first: torch.Tensor
    rest: dict


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: {"y": [y]},
        lambda y: Pair(y, {"more": 1}),
        lambda y: Pair(None, {"y": y}),
    ],
    ids=["tensor", "tuple", "dict", "dataclass", "nested"],
)
def test_outputs_of_any_shape_are_found(wrap):
    graph = trace(Net(lambda m, x: wrap(m.a(x)), a=conv()), image())
    assert graph.outputs == graph.calls["a"][0].outputs


def test_several_inputs_and_tuple_states():
    net = Net(lambda m, x, h, c: m.rnn(x, (h, c))[0], rnn=nn.LSTM(6, 8))
    graph = trace(net, (torch.randn(5, 2, 6), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
    assert graph.calls["rnn"][0].inputs == graph.inputs
    assert len(graph.calls["rnn"][0].outputs) == 3


class Own(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * 2


class Kept(nn.Linear):
    pass


def test_a_subclass_is_its_parent_unless_it_computes_on_its_own():
    net = Net(lambda m, x: m.own(m.kept(x)), kept=Kept(4, 4), own=Own(4, 4))
    graph = trace(net, torch.randn(2, 4))
    assert list(graph.calls) == ["kept"]
    assert "addmm" in ops(graph)
    traits = graph.traits(net)
    assert traits["kept"].type == traits["own"].type == "Linear"
    assert traits["kept"].quantizable
    assert not traits["own"].quantizable
    assert "Own has a forward of its own" in traits["own"].why_not_quantizable


def test_a_part_that_fails_and_is_caught_leaves_no_trace():
    def forward(m, x):
        with contextlib.suppress(RuntimeError):
            m.bad(x)
        return m.a(x) + 1

    graph = trace(Net(forward, bad=conv(5), a=conv()), image())
    assert [node.name for node in graph.nodes] == ["a", "/Add"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = conv(4)

    def forward(self, x):
        return x + self.c(x) + torch.cat([x, self.c(x)], 1)[:, :4]


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(), nn.Sequential(Block(), Block()))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.layer1(x)
        for block in self.blocks:
            x = block(x) + x
        return torch.cat([x, x + x], 1)


def test_names_of_adds_and_concats_are_the_exporters():
    onnx = pytest.importorskip("onnx")
    net, file = Nested().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(net, (image(4),), file, dynamo=False)
        except (TypeError, ImportError, RuntimeError, AttributeError) as error:
            pytest.skip(f"this torch has no TorchScript exporter: {error}")
    exported = [n.name for n in onnx.load_from_string(file.getvalue()).graph.node if n.op_type in ("Add", "Concat")]
    assert [node.name for node in trace(net, image(4)).nodes if node.op in ("add", "cat")] == exported


# The model notices nothing


class Restless(nn.Module):
    """Counts its forwards, replaces a buffer, draws random numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.drop = conv(), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.last = torch.rand(1)
        return self.drop(self.a(x)) + torch.rand(1)


def test_modes_buffers_random_state_and_hooks_come_back():
    net = nn.Sequential(Restless(), nn.BatchNorm2d(4)).train()
    net[1].eval()
    held = dict(net[0].named_buffers())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    data, random = image(), torch.get_rng_state()
    trace(net, data)
    assert [module.training for module in net.modules()] == [True, True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(value is held[name] for name, value in net[0].named_buffers())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_a_failing_forward_leaves_the_model_as_it_was():
    net = nn.Sequential(conv(), conv(5)).train()
    with pytest.raises(InputDataError, match=r"float32\[2, 3, 6, 6\].*expected input"):
        trace(net, image())
    assert net.training
    assert all(module.training and not module._forward_hooks for module in net.modules())


# Bad input


@pytest.mark.parametrize("data", [[torch.zeros(1)], {"x": torch.zeros(1)}, None, 3])
def test_input_data_is_a_tensor_or_a_tuple(data):
    with pytest.raises(InputDataError, match="tensor, or a tuple"):
        trace(nn.Sequential(conv()), data)


def test_wrong_number_of_arguments_names_the_shapes():
    with pytest.raises(InputDataError, match=r"float32\[2, 3, 6, 6\], int64\[1\].*positional"):
        trace(nn.Sequential(conv()), (image(), torch.zeros(1, dtype=torch.long)))


def test_a_single_layer_is_no_model():
    with pytest.raises(ModelError, match="single Linear: wrap it"):
        trace(nn.Linear(3, 3), torch.zeros(1, 3))


def test_lazy_layers_need_a_forward_first():
    with pytest.raises(ModelError, match="run the model once"):
        trace(nn.Sequential(nn.LazyLinear(3)), torch.zeros(1, 3))


# Traits


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
    assert reason in found.why_not_quantizable


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
    assert not deconv.filter_prunable
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
    assert traits["head"].why_not_quantizable == "its weight is shared with table"
    assert not traits["head"].sparse_prunable


def test_reused_shared_and_idle_layers():
    def forward(m, x):
        return m.twin(m.reused(m.reused(x))) + m.other(x)

    layers = {"reused": conv(3, 3), "other": conv(3, 3), "twin": conv(3, 3), "idle": conv(3, 3)}
    layers["twin"].weight = layers["other"].weight
    net = Net(forward, **layers)
    traits = trace(net, image()).traits(net)
    assert list(traits) == ["reused", "other", "twin", "idle"]
    assert "called 2 times" in traits["reused"].why_not_quantizable
    assert traits["other"].why_not_quantizable == "its weight is shared with twin"
    assert traits["other"].filter_prunable
    assert "not called" in traits["idle"].why_not_quantizable
    assert not traits["reused"].filter_prunable
    assert not traits["idle"].sparse_prunable


def test_attention_projections_that_no_module_call_reaches_say_so():
    net = Net(lambda m, x: m.mha(x, x, x)[0], mha=nn.MultiheadAttention(8, 2, batch_first=True))
    traits = trace(net, torch.randn(2, 5, 8)).traits(net)
    assert traits["mha.out_proj"].type == "Linear"
    assert "not called" in traits["mha.out_proj"].why_not_quantizable


def test_the_fast_path_of_a_transformer_layer_hides_no_layer():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    assert {"0.linear1", "0.linear2"} <= set(trace(net, torch.randn(2, 5, 8)).calls)


# Pairs and groups


def test_layers_with_a_common_input_come_in_execution_order():
    def forward(m, x):
        x = m.stem(x)
        return m.early(x.clone()) + m.late(x) + m.alone(x + 1)

    net = Net(forward, stem=conv(), late=conv(4), early=conv(4), alone=conv(4))
    assert trace(net, image()).shared_inputs() == [("early", "late")]


def test_conv_bn_pairs_need_a_reader_and_a_batch_norm_of_their_own():
    def forward(m, x):
        good = m.bn1(m.c1(x))
        read_twice = m.c2(x)
        twice = m.bn3(m.c3(x)) + m.bn3(m.c4(x))
        out = m.c5(x)
        return good + m.bn2(read_twice) + read_twice + twice + m.bn5(out), out

    layers = {f"c{i}": conv() for i in range(1, 6)} | {f"bn{i}": nn.BatchNorm2d(4) for i in (1, 2, 3, 5)}
    assert trace(Net(forward, **layers), image()).conv_bn() == {"c1": "bn1"}


# Against the reference


def test_eligible_layers_are_those_the_reference_wrapped(golden):
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
