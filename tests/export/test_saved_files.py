"""Files are float32, and hold every output of the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.jobs.export_job import Net, X, outputs, trained
from support.models import small
from torch import Tensor, nn

import amct_ext

HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.b(torch.relu(self.bn(self.a(x))))
            return self.fc((x * torch.sigmoid(x)).mean((2, 3)))


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def types(path: Path) -> set[int]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return {i.data_type for i in graph.initializer} | {v.type.tensor_type.elem_type for v in values}


CONFIGS = {"quant": small.QUANT, "2:4": small.SPARSE % 0, "filter": small.FILTER}
SITUATIONS = {
    "autocast around": (Net, torch.float32, lambda: torch.autocast("cpu", torch.bfloat16), 0.01),
    "autocast inside": (Autocast, torch.float32, contextlib.nullcontext, 0.05),
    "default type float64 at save": (Net, torch.float32, lambda: default(torch.float64), 0.01),
    "default type bfloat16 all along": (Net, torch.bfloat16, lambda: default(torch.bfloat16), 0.05),
    "default type float64 all along": (Net, torch.float64, lambda: default(torch.float64), 0.01),
    "inference mode": (Net, torch.float32, torch.inference_mode, 0.01),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_files_are_float32(situation: str, config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, dtype, around, bound = SITUATIONS[situation]
    x = X.to(dtype)
    with default(dtype):
        model, record = trained(tmp_path, kind(), CONFIGS[config], x)
        with torch.no_grad():
            expected = model(x).float()
    with around():
        amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", x)
    assert torch.get_default_dtype() == torch.float32
    for name in ("m_fake_quant_model.onnx", "m_deploy_model.onnx"):
        assert not types(tmp_path / name) & HALF
    out = outputs(tmp_path)[0]
    assert (out - expected).norm() <= bound * expected.norm()
    assert not [r for r in caplog.records if "is not what" in r.message]


@dataclasses.dataclass
class Pair:
    logits: Tensor
    hidden: Tensor
    count: int = 3


RETURNS = {
    "dict": lambda y, h: {"n": 3, "y": y, "f": 1.5, "text": "s", "flag": True, "none": None, "h": h},
    "tuple": lambda y, h: (1, y, None, "s", h, 2.0),
    "nested": lambda y, h: {"a": [y, {"b": (h, 3)}], "c": ()},
    "dataclass": Pair,
    "list": lambda y, h: [y, 5, h],
    "ordered": lambda y, h: OrderedDict(z=y, a=h, q=7),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_the_tensors_of_an_output_are_written(kind: str, tmp_path: Path) -> None:
    class Returns(Net):
        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            return RETURNS[kind](self.b(torch.relu(self.bn(h))), h)

    model, record = trained(tmp_path, Returns(), small.QUANT if kind == "dict" else small.SPARSE % 0)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    with torch.no_grad():
        h = model.a(X)
        wanted = [model.b(torch.relu(model.bn(h))), h]
    for seen, expected in zip(outputs(tmp_path), wanted, strict=True):
        torch.testing.assert_close(seen, expected, atol=0.02, rtol=0)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    class Nothing(Net):
        def forward(self, x: Tensor) -> dict[str, int]:
            self.a(x)
            return {"n": 3}

    with pytest.raises(RuntimeError, match="no tensor"):
        amct_ext.save_prune_retrain_model(Nothing(), f"{tmp_path}/m", X)


def test_only_poolings_become_global_pooling(tmp_path: Path) -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.conv, self.pool = nn.Linear(6, 6), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Any:
            tokens = self.fc(x.flatten(1, 2))
            heads = tokens.unflatten(-1, (2, 3))
            return (
                tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + 1e-6),
                heads.mean((-1, -2), keepdim=True),
                x.mean((2, 3), keepdim=True),
                self.pool(self.conv(x)),
                nn.functional.adaptive_avg_pool1d(x.flatten(2), 1),
            )

    model, record = trained(tmp_path, Means(), small.QUANT)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    for name in ("m_fake_quant_model.onnx", "m_deploy_model.onnx"):
        kinds = [node.op_type for node in onnx.load(tmp_path / name).graph.node]
        assert (kinds.count("GlobalAveragePool"), kinds.count("ReduceMean")) == (2, 3)


class Sum(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(self.a(x)) + t.mean()


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_goes_into_a_float32_model(narrow: torch.dtype, tmp_path: Path) -> None:
    """The files take float32, and are tried with that."""
    x = (X, torch.rand(4).to(narrow))
    model, record = trained(tmp_path, Sum(), small.QUANT, x)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", x)
    assert not types(tmp_path / "m_fake_quant_model.onnx") & HALF


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_half_precision_that_autocast_alone_takes(config: str, tmp_path: Path) -> None:
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        model, record = trained(tmp_path, Net(), config, x)
        amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", x)
        expected = model(x)
    torch.testing.assert_close(outputs(tmp_path, x.float())[0], expected.float(), rtol=0.1, atol=0.02)


class Passes(Net):
    """Returns what it was given, what it holds, and a result twice."""

    def forward(self, x: Tensor) -> Any:
        y = self.fc(self.b(self.a(x)).mean((2, 3)))
        return x, y, self.fc.bias, y, self.bn.running_var


@pytest.mark.parametrize("names", [None, list("pqrst"), ["y"]], ids=["own names", "all names", "one name"])
@pytest.mark.parametrize("config", [small.QUANT, small.FILTER], ids=["quant", "filter"])
def test_outputs_that_nothing_computes(
    config: str, names: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, record = trained(tmp_path, Passes(), config)
    caplog.clear()
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X, output_names=names)
    for seen, wanted in zip(outputs(tmp_path), model(X), strict=True):
        torch.testing.assert_close(seen, wanted, atol=0.02, rtol=0)
    assert "traced" not in caplog.text
    graph = onnx.load(tmp_path / "m_deploy_model.onnx").graph
    assert [v.name for v in graph.output][: len(names or ())] == (names or []) and graph.input[0].name == "x"
