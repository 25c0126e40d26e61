"""Layers that are not called: a module above them passes their weights to functions, and the products are quantised."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from support.checks.onnx_run import run_onnx
from support.models import small
from support.models.custom_forwards import train
from torch import Tensor, nn

import amct_ext


def attend(x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    q, k, v = F.linear(x, weight, bias).chunk(3, -1)
    return F.linear((q @ k.transpose(-1, -2)).softmax(-1) @ v, out_weight, out_bias)


class Attention(nn.Module):
    """As torchvision's windows: the layers hold weights for a function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv.weight, self.qkv.bias, self.proj.weight, self.proj.bias)


class OtherBias(Attention):
    """The bias of the product is not the layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv.weight, self.qkv.bias * 2, self.proj.weight, self.proj.bias)


class Cut(Attention):
    """A part of a weight is multiplied."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight[:8], self.qkv.bias[:8]) + F.linear(x, self.proj.weight, self.proj.bias)


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.fc = attention, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + self.attention(x))


def create(folder: Path, attention: nn.Module, text: str = small.QUANT) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    (folder / "job.cfg").write_text(text)
    net, x = Net(attention), torch.randn(3, 5, 8)
    files = str(folder / "job.cfg"), str(folder / "record.txt")
    return amct_ext.create_compressed_retrain_model(net, x, *files), net, x


def test_a_whole_job(tmp_path: Path) -> None:
    model, net, x = create(tmp_path, Attention())
    report = amct_ext.explain(model)
    assert report.coverage.weights == {"INT8": 1.0} and isinstance(model.attention, Attention)
    train(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
    amct_ext.save_compressed_retrain_model(model, str(tmp_path / "record.txt"), str(tmp_path / "net"), x)
    off = (run_onnx(tmp_path / "net_fake_quant_model.onnx", x) - expected).abs() / expected.abs().max()
    assert off.median() < 1e-3 and off.max() < 0.05
    entries = onnx.load(tmp_path / "net_deploy_model.onnx").graph.initializer
    assert {entry.name for entry in entries if entry.data_type == onnx.TensorProto.INT8} == {
        "attention.qkv.weight",
        "attention.proj.weight",
        "fc.weight",
    }
    torch.save(model.state_dict(), tmp_path / "state.pth")
    files = str(tmp_path / "job.cfg"), str(tmp_path / "record.txt"), str(tmp_path / "state.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *files)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for other in (restored.eval(), copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected) and isinstance(other.attention, Attention)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    train(model, x)
    train(restored, x)
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), model.eval()(x))


def test_the_products_are_those_of_called_layers(tmp_path: Path) -> None:
    class Calling(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    attention = Attention()
    calling = Calling()
    calling.load_state_dict(attention.state_dict())
    models = [create(tmp_path, each)[0] for each in (attention, calling)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 5, 8)
    for model in models:
        train(model, x)
    with torch.no_grad():
        assert torch.equal(models[0].eval()(x), models[1].eval()(x))
    shares = [{layer.name: layer for layer in amct_ext.sensitivity(model, [x]).layers} for model in models]
    for name in ("attention.qkv", "attention.proj", "fc"):
        assert shares[0][name].share == shares[1][name].share
        assert shares[0][name].error == pytest.approx(shares[1][name].error, rel=1e-3)


def test_what_stays_float(tmp_path: Path) -> None:
    for attention, name, other in ((OtherBias(), "qkv", "proj"), (Cut(), "qkv", "proj")):
        model = create(tmp_path, attention)[0]
        report = amct_ext.explain(model)
        assert "without calling the layer" in report[f"attention.{name}"].not_quantised
        assert report[f"attention.{other}"].quantised and type(model.attention) is not type(attention)
    text = small.QUANT + 'skip_layers: "attention.qkv"\nskip_layers: "attention.proj"\n'
    model = create(tmp_path, Attention(), text)[0]
    assert type(model.attention) is Attention and type(model.attention.qkv) is nn.Linear


def test_a_layer_that_was_exchanged_since(tmp_path: Path) -> None:
    model, _, x = create(tmp_path, Attention())
    model.attention.qkv = nn.Linear(8, 24)
    train(model, x)
