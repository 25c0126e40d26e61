"""Quantised LSTM and GRU: records, export, bad input, torch.compile, the golden run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from support.golden.run import Case
from support.jobs.rnn_job import Job, batch, evaluate, every_kind, optimizer_of, train
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.activation.types import ForwardClips
from amct_ext.record.text import parse_record, read_record


@every_kind
@pytest.mark.parametrize("setting", ["quant", "per_tensor"])
def test_record_holds_both_sides_in_onnx_order(tmp_path: Path, kind: str, setting: str) -> None:
    job = Job(tmp_path, kind, setting)
    model = job.create()
    train(model, range(2))
    evaluate(model)
    (entry,) = [item for item in read_record(str(job.record)).quant if item.key == "rnn"]
    layer = model.rnn
    order = {"LSTM": "iofc", "GRU": "zrn"}[kind]
    rows = dict(zip({"LSTM": "ifco", "GRU": "rzn"}[kind], layer.weight_hh_l0.detach().split(8), strict=True))
    ordered = torch.cat([rows[gate] for gate in order])
    per_row = ordered.abs().amax(1) if setting == "quant" else ordered.abs().max().repeat(len(order))
    torch.testing.assert_close(torch.tensor(entry.scale_r), per_row / 127, rtol=1e-2, atol=0)
    assert len(entry.scale_w) == len(entry.scale_r) == len(entry.offset_w) == len(entry.offset_r)
    assert (entry.scale_h, entry.offset_h) == layer.hidden_quant.factors()
    with torch.no_grad():
        layer.hidden_quant.clip_max.mul_(2)
    with pytest.raises(RuntimeError, match="rnn"):
        amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "m"), job.sample)


@every_kind
@pytest.mark.parametrize("setting", ["quant", "per_tensor", "learned", "int4"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, options: dict[str, Any]
) -> None:
    """The graph agrees with torch up to the states between the steps, which the standard operators keep in float."""
    job = Job(tmp_path, kind, setting, **options)
    model = job.create()
    if options.get("batch_first"):
        model.train()(job.sample)  # calibrates
    else:
        train(model, range(2))
    expected = evaluate(model, job.sample)
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "m"), job.sample)
    session = onnxruntime.InferenceSession(str(tmp_path / "m_fake_quant_model.onnx"))
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: job.sample.numpy()})[0])
    assert (out - expected).abs().max() < 0.03
    # A recurrence that leaves its states alone agrees: they are all that differs, but for the rounding of biases.
    layer = model.rnn
    monkeypatch.setattr(layer.hidden_quant, "quantize_step", _left_alone(layer.hidden_quant))
    difference = (out - evaluate(model, job.sample)).abs()
    assert difference.max() < 5e-3  # one step of the classifier's input, where a value lies on a rounding tie
    assert setting == "int4" or (difference > 1e-4).float().mean() < 0.3
    record = read_record(str(job.record))

    deploy = onnx.load(tmp_path / "m_deploy_model.onnx").graph
    node = next(node for node in deploy.node if node.name == "rnn")
    assert node.op_type == f"Basic{kind}InplaceFillWindowCache"
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert found["hidden_size"] == 8 and found["quant_dtype"] == 2 and found["clip"] == -1.0
    assert found["quant_sqrt_mode_x"] == found["quant_sqrt_mode_h"] == 0
    (entry,) = [item for item in record.quant if item.key == "rnn"]
    assert found["quant_scale_x"] == np.float32(1) / np.float32(entry.scale_d)
    assert found["quant_offset_x"] == entry.offset_d
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in deploy.initializer}
    states = 2 if kind == "LSTM" else 1
    assert len(node.input) == 7 + states and list(node.input[4 + states : 6 + states]) == ["", ""]
    assert tensors[node.input[1]].dtype == tensors[node.input[2]].dtype == np.int8
    gates = 4 if kind == "LSTM" else 3
    assert tensors[node.input[1]].shape == (1, 8 * gates, 3 if setting == "int4" else 6)
    words = tensors[node.input[-1]]
    assert words.dtype == np.uint64 and len(words) == 2 * gates * (1 if setting == "per_tensor" else 8)
    first = np.float32(entry.scale_w[0]) * np.float32(entry.scale_d)
    assert words[0] == first.view(np.uint32)
    if options.get("bias", True):
        bias = tensors[node.input[3 + states]]
        assert bias.dtype == np.int32 and bias.shape == (1, 16 * gates)
    else:
        assert node.input[3 + states] == ""


def _left_alone(quantizer: nn.Module) -> Any:
    def step(state: Tensor, clips: ForwardClips, steps: list[tuple[Tensor, ...]]) -> Tensor:
        steps.append(quantizer._quantize(state, clips))
        return state

    return step


@every_kind
def test_bad_input(tmp_path: Path, kind: str) -> None:
    model = Job(tmp_path, kind).create()
    x = batch(0)[0]
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:3, 1]])
    wrong = torch.zeros(1, 3, 8)
    for bad, state in (
        (x[:, 0], None),
        (packed, None),
        (x[:0], None),
        (x, (wrong, wrong) if kind == "LSTM" else wrong),
    ):
        with pytest.raises(ValueError, match="'rnn'"):
            model.rnn(bad, state)
    model(x)
    amct_ext.configure(model, validation="eager")
    state = torch.full((1, 4, 8), float("nan"))
    with pytest.raises(RuntimeError, match="'rnn'"):
        model(x, (state, state) if kind == "LSTM" else state)


@every_kind
@pytest.mark.parametrize("setting", ["quant", "learned"])
def test_compiled_model_agrees(tmp_path: Path, kind: str, setting: str) -> None:
    job = Job(tmp_path, kind, setting)
    eager = job.create()
    train(eager, range(1))
    other = job.restore(eager.state_dict())
    train(eager, range(1, 4))
    with torch._dynamo.config.patch(allow_rnn=True):  # torch asks for this at any nn.LSTM or nn.GRU
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        train(compiled, range(1, 4), optimizer_of(other))
    for (key, a), b in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["gru_quant", "gru_cwfalse", "lstm_quant"])
def test_whole_golden_run_while_the_weights_stand_still(golden: Path, tmp_path: Path, name: str) -> None:
    """With frozen weights, as AMCT leaves them, all its numbers bind: losses, clips, evaluation, record."""
    case = Case(golden, name, tmp_path)
    for weight in (case.created.rnn.weight_ih_l0, case.created.rnn.weight_hh_l0):
        weight.requires_grad_(False)
    results = case.golden_results
    torch.testing.assert_close(case.eval_out, results["eval_out"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(case.losses), torch.tensor(results["losses"]), rtol=1e-5, atol=1e-6)
    for key, stacked in results["per_step"].items():
        if not key.endswith(("cur_batch", "quant_layer_num")):
            ours = torch.stack([state[key] for state in case.per_step])
            torch.testing.assert_close(ours, stacked, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    ours, theirs = parse_record(case.record_after_eval), parse_record(case.load.record(name, "after_eval"))
    for a, b in zip(ours.quant, theirs.quant, strict=True):
        assert (a.key, a.offset_d, a.offset_h, a.offset_w, a.offset_r) == (
            b.key, b.offset_d, b.offset_h, b.offset_w, b.offset_r
        )  # fmt: skip
        for field in ("scale_d", "scale_w", "scale_h", "scale_r"):
            mine, other = (torch.tensor(getattr(entry, field) or 0.0) for entry in (a, b))
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=0)
