"""The recorded forward: what becomes a node, and what the model notices of it."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.models.net_of_function import Net, conv, image
from torch import nn

from amct_ext.errors import InputDataError, ModelError
from amct_ext.graph.trace import trace


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
    kinds = {(value.kind, value.name) for value in trace(net, image()).leaf_values}
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
    assert traits["kept"].quantizable and traits["kept"].sparse_prunable
    assert traits["own"].quantizable  # at the product in its forward
    assert "Own has a forward of its own" in traits["own"].not_sparse_reason


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
    onnx = pytest.importorskip("onnx", reason="graphs are read with onnx: pip install -e .[dev]")
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


@pytest.mark.parametrize("data", [[1], {}, (), None, 3, {"x": image()}])
def test_input_data_without_the_arguments(data):
    with pytest.raises(InputDataError):
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


# Against AMCT
