"""Compressed models under torch.compile: one graph each for training and evaluation, and nothing else to compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.recompilation import no_recompilation
from support.jobs import rnn_job
from support.models import small
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import amct_ext
from amct_ext.model_surgery import record_factors

X = torch.randn(3, 4, 6, 6)
CONFIGS = ("quant", "learned", "two_batches", "filter_quant", "sparse_refreshed", "sparse_quant", "sparse_learned")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def created(folder: Path, config: str, model: nn.Module | None = None) -> nn.Module:
    folder.mkdir(exist_ok=True)
    (folder / "c.cfg").write_text(small.CONFIGS[config])
    model = net() if model is None else model
    return amct_ext.create_compressed_retrain_model(model, X, str(folder / "c.cfg"), str(folder / "r.txt"))


def calibrated(model: nn.Module, *batches: Tensor) -> nn.Module:
    for x in batches:
        model.train()(x)
    return model


def run(model: Any, x: Tensor, train: bool) -> Tensor:
    model.train(train)
    if not train:
        with torch.no_grad():
            return model(x)
    y = model(x)
    y.square().mean().backward()
    return y.detach()


def compiled_once(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The compiled model and its number of graphs, after a training step and an evaluation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, **options)
    run(compiled, x, True)
    run(compiled, x, False)
    return compiled, counter


def assert_one_graph_each(model: nn.Module, x: Tensor, expected: int = 2, **options: Any) -> None:
    compiled, counter = compiled_once(model, x, **options)
    assert counter.frame_count == expected
    with no_recompilation():
        for train in (True, True, False, False, True, False):
            run(compiled, x, train)
        amct_ext.update_record(model)
        run(compiled, x, False)
        model.load_state_dict(model.state_dict())
        run(compiled, x, False)
    assert counter.frame_count == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_each(name: str, tmp_path: Path) -> None:
    assert_one_graph_each(calibrated(created(tmp_path, name), X, X), X)


@pytest.mark.parametrize("setting", ["quant", "learned"])
@pytest.mark.parametrize("kind", rnn_job.KINDS)
def test_one_graph_each_for_recurrent_layers(kind: str, setting: str, tmp_path: Path) -> None:
    model = rnn_job.Job(tmp_path, kind, setting).create()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_one_graph_each(calibrated(model, rnn_job.batch(0)[0]), rnn_job.batch(1)[0])


@pytest.mark.parametrize("name", ["quant", "learned"])
def test_dynamic_shapes(name: str, tmp_path: Path) -> None:
    """A graph serves every number of samples, and there are as many as of the float model."""
    _, floats = compiled_once(net(), X, dynamic=True)
    model = calibrated(created(tmp_path, name), X)
    assert_one_graph_each(model, X, floats.frame_count, dynamic=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for size in (4, 5, 7):
        run(compiled, torch.randn(size, 4, 6, 6), False)
    assert counter.frame_count == 1


def test_calibration_is_one_more_graph(tmp_path: Path) -> None:
    model, eager = (created(tmp_path / name, "quant") for name in ("compiled", "eager"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(run(compiled, X, True), run(eager, X, True), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
    for (key, a), b in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_copied_in_place_before_the_first_compiled_call(name: str, train: bool, tmp_path: Path) -> None:
    """Nothing is searched anew: whether a calibration is finished is decided on the device, too."""
    source, model = calibrated(created(tmp_path / "a", name), X, X), created(tmp_path / "b", name)
    with torch.no_grad():
        for own, value in zip(model.state_dict().values(), source.state_dict().values(), strict=True):
            own.copy_(value)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, 5 * X, train), run(source, 5 * X, train), rtol=1e-4, atol=1e-4)
    for (key, a), b in zip(model.state_dict().items(), source.state_dict().values(), strict=True):
        if "search_n" in key:  # only looks on where nothing is compiled
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


class Broken(nn.Module):
    """A forward whose graph breaks, so that hooks run where Dynamo compiles what is called next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(2)))
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


@pytest.mark.parametrize("way", ["of the model", "in place", "of the forward"])
def test_recording_is_not_seen_by_dynamo(way: str, tmp_path: Path) -> None:
    model, record = calibrated(created(tmp_path, "quant", Broken()), X), tmp_path / "r.txt"
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = model
    if way == "of the model":
        compiled = torch.compile(model, backend=counter)
    elif way == "in place":
        model.compile(backend=counter)
    else:
        model.forward = torch.compile(model.forward, backend=counter)
    run(compiled, X, True)
    assert "scale_d" not in record.read_text()
    run(compiled, X, False)
    assert counter.frame_count == 4  # either side of the break, twice
    if way != "of the forward":  # hooks run in the graph or between graphs, as Dynamo has it
        amct_ext.update_record(model)
    assert record.read_text().count("scale_d") == 3
    record_factors.check_record(model, record_factors.build_record(model), "r")


def test_a_record_after_compiled_evaluations(tmp_path: Path) -> None:
    """A file cannot be written from one graph: update_record does it, and says what the model is now."""
    model, record = calibrated(created(tmp_path, "quant"), X), tmp_path / "r.txt"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(compiled, X, False)
    amct_ext.update_record(compiled)
    text = record.read_text()
    assert "scale_d" in text
    with pytest.raises(RuntimeError, match="not compiled"):
        amct_ext.shift_bits(compiled)  # graphs do not feed the shift search
    run(model, X, False)
    assert amct_ext.shift_bits(model).keys() and record.read_text() == text
