"""Layers that a model holds beside their place in the module tree: all of it runs and trains the compressed layer."""

from __future__ import annotations

import collections
import copy
import functools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.common.references import copy_model, replace_modules

X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    layer: nn.Module
    number: int


class Helper:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Net(nn.Module):
    """conv -> bn -> relu -> head, put together by ``wire``, which returns what runs them."""

    def __init__(self, wire: Callable[[Any], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.head = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.run = wire(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def chain(steps: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor, steps: Any = steps) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


def named(net: Any) -> Any:
    return lambda x: net.head(net.bn(net.conv(x)).relu())


def second_name(net: Any) -> Any:
    net.body = nn.Sequential(net.conv, net.bn, nn.ReLU(), net.head)
    return net.body


def nested(net: Any) -> Any:
    net.table = {"stages": [(net.conv, {"norm": net.bn}), Pair(net.head, 1)]}
    net.keys = {net.conv: 1}
    table = net.table
    return lambda x: table["stages"][1].layer(table["stages"][0][1]["norm"](table["stages"][0][0](x)).relu())


def partial(net: Any) -> Any:
    return functools.partial(lambda a, b, c, x: c(b(a(x)).relu()), net.conv, net.bn, net.head)


def bound(net: Any) -> Any:
    net.helper = Helper(net.head)
    net.first, net.last = net.conv.__call__, net.helper.__call__
    return functools.partial(lambda net, x: net.last(net.bn(net.first(x)).relu()), net)


def weak(net: Any) -> Any:
    reference = weakref.ref(net.conv)
    return lambda x: net.head(net.bn(reference()(x)).relu())


def proxy(net: Any) -> Any:
    net.parents = [weakref.proxy(net.conv), weakref.proxy(net)]
    return lambda x: net.parents[1].head(net.bn(net.parents[0](x)).relu())


def hooked(net: Any) -> Any:
    """A hook calls the next layer."""
    net.conv.register_forward_hook(lambda module, args, output: net.bn(output))
    return lambda x: net.head(net.conv(x).relu())


def defaults(net: Any) -> Any:
    queue = collections.deque([net.bn, net.head])

    def run(x: Tensor, *, conv: Any = net.conv) -> Tensor:
        return queue[1](queue[0](conv(x)).relu())

    return run


WIRES = {
    "second name": second_name,
    "list": lambda net: chain([net.conv, net.bn, torch.relu, net.head]),
    "tuple": lambda net: chain((net.conv, net.bn, torch.relu, net.head)),
    "nested": nested,
    "partial": partial,
    "bound method": bound,
    "weak reference": weak,
    "weak proxy": proxy,
    "hook": hooked,
    "defaults": defaults,
}


def create(net: nn.Module, config: str, folder: Path) -> nn.Module:
    folder.mkdir()
    (folder / "c.cfg").write_text(config)
    return amct_ext.create_compressed_retrain_model(net, X, str(folder / "c.cfg"), str(folder / "r.txt"))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("config", ["quant", "filter_quant", "sparse_quant"])
@pytest.mark.parametrize("wire", WIRES)
def test_every_reference_is_replaced(tmp_path: Path, wire: str, config: str) -> None:
    """The model is, in every state, that of the layers called by their names; the caller's own stays alone."""
    net, plain = Net(WIRES[wire]), Net(named)
    model, twin = (create(n, small.CONFIGS[config], tmp_path / str(i)) for i, n in enumerate((net, plain)))
    train(model)
    train(twin)
    assert torch.equal(model.eval()(X), twin.eval()(X))
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in twin.state_dict().items())
    assert net.conv.weight.grad is None
    assert isinstance(net.conv, nn.Conv2d) and type(net.conv) is nn.Conv2d


def test_a_list_is_saved_and_restored(tmp_path: Path) -> None:
    """The BatchNorm in the list is folded like the one in the tree."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")
    net = Net(WIRES["list"])
    model = create(net, small.QUANT, tmp_path / "job")
    train(model)
    want = model.eval()(X)
    record = str(tmp_path / "job" / "r.txt")
    amct_ext.save_compressed_retrain_model(model, record, str(tmp_path / "net"), X)
    session = onnxruntime.InferenceSession(str(tmp_path / "net_fake_quant_model.onnx"))
    out = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    assert (torch.from_numpy(out) - want).abs().max() < 0.02 * want.abs().max()
    torch.save(model.state_dict(), tmp_path / "s.pth")
    config = str(tmp_path / "job" / "c.cfg")
    restored = amct_ext.restore_compressed_retrain_model(net, X, config, record, str(tmp_path / "s.pth"))
    assert torch.equal(restored.eval()(X), want)


def test_a_global_layer_is_told_and_left_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept: dict[str, nn.Module] = {}

    class Box:
        pass

    def wire(net: Any) -> Any:
        box = Box()  # an object that a function holds belongs to the program, not to the model
        box.layer = kept["layer"] = net.conv
        return lambda x: net.head(net.bn(box.layer(x)).relu())

    with caplog.at_level(logging.WARNING):
        model = create(Net(wire), small.QUANT, tmp_path / "job")
    assert "'conv'" in caplog.text
    report = amct_ext.explain(model)["conv"]
    assert report.left_alone and "caller's own" in report.not_quantised


@pytest.mark.parametrize("config", ["quant", "sparse_quant"])
def test_a_layer_in_an_array_is_told_and_left_float(
    tmp_path: Path, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    def wire(net: Any) -> Any:
        net.array = np.array([net.conv], dtype=object)
        return lambda x: net.head(net.bn(net.array[0](x)).relu())

    with caplog.at_level(logging.WARNING):
        model = create(Net(wire), small.CONFIGS[config], tmp_path / "job")
    assert "'conv'" in caplog.text and "'head'" not in caplog.text
    report = amct_ext.explain(model)
    assert "followed" in report["conv"].not_quantised and report["head"].quantised
    train(model)
    model.eval()(X)
    amct_ext.save_compressed_retrain_model(model, str(tmp_path / "job" / "r.txt"), str(tmp_path / "net"), X)


@pytest.mark.parametrize("config", ["quant", "filter_quant"])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_hook_makes_of_a_result_is_seen(tmp_path: Path, config: str, in_place: bool) -> None:
    """An activation in a hook stands between convolution and BatchNorm, which is not folded then."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")

    def wire(net: Any) -> Any:
        net.bn.running_var.uniform_(0.5, 2)
        net.bn.running_mean.normal_()
        net.conv.register_forward_hook(lambda module, args, output: output.relu_() if in_place else output.relu())
        return named(net)

    model = create(Net(wire), small.CONFIGS[config], tmp_path / "job")
    train(model)
    want = model.eval()(X)
    amct_ext.save_compressed_retrain_model(model, str(tmp_path / "job" / "r.txt"), str(tmp_path / "net"), X)
    session = onnxruntime.InferenceSession(str(tmp_path / "net_fake_quant_model.onnx"))
    out = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    assert (torch.from_numpy(out) - want).abs().max() < 0.02 * want.abs().max()


def test_a_forward_called_past_the_layer_is_left_float(tmp_path: Path) -> None:
    def wire(net: Any) -> Any:
        net.first = net.conv.forward
        return lambda x: net.head(net.bn(net.first(x)).relu())

    net = Net(wire)
    model = create(net, small.QUANT, tmp_path / "job")
    train(model)
    assert model.conv.weight.grad is not None and net.conv.weight.grad is None
    assert "without calling" in amct_ext.explain(model)["conv"].not_quantised


def test_copies_keep_to_themselves() -> None:
    """Functions that hold no part of the model stay the same objects; a closure that holds itself is no trap."""
    net = Net(named)
    net.plain = lambda x: x + 1
    net.cached = (net.conv.weight * 2).sum()  # no leaf: copy.deepcopy refuses it

    def recursive(count: int) -> Any:
        return net.conv if count == 0 else recursive(count - 1)

    net.recursive = recursive
    twin = copy_model(net)
    assert twin.plain is net.plain
    assert twin.recursive(2) is twin.conv and net.recursive(2) is net.conv
    assert torch.equal(twin.cached, net.cached) and not twin.cached.requires_grad
    new = nn.Conv2d(4, 8, 3)
    assert replace_modules(twin, {twin.conv: new}) is twin
    assert twin.recursive(2) is twin.conv is new
    assert copy.deepcopy(net.eval().bn) is not None


def test_hooks_of_a_folded_batch_norm_stay(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")

    def wire(net: Any) -> Any:
        net.bn.register_forward_hook(lambda module, args, output: output + 3)
        return named(net)

    model = create(Net(wire), small.QUANT, tmp_path / "job")
    train(model)
    want = model.eval()(X)
    amct_ext.save_compressed_retrain_model(model, str(tmp_path / "job" / "r.txt"), str(tmp_path / "net"), X)
    session = onnxruntime.InferenceSession(str(tmp_path / "net_fake_quant_model.onnx"))
    out = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    assert (torch.from_numpy(out) - want).abs().max() < 0.02 * want.abs().max()
