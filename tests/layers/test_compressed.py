"""Compressed layers: structure, modes, what an evaluation does, other dtypes, torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.layers import classes
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.record.text import read_record


def make(folder: Path, config: str) -> nn.Module:
    return Job(folder, config).create()


def test_structure(tmp_path: Path) -> None:
    """Names, classes and float parameters stay; what is new hangs below; BatchNorm stays where it was."""
    original = small.build()
    model = make(tmp_path, small.CONFIGS["sparse_quant"])
    assert isinstance(model, small.Residual) and isinstance(model.conv1, nn.Conv2d) and isinstance(model.fc, nn.Linear)
    assert type(model.bn1) is nn.BatchNorm2d
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert {n for n, _ in model.conv1.named_children()} == {"sparsity", "weight_quant", "act_quant", "search_n"}
    # Only what is trained is a Parameter.
    new = {n for n, _ in model.named_parameters()} - {n for n, _ in original.named_parameters()}
    assert new and all(n.endswith(("clip_max", "clip_min")) for n in new)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_original_are_kept(tmp_path: Path, training: bool) -> None:
    original = small.build().train(training)
    original.bn1.eval()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    job = Job(tmp_path, small.CONFIGS["mixed_quant"])
    model = amct_ext.create_compressed_retrain_model(original, small.SAMPLE, str(job.config), str(job.record))
    assert all(m.training is training for n, m in model.named_modules() if n != "bn1") and not model.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert not any(isinstance(m, CompressedLayer) for m in original.modules())


def test_first_forward_in_eval_mode_works(tmp_path: Path) -> None:
    """The reference raises there and hangs at the next call."""
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.endswith("weight_quant.scale")}
    out = evaluate(model)
    assert torch.nn.functional.cosine_similarity(out, evaluate(small.build()), dim=1).min() > 0.99
    assert len(read_record(str(job.record)).quant) == 5  # of what was evaluated
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key].nan_to_num(7), value.nan_to_num(7)), key
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    assert len(read_record(str(job.record)).quant) == 5


def test_record_follows_every_evaluation(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    train(model, optimizer_of(model), range(2))
    evaluate(model)
    first = job.record.read_text()
    written = job.record.stat().st_mtime_ns
    evaluate(model)
    assert job.record.stat().st_mtime_ns == written  # not once per evaluation forward
    train(model, optimizer_of(model), range(2, 4))
    assert job.record.read_text() == first  # nor by training
    evaluate(model)
    assert job.record.read_text() != first


def test_a_training_step_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_quant"])  # masks are renewed every second step
    optimizer = optimizer_of(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"file access in a training step: {args}")

    for name in ("builtins.open", "os.open", "io.open", "pathlib.Path.open"):
        monkeypatch.setattr(name, refuse)
    train(model, optimizer, range(3))


def test_no_graph_under_no_grad(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_learned"])
    with torch.no_grad():
        assert model.train()(small.batch(0)[0]).grad_fn is None
    assert model(small.batch(0)[0]).grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["quant", "sparse_learned"])
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """A cast model trains and evaluates; clips, scales and search errors keep their precision."""
    model = make(tmp_path, small.CONFIGS[name]).to(dtype).train()
    assert model.conv1.weight.dtype == dtype
    assert model.conv1.search_n.errors.dtype == torch.float64
    low = {n for n, v in model.state_dict().items() if v.dtype in (torch.bfloat16, torch.float16)}
    assert not [n for n in low if "quant" in n or "search_n" in n]
    optimizer = optimizer_of(model)
    for i in range(2):
        x, y = small.batch(i)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x.to(dtype))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_quant"]).train()
    optimizer = optimizer_of(model)
    for i in range(2):
        x, y = small.batch(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_calibration_under_inference_mode(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["two_batches"])
    with torch.inference_mode():
        for i in range(3):
            model.eval()(small.batch(i)[0])
    train(model, optimizer_of(model), range(2))


def test_circular_padding_is_honoured(tmp_path: Path) -> None:
    """2:4 keeps the padding mode (AMCT pads with zeros); quantisation leaves the layer float and says why."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
            self.b = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    (tmp_path / "c.cfg").write_text(small.CONFIGS["sparse_quant"])
    x = torch.randn(2, 4, 6, 6)
    model = amct_ext.create_compressed_retrain_model(Net(), x, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    assert model.a.weight_quant is None and model.a.sparsity is not None and model.b.weight_quant is not None
    plain = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    expected = nn.functional.conv2d(plain, model.a.masked_weight(), model.a.bias)
    torch.testing.assert_close(model.a(x), expected)


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant", "filter_quant"])
def test_compiled_model_agrees(tmp_path: Path, name: str) -> None:
    """fullgraph, training and evaluation, against the eager model."""
    job = Job(tmp_path, small.CONFIGS[name])
    eager = job.create()
    eager.drop.p = 0.0
    train(eager, optimizer_of(eager), range(1))  # calibrate
    torch.save(eager.state_dict(), tmp_path / "state.pth")
    other = job.restore(tmp_path / "state.pth", None)
    other.drop.p = 0.0
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for model, run in ((eager, eager), (other, compiled)):
        optimizer = optimizer_of(model)
        train(run, optimizer, range(1, 4))
    for (key, a), b in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(evaluate(eager), evaluate(compiled), rtol=1e-4, atol=1e-4)


def test_names_that_compressed_layers_set_are_reserved(tmp_path: Path) -> None:
    """A user's subclass that has such a member stays float."""
    layer = make(tmp_path, small.QUANT).conv1
    assert vars(layer).keys() - vars(nn.Conv2d(1, 1, 1)).keys() - {*layer.added_children} == classes._INSTANCE_NAMES
