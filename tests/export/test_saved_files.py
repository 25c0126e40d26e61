"""Files are float32, load, and compute what the model computes; those that do not are not written."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support import small_models as small
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import ExportError
from amct_ext.export import check, write
from amct_ext.export.check import check_files

X = torch.randn(4, 4, 6, 6)
HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


class Net(nn.Module):
    """`ones` and `tensor` take the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.b(torch.relu(self.bn(self.a(x))) + torch.ones(8, 1, 1))
        return self.fc(x.mean((2, 3)) * torch.tensor(0.5))


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


def trained(folder: Path, net: nn.Module, config: str, x: Any = X) -> tuple[nn.Module, str]:
    (folder / "c.cfg").write_text(config)
    record = str(folder / "r.txt")
    model = amct_ext.create_compressed_retrain_model(net, x, str(folder / "c.cfg"), record)
    arguments = x if isinstance(x, tuple) else (x,)
    model.train()(*arguments)
    model.eval()(*arguments)
    return model, record


def outputs(folder: Path, x: Tensor = X) -> list[Tensor]:
    session = onnxruntime.InferenceSession(f"{folder}/m_fake_quant_model.onnx")
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


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


def broken(model: ir.Model) -> None:
    """Make a file that the checker takes and no runtime: one type too many."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float64), name=value.name)
            value.dtype = ir.DataType.DOUBLE
            return


@pytest.mark.parametrize("config", [small.QUANT, small.FILTER], ids=["quant", "filter"])
def test_a_file_that_does_not_load_is_not_written(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record = trained(tmp_path, Net(), config)
    before = {tmp_path / f"m_{kind}_model.onnx": b"old" for kind in ("fake_quant", "deploy")}
    for path, content in before.items():
        path.write_bytes(content)
    encode = write.encode

    def breaking(model: ir.Model, *args: Any) -> Any:
        broken(model)
        return encode(model, *args)

    monkeypatch.setattr(write, "encode", breaking)
    with pytest.raises(RuntimeError, match="would not run in onnxruntime"):
        amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    assert {path: path.read_bytes() for path in before} == before


def test_invalid_graphs_are_found_in_both_files_without_a_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = trained(tmp_path, Net(), small.QUANT)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    paths = tmp_path / "m_fake_quant_model.onnx", tmp_path / "m_deploy_model.onnx"
    monkeypatch.setattr(check, "_run", lambda *_: None)
    files = {path: path.read_bytes() for path in paths}
    check_files(files, *paths, [X], None)
    for path in paths:
        graph = onnx.load(path)
        next(node for node in graph.graph.node if node.input).input[0] = "missing"
        with pytest.raises(RuntimeError, match=f"{path.name} would not be valid"):
            check_files({**files, path: graph.SerializeToString()}, *paths, [X], None)


def test_tensors_beside_the_file_are_checked_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = write.encode
    monkeypatch.setattr(write, "encode", lambda model, path, suffix: encode(model, path, suffix, limit=300))
    model, record = trained(tmp_path, Net(), small.QUANT)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    assert list(tmp_path.glob("*.external"))
    torch.testing.assert_close(outputs(tmp_path)[0], model(X), atol=0.02, rtol=0)


def test_numbers_far_from_the_evaluation_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Noise(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 10 * torch.randn(4)

    model, record = trained(tmp_path, Noise(), small.QUANT)
    with caplog.at_level(logging.WARNING):
        amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    assert "output 0 is not what the model computes for input_data: it differs by" in caplog.text
    assert (tmp_path / "m_deploy_model.onnx").exists()


def test_a_graph_that_the_runtime_refuses_is_traced_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, record = trained(tmp_path, Net(), small.QUANT)
    seen: list[str] = []

    def refuse_first(*args: Any) -> None:
        seen.append("checked")
        if len(seen) == 1:
            raise ExportError("refused")

    monkeypatch.setattr(write, "check_files", refuse_first)
    amct_ext.save_compressed_retrain_model(model, record, f"{tmp_path}/m", X)
    torch.testing.assert_close(outputs(tmp_path)[0], model(X), atol=0.02, rtol=0)
    assert len(seen) == 2


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
