"""Calibration over several batches: all values or a histogram, as `configure` says, with a state that is complete."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, optimizer_of, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.errors import CheckpointError, InvalidDataError, StaleStateError
from amct_ext.layers.activation.calibration_data import CalibrationData, ExactValues, ValueHistogram, _parts
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.activation.range_search import RangeSearch

BATCHES = 4


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, f"batch_num: {BATCHES}\n" + small.QUANT)


def quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


def buffers(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(0) if q.calibration.data is None else q.calibration.data for q in quantizers(model)]


def created(job: Job, calibration: str) -> nn.Module:
    model = job.create()
    amct_ext.configure(model, calibration=calibration)
    return model


def test_a_model_starts_exact_and_its_state_is_the_same_throughout(job: Job) -> None:
    """Names and shapes do not tell how far a calibration is, or how it gathers: tools lay files out by them."""
    shapes = {key: value.shape for key, value in job.create().state_dict().items()}
    default, exact, rough = job.create(), created(job, "exact"), created(job, "histogram")
    for model in (default, exact, rough):
        train(model, optimizer_of(model), range(2))
    assert_same_state(default, exact)
    for model in (default, rough):
        assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert all(shape.numel() for shape in shapes.values())
    assert all(x.dtype == torch.float32 for x in buffers(default))


def test_memory_does_not_grow_with_batches(job: Job) -> None:
    exact, rough = created(job, "exact"), created(job, "histogram")
    sizes: dict[str, list[list[int]]] = {"exact": [], "histogram": []}
    for i in range(BATCHES):
        for name, model in (("exact", exact), ("histogram", rough)):
            train(model, optimizer_of(model), range(i, i + 1))
            sizes[name].append([x.nbytes for x in buffers(model)])
    first, *between, last = sizes["histogram"]
    assert all(size == first for size in between) and 0 < max(first) < 4.9 * 2**20
    assert not any(last) and not any(sizes["exact"][-1])
    assert all(b == 2 * a for a, b in zip(sizes["exact"][0], sizes["exact"][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_range_is_within_the_bound_of_the_exact_one(job: Job, dtype: torch.dtype) -> None:
    batches = [(torch.randn(5000) * (i + 1)).relu().to(dtype) for i in range(BATCHES)]
    x = torch.cat(batches).double()
    errors = []
    for calibration in ("exact", "histogram"):
        quantizer = quantizers(created(job, calibration))[0].train()
        for batch in batches:
            quantizer.calibrate(batch)
        assert quantizer.calibrated and torch.equal(quantizer.clip_max.detach(), quantizer.prev_clip_max)
        high, low = quantizer.clip_max.item(), quantizer.clip_min.item()
        errors.append((torch.fake_quantize_per_tensor_affine(x, high / 127, 0, -128, 127) - x).square().mean())
        assert low == pytest.approx(-high * 128 / 127)
    gathered = torch.zeros(0)
    for batch in batches:
        gathered = ValueHistogram().add(gathered, batch.float())
    excess = ops.search_clip_range_histogram(*_parts(gathered))[4]
    assert errors[1] <= errors[0] + excess + 1e-6 * errors[0]


def test_copies_and_pickles_go_on_in_mid_calibration(job: Job) -> None:
    """The data are no state, but a copy or a pickle of the whole model has them."""
    for calibration, steps in (("exact", 1), ("exact", 2), ("histogram", 3)):
        whole = created(job, calibration)
        train(whole, optimizer_of(whole), range(steps))
        others = [copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))]
        for model in (whole, *others):
            train(model, optimizer_of(model), range(steps, BATCHES + 2))
        for model in others:
            assert_same_state(whole, model)


def test_values_gathered_go_on_in_a_histogram(job: Job) -> None:
    """Exact for two batches, a histogram from there on: the same as a histogram from the start."""
    exact, whole = created(job, "exact"), created(job, "histogram")
    for model in (exact, whole):
        train(model, optimizer_of(model), range(2))
    amct_ext.configure(exact, calibration="histogram")
    for model in (whole, exact):
        train(model, optimizer_of(model), range(2, 3))
    assert all(x.dtype == torch.int64 for x in buffers(exact))
    assert_same_state(whole, exact)


def test_a_histogram_cannot_become_exact(job: Job) -> None:
    model = created(job, "histogram")
    train(model, optimizer_of(model), range(1))
    with pytest.raises(StaleStateError, match="layer 'stem': its calibration has begun as a histogram"):
        amct_ext.configure(model, calibration="exact", stash="off")
    assert all(quantizer.stash for quantizer in quantizers(model))
    train(model, optimizer_of(model), range(1, BATCHES))
    amct_ext.configure(model, calibration="exact")
    with pytest.raises(ValueError, match="calibration must be 'exact' or 'histogram', not 'rough'"):
        amct_ext.configure(model, calibration="rough")


def version_0_1(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as version 0.1 wrote it: with what was gathered, and a bool for a scale that has begun."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            data = module.calibration.data
            state[f"{name}.calibration_data"] = torch.zeros(0) if data is None else data.clone()
    return {key: value.bool() if key.endswith("initialised") else value for key, value in state.items()}


@pytest.mark.parametrize("calibration", ["exact", "histogram"])
@pytest.mark.parametrize("steps", [0, 2, BATCHES])
def test_checkpoints_of_version_0_1_load(job: Job, tmp_path: Path, calibration: str, steps: int) -> None:
    whole = created(job, calibration)
    train(whole, optimizer_of(whole), range(steps))
    torch.save(version_0_1(whole), tmp_path / "state.pth")
    restored = job.restore(tmp_path / "state.pth", None)
    amct_ext.configure(restored, calibration=calibration if steps < BATCHES else None)
    for model in (whole, restored):
        train(model, optimizer_of(model), range(steps, BATCHES + 2))
    assert_same_state(whole, restored)


def test_gathered_data_of_another_size_do_not_load(job: Job, tmp_path: Path) -> None:
    model = created(job, "histogram")
    train(model, optimizer_of(model), range(1))
    state = version_0_1(model)
    state["stem.act_quant.calibration_data"] = state["stem.act_quant.calibration_data"][:-1]
    torch.save(state, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=r"stem\.act_quant\.calibration_data .* gathered by another version"):
        job.restore(tmp_path / "state.pth", None)


def test_float64_values_keep_their_type(job: Job) -> None:
    quantizer = quantizers(job.create())[0].train()
    quantizer.calibrate(torch.randn(100, dtype=torch.float64))
    assert quantizer.calibration.data.dtype == torch.float64


@pytest.mark.parametrize("calibration", ["exact", "histogram"])
def test_a_bad_batch_is_not_taken(job: Job, calibration: str) -> None:
    quantizer = quantizers(created(job, calibration))[0].train()
    for _ in range(BATCHES - 1):
        quantizer.calibrate(torch.randn(100))
        before = quantizer.calibration.data.clone()
        with pytest.raises(InvalidDataError, match="NaN or Inf"):
            quantizer.calibrate(torch.tensor([1.0, float("nan")]))
        assert torch.equal(quantizer.calibration.data, before)
    quantizer.calibrate(torch.randn(100))
    assert quantizer.calibrated


def test_a_single_batch_is_searched_as_it_is() -> None:
    x = torch.randn(10_000)
    for way in (ExactValues(), ValueHistogram()):
        calibration = CalibrationData()
        calibration.method = way
        found = calibration.add(x, RangeSearch(8, fixed_min=False), True, "layer")
        assert list(found.clips) == list(ops.search_clip_range(x)[2:])
        assert calibration.data is None
