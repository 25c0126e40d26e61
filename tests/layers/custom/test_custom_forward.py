"""Layers with a forward of their own: the product in it is quantised, trained, restored and saved as any other."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from support.checks.onnx_run import run_onnx
from support.models import small
from support.models.custom_forwards import IMAGES, KINDS, CastingLinear, Columns, Net, net_and_input
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.layers import classes

LEARNED = small.QUANT.replace("arq_retrain { }", "ulq_retrain { }")


class Job:
    """Create, train, save and restore in one folder."""

    def __init__(self, folder: Path, text: str = small.QUANT) -> None:
        self.folder = folder
        self.files = str(folder / "job.cfg"), str(folder / "record.txt")
        (folder / "job.cfg").write_text(text)

    def create(self, net: nn.Module, x: Tensor) -> nn.Module:
        return amct_ext.create_compressed_retrain_model(net, x, *self.files)

    def restore(self, net: nn.Module, x: Tensor, model: nn.Module) -> nn.Module:
        torch.save(model.state_dict(), self.folder / "state.pth")
        return amct_ext.restore_compressed_retrain_model(net, x, *self.files, str(self.folder / "state.pth"))

    def save(self, model: nn.Module, x: Tensor) -> tuple[Path, Path]:
        amct_ext.save_compressed_retrain_model(model, self.files[1], str(self.folder / "net"), x)
        return self.folder / "net_fake_quant_model.onnx", self.folder / "net_deploy_model.onnx"


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


def assert_near(seen: Tensor, expected: Tensor) -> None:
    """Equal, but for what single rounding ties do to the few outputs of a small net."""
    off = (seen - expected).abs() / expected.abs().max()
    assert off.median() < 1e-3 and off.max() < 0.05, off


@pytest.mark.parametrize("text", [small.QUANT, LEARNED], ids=["adaptive", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_job(tmp_path: Path, kind: str, text: str) -> None:
    (net, x), job = net_and_input(kind), Job(tmp_path, text)
    model = job.create(net, x)
    report = amct_ext.explain(model)
    assert report["layer"].quantised.startswith("INT8 input, INT8 weight")
    assert isinstance(model.layer, type(net.layer))
    train(model, x)
    assert all(p.grad is not None for p in model.layer.parameters())
    with torch.no_grad():
        expected = model.eval()(x)
    fake_quant, deploy = job.save(model, x)
    assert_near(run_onnx(fake_quant, x), expected)
    graph = onnx.load(deploy).graph
    if kind != "transposed":  # there a pooling stands between
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
    types = {entry.name: entry.data_type for entry in graph.initializer}
    assert types["layer.weight"] == onnx.TensorProto.INT8
    restored = job.restore(net, x, model)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), expected)
    for each in (model, restored):
        train(each, x, 2)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_quantised_where_it_happens(tmp_path: Path, kind: str) -> None:
    """Against the float layer, run with the arguments of torch's function quantised by the layer's clips and ARQ."""
    net, x = net_and_input(kind)
    model = Job(tmp_path).create(net, x)
    train(model, x, 1)
    layer, float_layer = model.eval().layer, copy.deepcopy(net.layer)
    float_layer.load_state_dict({key: layer.state_dict()[key] for key in float_layer.state_dict()})
    taken: list[Tensor] = []
    model.layer.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach().clone()))
    quantizer, per_channel = layer.act_quant, kind in IMAGES

    class Quantised(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
            if name not in ("conv2d", "conv_transpose2d", "linear", "matmul", "addmm") or func is torch.matmul:
                return func(*args, **kwargs)
            operands = [*args, *([kwargs.pop("input"), kwargs.pop("weight")] if "input" in kwargs else [])]
            place = 1 if name == "addmm" else 0
            inner = isinstance(operands[place], nn.Parameter)  # a product of weights
            if inner or (name != "matmul" and operands[place + 1].shape != float_layer.weight.shape):
                return func(*args, **kwargs)
            clips = (quantizer.clip_max, quantizer.clip_min) * 2
            operands[place] = ops.ulq_fake_quantize(operands[place], *clips, 8, quantizer.fixed_min)[0]
            weight = operands[place + 1]
            transposed = name in ("conv_transpose2d", "matmul", "addmm")
            rows = weight.transpose(0, 1) if transposed else weight
            rows = ops.arq_fake_quantize(rows.contiguous(), 8, 0 if per_channel else None)[0]
            operands[place + 1] = rows.transpose(0, 1) if transposed else rows
            return func(*operands, **kwargs)

    with torch.no_grad():
        seen = model(x) if not taken else None
        seen = layer(taken[0])
        with Quantised():
            expected = float_layer.eval()(taken[0])
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_compiled_graphs(tmp_path: Path, kind: str) -> None:
    net, x = net_and_input(kind)
    model = Job(tmp_path).create(net, x)
    train(model, x, 1)
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("kind", ["standardised", "columns"])
def test_autocast_and_half_precision(tmp_path: Path, kind: str) -> None:
    net, x = net_and_input(kind)
    model = Job(tmp_path).create(net, x)
    train(model, x, 1)
    expected = model.eval()(x).detach()
    with torch.autocast("cpu"):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    model.bfloat16()
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
    amct_ext.update_record(model)


def test_a_traced_forward_is_saved(tmp_path: Path) -> None:
    """Where torch.export cannot follow, one forward is traced; the layers' products are the same there."""

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.x = net_and_input("standardised")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.max() > 0 else x

    (net, x), job = (Deciding(), net_and_input("standardised")[1]), Job(tmp_path)
    model = job.create(net, x)
    train(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    assert_near(run_onnx(job.save(model, x)[0], x), expected)


def test_shifts_sensitivity_and_integers(tmp_path: Path) -> None:
    for kind in ("standardised", "columns", "matmul"):
        net, x = net_and_input(kind)
        model = Job(tmp_path).create(net, x)
        train(model, x)
        amct_ext.configure(model, forward="integer")  # of the layers that can
        model.eval()(x)
        assert len(amct_ext.shift_bits(model)["layer"]) == (8 if kind in IMAGES else 1)
        assert amct_ext.forward_choices(model)["layer"] == "float"
        amct_ext.configure(model, forward="float")
        found = {layer.name: layer for layer in amct_ext.sensitivity(model, [x]).layers}
        assert 0 < found["layer"].error < 1 and found["layer"].share > 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('skip_layers: "layer"', "named in skip_layers"),
        ('quant_skip_layers: "layer"', "named in quant_skip_layers"),
        ('quant_skip_types: "Linear"', "its type Linear is named in quant_skip_types"),
    ],
)
def test_the_configuration_leaves_them_out(tmp_path: Path, line: str, reason: str) -> None:
    text = small.QUANT + line + "\n" + ('override_layer_configs { layer_name: "first" retrain_data_quant_config { } }')
    model = Job(tmp_path, text).create(*net_and_input("columns"))
    assert amct_ext.explain(model)["layer"].not_quantised == reason and type(model.layer) is Columns


def test_the_json_flow_lists_them(tmp_path: Path) -> None:
    net, x = net_and_input("columns")
    amct_ext.create_quant_retrain_config(str(tmp_path / "q.json"), net, x)
    model = amct_ext.create_quant_retrain_model(str(tmp_path / "q.json"), net, str(tmp_path / "record.txt"), x)
    train(model, x)
    model.eval()(x)
    arguments = str(tmp_path / "q.json"), model, str(tmp_path / "record.txt"), str(tmp_path / "net"), x
    amct_ext.save_quant_retrain_model(*arguments)
    assert (tmp_path / "net_deploy_model.onnx").is_file()


def test_a_job_begun_with_a_float_layer_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (net, x), job = net_and_input("cast"), Job(tmp_path)
    model = job.create(net, x)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("layer.")}
    torch.save({**state, **{f"layer.{k}": v for k, v in net.layer.state_dict().items()}}, tmp_path / "old.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *job.files, str(tmp_path / "old.pth"))
    assert type(restored.layer) is CastingLinear and "as a float layer" in caplog.text


class InTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if not self.training else x * self.weight.sum()


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight, self.bias)


class Attended(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean(), self.bias)


class Elementwise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.weight).sum(-1)


class Normalising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(self.weight / self.weight.norm())
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (InTraining(8, 8), "something else in training"),
        (Twice(8, 8), "in 2 places"),
        (Attended(8, 8), "from the input"),
        (Elementwise(8, 8), "in no places"),
        (Normalising(8, 8), "writes its weight"),
    ],
    ids=["training", "twice", "attended", "elementwise", "written"],
)
def test_what_cannot_be_quantised_stays_float_and_is_named(tmp_path: Path, layer: nn.Module, reason: str) -> None:
    net, x = Net(layer, image=False), torch.randn(4, 12)
    model = Job(tmp_path).create(net, x)
    report = amct_ext.explain(model)["layer"]
    assert reason in report.not_quantised and report.left_alone and type(model.layer) is type(layer)
    with torch.no_grad():
        train(model, x, 0)


def test_a_layer_type_without_a_class_for_forwards_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new layer type is at first: its subclasses stay float, with the reason."""
    monkeypatch.delitem(classes._CUSTOM, "Linear")
    net, x = net_and_input("cast")
    model = Job(tmp_path).create(net, x)
    reason = amct_ext.explain(model)["layer"].not_quantised
    assert reason == "a Linear with a forward of its own (CastingLinear) has no compressed form"
    assert type(model.layer) is CastingLinear


def test_an_instance_with_a_forward_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net, x = Net(nn.Linear(8, 8), image=False), torch.randn(4, 12)
    net.layer.forward = lambda x: x * 2
    with caplog.at_level(logging.INFO, "amct_ext"):
        model = Job(tmp_path).create(net, x)
    assert "forward of its own" in amct_ext.explain(model)["layer"].not_quantised
