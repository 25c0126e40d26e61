"""Saving a compressed model: files, agreement of the fake-quant graph with torch, nothing of the model changed."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.model_surgery.lookup import compressed_layers


def trained(folder: Path, config: str) -> tuple[Job, nn.Module]:
    job = Job(folder, config)
    model = job.create()
    train(model, optimizer_of(model), range(3))
    return job, model


def save(model: nn.Module, job: Job, prefix: str = "out/net") -> tuple[Path, Path]:
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(job.folder / prefix), small.SAMPLE)
    return tuple(job.folder / f"{prefix}_{kind}_model.onnx" for kind in ("fake_quant", "deploy"))


@pytest.mark.parametrize("name", list(small.CONFIGS))
def test_saved_graph_equals_evaluation(tmp_path: Path, name: str) -> None:
    job, model = trained(tmp_path, small.CONFIGS[name])
    expected = evaluate(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()  # the mode of the model does not matter
    fake_quant, deploy = save(model, job)
    assert model.training
    assert all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in model.state_dict().items())
    out = run_onnx(fake_quant, small.batch(50)[0])
    # A value on a rounding tie may fall to the other side, which moves single outputs by about a quantisation step.
    assert ((out - expected).abs() > 2e-5).float().mean() <= 0.1
    assert (out - expected).abs().max() < 0.02
    assert stat.S_IMODE(fake_quant.stat().st_mode) == 0o640
    graph = onnx.load(deploy).graph
    kinds = [node.op_type for node in graph.node]
    if "quant" in name or "learned" in name or name == "two_batches":
        assert kinds.count("AscendDequant") == 5
        assert kinds.count("AscendQuant") == (5 if "sparse" in name or "mixed" in name else 4)
        assert sum(i.data_type == onnx.TensorProto.INT8 for i in graph.initializer) == 5
    else:
        assert not any(kind.startswith("Ascend") for kind in kinds)


def test_sparsity_reaches_the_deploy_file(tmp_path: Path) -> None:
    job, model = trained(tmp_path, small.CONFIGS["sparse_quant"])
    evaluate(model)
    weights = [
        onnx.numpy_helper.to_array(i)
        for i in onnx.load(save(model, job)[1]).graph.initializer
        if i.data_type == onnx.TensorProto.INT8 and i.dims[:2] == [16, 16]
    ]
    assert len(weights) == 1
    groups = np.moveaxis(weights[0], 1, -1).reshape(-1, 4)
    assert ((groups != 0).sum(1) <= 2).all()


def test_restored_model_saves_without_an_evaluation(tmp_path: Path) -> None:
    """Record and checkpoint of one moment belong together: a fresh process can restore and save."""
    job, model = trained(tmp_path, small.CONFIGS["filter_quant"])
    evaluate(model)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    first = [path.read_bytes() for path in save(model, job)]
    again = [path.read_bytes() for path in save(job.restore(tmp_path / "state.pth", None), job, "again/net")]
    assert first == again


def test_int4_weights_of_a_layer_that_pruning_made_odd(tmp_path: Path) -> None:
    """Packing needs an even number of input channels; AMCT finds out only when it saves."""
    int4 = small.QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }")
    job, model = trained(tmp_path, small.FILTER.replace("0.3", "0.2") + int4)
    bits = {name: layer.weight_quant.num_bits for name, layer in compressed_layers(model)}
    odd = {name for name in bits if model.get_submodule(name).weight.shape[1] % 2}
    assert odd - {"stem"}
    assert all(bits[name] == (8 if name in odd else 4) for name in bits)
    expected = evaluate(model)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    save(model, job)
    assert torch.equal(evaluate(job.restore(tmp_path / "state.pth", None)), expected)


@pytest.mark.parametrize("asked", [False, True])
def test_shift_in_the_deploy_file_only_when_asked(tmp_path: Path, asked: bool) -> None:
    job, model = trained(tmp_path, ("write_shift_bit: true\n" if asked else "") + small.QUANT)
    evaluate(model)
    _, deploy = save(model, job)
    words = [
        onnx.numpy_helper.to_array(i)
        for i in onnx.load(deploy).graph.initializer
        if i.data_type == onnx.TensorProto.UINT64
    ]
    shifts = np.concatenate([word.ravel() >> np.uint64(32) for word in words])
    expected = np.concatenate([np.array(n) for n in amct_ext.shift_bits(model).values()])
    assert sorted(shifts.tolist()) == sorted(expected.tolist() if asked else [0] * len(expected))


def test_names_and_dynamic_axes(tmp_path: Path) -> None:
    job, model = trained(tmp_path, small.QUANT)
    evaluate(model)
    amct_ext.save_compressed_retrain_model(
        model, str(job.record), str(tmp_path / "net"), small.SAMPLE, ["image"], ["score"], {"image": {0: "batch"}}
    )
    path = tmp_path / "net_fake_quant_model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"]
    assert [o.name for o in session.get_outputs()] == ["score"]
    assert session.run(None, {"image": np.zeros((7, 3, 12, 12), np.float32)})[0].shape == (7, 5)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_inputs_of_two_to_four_dimensions(tmp_path: Path, shape: tuple[int, ...], bias: bool) -> None:
    (tmp_path / "c.cfg").write_text(small.LEARNED)
    files = str(tmp_path / "c.cfg"), str(tmp_path / "record.txt")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4, bias=bias)), torch.randn(shape)
    model = amct_ext.create_compressed_retrain_model(net, x, *files).train()
    optimizer = optimizer_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(x)
    assert expected.shape == (*shape[:-1], 4)
    torch.save(model.state_dict(), tmp_path / "state.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, x, *files, str(tmp_path / "state.pth"))
    with torch.no_grad():
        assert torch.equal(restored.eval()(x), expected)
    amct_ext.save_compressed_retrain_model(restored, files[1], str(tmp_path / "net"), x)
    out = run_onnx(tmp_path / "net_fake_quant_model.onnx", x)
    assert ((out - expected).abs() > 2e-5).float().mean() <= 0.1
