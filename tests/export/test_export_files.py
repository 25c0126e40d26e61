"""ONNX export: names, dynamic axes, files, and what happens to the caller's model."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from support.models.export_models import PAIRS, Mixed, Tokens, build, nodes, record_all, run, simulate
from torch import nn

from amct_ext.export.files import encode, write_files
from amct_ext.export.write import export_float, export_quantized


def test_dynamic_axes_and_names_reach_both_files(tmp_path: Path) -> None:
    model, x = build(Mixed)
    axes = {"image": {0: "batch"}, "score": [0]}
    arguments = (record_all(model, PAIRS[Mixed]), PAIRS[Mixed], f"{tmp_path}/m", ["image"], ["score"], axes)
    for example in (x, x[:1]):  # a batch of one must not be frozen
        for path in export_quantized(model, example, *arguments):
            graph = onnx.load(path).graph
            assert graph.input[0].name == "image"
            assert graph.output[0].name == "score"
            assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
            assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        expected = simulate(model, x[:3], record_all(model, PAIRS[Mixed]), PAIRS[Mixed])
        np.testing.assert_allclose(run(tmp_path / "m_fake_quant_model.onnx", x[:3]), expected, atol=2e-5)


def test_external_tensors_above_the_size_limit(tmp_path: Path) -> None:
    model, x = build(Mixed)
    small = export_quantized(model, x, record_all(model, PAIRS[Mixed]), PAIRS[Mixed], f"{tmp_path}/small")[0]
    path = tmp_path / "big_fake_quant_model.onnx"
    files = encode(ir.load(small), path, "fakequant", limit=600)
    write_files(files)
    assert "big_stem.weight_fakequant.external" in {file.name for file in files}
    np.testing.assert_array_equal(run(path, x), run(small, x))


def test_external_tensors_of_names_that_a_file_name_cannot_tell_apart(tmp_path: Path) -> None:
    """`a/b` and `a_b` become one name, and so do capital and small letters on some systems."""
    names = ["a/b", "a_b", "A_b", "a:b"]
    x = torch.randn(2, 4)
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    small = export_float(model, x, f"{tmp_path}/small")[0]
    path = tmp_path / "big_fake_quant_model.onnx"
    files = encode(ir.load(small), path, "fakequant", limit=1)
    assert len({file.name.lower() for file in files}) == 1 + 2 * len(names)
    write_files(files)
    np.testing.assert_array_equal(run(path, x), run(small, x))


def test_plain_export_writes_the_float_graph_twice(tmp_path: Path) -> None:
    model, x = build(Mixed)
    fake_quant, deploy = export_float(model, x, f"{tmp_path}/p", ["image"])
    assert fake_quant.read_bytes() == deploy.read_bytes()
    np.testing.assert_allclose(run(deploy, x), model(x).detach().numpy(), atol=1e-5)
    assert {"stem", "/Flatten", "fc"} <= set(nodes(deploy))


def test_files_folders_modes_and_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = build(Tokens)
    monkeypatch.chdir(tmp_path)
    for save_path, name in (("", "deploy_model.onnx"), ("new/deep/", "new/deep/deploy_model.onnx")):
        path = export_float(model, x, save_path)[1]
        assert path.resolve() == tmp_path / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")
    export_float(model, x, "")
    assert any("overwritten" in message for message in caplog.messages)


def test_the_callers_model_is_left_alone(tmp_path: Path) -> None:
    model, x = build(Mixed)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    trained = export_quantized(model, x, record_all(model, PAIRS[Mixed]), PAIRS[Mixed], f"{tmp_path}/t")
    assert all(module.training for module in model.modules())
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = simulate(model.eval(), x, record_all(model, PAIRS[Mixed]), PAIRS[Mixed])
    np.testing.assert_allclose(run(trained[0], x), expected, atol=2e-5)


def test_other_precisions_and_sync_batchnorm_are_exported_as_float32(tmp_path: Path) -> None:
    model, x = build(Mixed)
    records = record_all(model, PAIRS[Mixed])
    expected = simulate(model, x, records, PAIRS[Mixed])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model.double())
    paths = export_quantized(model, x.double(), records, PAIRS[Mixed], f"{tmp_path}/m")
    np.testing.assert_allclose(run(paths[0], x), expected, atol=2e-5)
