"""Bad input to the ONNX export: one clear error, and no file written or changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from amct_ext.export.write import export_float, export_quantized
from amct_ext.record.types import QuantRecord

X = torch.ones(2, 3, 4, 4)


class Net(nn.Module):
    """One layer of each kind that the errors are about."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.idle = nn.Linear(4, 2)
        self.rnn = nn.LSTM(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.bn(self.conv(x))))


def record(key: str = "conv", **fields: Any) -> QuantRecord:
    values: dict[str, Any] = {"scale_d": 0.1, "offset_d": 0, "scale_w": (0.01,), "offset_w": (0,)}
    return QuantRecord(key=key, **{**values, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with older results; whatever the test does to it must leave it as it was."""
    files = {tmp_path / f"m_{kind}_model.onnx": kind.encode() for kind in ("fake_quant", "deploy")}
    for path, content in files.items():
        path.write_bytes(content)
    yield tmp_path
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        ([], RuntimeError, "no quantisation factors"),
        ([record("missing")], RuntimeError, "'missing'"),
        ([record(), record()], RuntimeError, "two entries for layer 'conv'"),
        ([record("bn")], RuntimeError, "'bn' is a BatchNorm2d"),
        ([record("rnn")], RuntimeError, "'rnn': recurrent"),
        ([record(scale_h=0.1)], RuntimeError, "recurrent"),
        ([record("idle")], RuntimeError, "'idle' is in the record, but no"),
        ([record("twice")], RuntimeError, "'twice' runs 2 times"),
        ([record(scale_w=(0.1, 0.1), offset_w=(0, 0))], RuntimeError, "2 weight scales, but it has 4 output channels"),
        ([record(scale_w=())], RuntimeError, "must all be recorded"),
        ([record(act_type="INT6")], RuntimeError, "activation INT6"),
        ([record(dst_type="INT16")], RuntimeError, "weight INT16"),
        ([record(wts_type="INT4")], RuntimeError, "INT4 weights are packed in pairs"),
        ([record(scale_d=1e-6, scale_w=(1e-6,))], RuntimeError, "bias of channel 0 .* does not fit INT32"),
        ([record(scale_d=0.0)], ValueError, "positive and finite"),
        ([record(scale_w=(float("nan"),))], ValueError, "positive and finite"),
        ([record(scale_d=1e-30, scale_w=(1e-30,))], ValueError, "not a positive float32"),
        ([record(offset_d=128)], ValueError, "offset_d 128 is outside"),
        ([record(offset_w=(1,))], ValueError, "symmetrically"),
        ([record(shift_bit=(17,))], ValueError, "shift_bit"),
        ([record(shift_bit=(1, 2))], ValueError, "shift_bit"),
    ],
)
def test_records_that_do_not_fit(folder: Path, records: list[QuantRecord], error: type, message: str) -> None:
    model = Net()
    nn.init.constant_(model.conv.bias, 1.0)
    with pytest.raises(error, match=message):
        export_quantized(model, X, records, {}, f"{folder}/m", write_shift=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"input_names": ["a", "b"]}, "input_names has 2 names"),
        ({"output_names": ["a", "b"]}, "output_names has 2 names"),
        ({"input_names": ["a"], "output_names": ["a"]}, "stand in input_names and in output_names"),
        ({"output_names": ["a", "a"]}, "twice"),
        ({"input_names": "x"}, "must be a list"),
        ({"dynamic_axes": [0]}, "must be a dict"),
        ({"dynamic_axes": {0: [0]}}, "no tensor name"),
        ({"dynamic_axes": {"x": 0}}, "list of int or a dict"),
        ({"dynamic_axes": {"x": ["batch"]}}, "no int axis"),
        ({"dynamic_axes": {"x": {0: 1}}}, "no int axis"),
        ({"dynamic_axes": {"x": {"0": "batch"}}}, "no int axis"),
        ({"dynamic_axes": {"x": [4]}}, r"axis 4 is outside 0..3"),
        ({"dynamic_axes": {"x": [1]}}, "cannot be captured"),
    ],
)
def test_names_and_axes_that_do_not_fit(folder: Path, names: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        export_float(Net(), X, f"{folder}/m", **names)
    with pytest.raises(RuntimeError, match=message):
        export_quantized(Net(), X, [record()], {}, f"{folder}/m", **names)


def test_input_data_and_models_that_cannot_be_captured(folder: Path) -> None:
    class Decomposing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(x).U if bool(x.sum() > 0) else -x

    with pytest.raises(RuntimeError, match="of type int"):
        export_float(Net(), 3, f"{folder}/m")
    with pytest.raises(RuntimeError, match="cannot be captured"):
        export_float(Net(), X[:, :2], f"{folder}/m")
    with pytest.raises(RuntimeError, match=r"(?s)cannot be captured.*nor be traced: .*linalg_svd"):
        export_float(Decomposing(), X, f"{folder}/m")


def test_batchnorm_that_cannot_be_folded(folder: Path) -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="'bn' and 'conv' are no convolution"):
        export_quantized(model, X, [record()], {"bn": "conv"}, f"{folder}/m")
    model.bn.running_var.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"'bn' cannot be folded into the quantised layer 'conv': .*NaN"):
        export_quantized(model, X, [record()], {"conv": "bn"}, f"{folder}/m")
    model.bn.running_var = None
    with pytest.raises(RuntimeError, match="no running statistics"):
        export_quantized(model, X, [record()], {"conv": "bn"}, f"{folder}/m")


def test_weights_that_are_not_finite(folder: Path) -> None:
    model = Net()
    nn.init.constant_(model.conv.weight, float("inf"))
    with pytest.raises(RuntimeError, match="'conv': the weight holds NaN or Inf"):
        export_quantized(model, X, [record()], {}, f"{folder}/m")


def test_save_path_that_cannot_name_a_file(folder: Path) -> None:
    with pytest.raises(ValueError, match="241"):
        export_float(Net(), X, f"{folder}/{'m' * 242}")
