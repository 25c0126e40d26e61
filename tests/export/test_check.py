"""Files that do not load, run or compute what the model computes: not written, or told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.jobs.export_job import Net, X, outputs, trained
from support.models import small
from torch import Tensor

import amct_ext
from amct_ext.errors import ExportError
from amct_ext.export import check, write
from amct_ext.export.check import check_files


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
