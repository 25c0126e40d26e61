"""Who calibrates: training forwards, whichever layer sees the tensor first, or `calibrate`; never an evaluation."""

from __future__ import annotations

import logging
from collections import UserDict
from pathlib import Path

import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.checks.quantizers import quantizers
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.jobs.rnn_job import Job as RnnJob
from support.jobs.rnn_job import every_kind
from support.models import small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import amct_ext
from amct_ext.record.text import read_record

TWO = "batch_num: 2\n"
CONFIGS = {
    "quant": small.QUANT,
    "learned": small.LEARNED,
    "two batches": TWO + small.QUANT,
    "sparse, learned": small.SPARSE % 2 + small.LEARNED,
    "pruned, two batches": TWO + small.FILTER + small.QUANT,
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def job(tmp_path: Path, name: str) -> Job:
    return Job(tmp_path, CONFIGS[name])


@every_config
@pytest.mark.parametrize("forward", ["float", "integer"])
def test_an_evaluation_before_training_keeps_nothing(
    job: Job, name: str, forward: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = job.create(), job.create()
    amct_ext.configure(model, forward=forward)
    amct_ext.configure(twin, forward=forward)
    quiet = 0.01 * small.batch(3)[0]
    model.eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        first = model(quiet)
        assert torch.equal(model(quiet), first)
    assert [record.message for record in caplog.records if "amct_ext.calibrate" in record.message].__len__() == 1
    if "pruned" not in name and "sparse" not in name:
        plain = small.build().eval()(quiet)
        assert (first - plain).abs().max() < 0.1 * plain.abs().max()
    for each in (model, twin):
        train(each, optimizer_of(each), range(3))
    assert_same_state(model, twin)


@pytest.mark.parametrize("forward", ["float", "integer"])
def test_an_evaluation_between_two_batches_keeps_nothing(tmp_path: Path, forward: str) -> None:
    job = Job(tmp_path, CONFIGS["two batches"])
    model, twin = job.create(), job.create()
    quiet = 0.01 * small.batch(3)[0]
    for each in (model, twin):
        amct_ext.configure(each, forward=forward)
        train(each, torch.optim.SGD(each.parameters(), lr=0.0), range(1))
        if each is model:
            with torch.no_grad():
                out, plain = each.eval()(quiet), small.build()
                plain.load_state_dict({k: v for k, v in each.state_dict().items() if k in plain.state_dict()})
                want = plain.eval()(quiet)
            assert (out - want).abs().max() < 0.1 * want.abs().max()
        train(each, torch.optim.SGD(each.parameters(), lr=0.0), range(1, 3))
    assert_same_state(model, twin)


@every_kind
def test_recurrent_layers_are_evaluated_before_training(tmp_path: Path, kind: str) -> None:
    job = RnnJob(tmp_path, kind)
    model, twin = job.create(), job.create()
    with torch.no_grad():
        early, plain = model.eval()(0.01 * job.sample), job.net.eval()(0.01 * job.sample)
    assert (early - plain).abs().max() < 0.1 * plain.abs().max()
    for each in (model, twin):
        each.train()(job.sample)
    assert_same_state(model, twin)


def test_saving_a_model_without_ranges_says_what_to_do(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    with pytest.raises(amct_ext.AmctError, match=r"'stem' and 4 other layer\(s\) are not calibrated.*calibrate\("):
        amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)


@pytest.mark.parametrize("name", ["quant", "learned"])
def test_what_was_only_evaluated_is_saved_as_it_was_evaluated(job: Job, name: str) -> None:
    model = job.create()
    evaluate(model)
    with torch.no_grad():
        want = model(small.SAMPLE)  # the record follows the last evaluation
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(job.folder / "net"), small.SAMPLE)
    out = run_onnx(job.folder / "net_fake_quant_model.onnx", small.SAMPLE)
    assert (out - want).abs().max() < 0.05 * want.abs().max()
    evaluated = read_record(str(job.record)).quant
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    assert read_record(str(job.record)).quant != evaluated


@every_config
def test_calibrate_finds_the_ranges_of_training_forwards(job: Job, name: str) -> None:
    """On a model whose BatchNorm does the same in both modes."""

    def without_batch_statistics(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                module.eval()
        return model

    model, twin = job.create(), job.create()
    batches = [small.batch(i)[0] for i in range(5)]
    weights = {key: value.clone() for key, value in model.state_dict().items() if "quant" not in key}
    amct_ext.calibrate(model.train(), batches)
    assert model.training and model.bn1.training
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
    for batch in batches[: 2 if "two" in name else 1]:
        without_batch_statistics(twin.train())(batch)
    ours, theirs = model.state_dict(), twin.state_dict()
    for key in ours:
        if "clip_" in key or "batches_seen" in key or "initialised" in key:
            assert torch.equal(ours[key], theirs[key]), key
    evaluate(model)
    assert len(read_record(str(job.record)).quant) == 5
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(job.folder / "net"), small.SAMPLE)
    before = {key: value.clone() for key, value in model.state_dict().items() if "clip_" in key}
    amct_ext.calibrate(model, [10 * batches[0]])  # finished already
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), range(1))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, gain: Tensor, second: bool = True) -> Tensor:
        y = self.a(x) * gain
        return self.b(y) if second else y


def test_batches_in_every_form_and_layers_that_they_miss(tmp_path: Path) -> None:
    job = Job(tmp_path, TWO + small.QUANT)
    x, gain = torch.randn(6, 8), torch.tensor(2.0)
    created = amct_ext.create_compressed_retrain_model(Named(), (x, gain), str(job.config), str(job.record))
    with pytest.raises(amct_ext.AmctError, match=r"2 layer\(s\) saw fewer batches .*'a', 'b'; give more"):
        amct_ext.calibrate(created, [(x, gain)])
    with pytest.raises(amct_ext.AmctError, match=r"1 layer\(s\) saw fewer batches .*: 'b';"):
        amct_ext.calibrate(created, [{"x": x, "gain": gain, "second": False}] * 2)
    amct_ext.calibrate(created, iter([(x, {"gain": gain}), {"gain": gain, "x": x}]))
    assert all(q.calibrated for q in quantizers(created)) and not created.amct_ext_session.tracker.calibrating
    with pytest.raises(amct_ext.AmctError, match="was not made by"):
        amct_ext.calibrate(Named(), [x])


@pytest.mark.parametrize("name", ["quant"])
@pytest.mark.parametrize("one", [torch.randn(6, 8), {"x": torch.randn(6, 8)}], ids=["tensor", "mapping"])
def test_one_batch_is_not_taken_for_several(job: Job, one: object) -> None:
    with pytest.raises(TypeError, match=r"give several batches, or \[batch\]"):
        amct_ext.calibrate(job.create(), one)


def test_any_mapping_is_arguments_by_name(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    x, gain = torch.randn(6, 8), torch.tensor(2.0)
    created = amct_ext.create_compressed_retrain_model(Named(), (x, gain), str(job.config), str(job.record))
    amct_ext.calibrate(created, [UserDict(x=x, gain=gain)])
    assert all(q.calibrated for q in quantizers(created))


@pytest.mark.parametrize("name", ["quant", "learned", "two batches"])
@pytest.mark.parametrize("frozen", ["stem", "a", "b", "all"])
def test_parts_in_eval_mode_calibrate_in_training(job: Job, name: str, frozen: str) -> None:
    """A frozen backbone or head; the head may hold the clips that another one uses."""
    model = amct_ext.create_compressed_retrain_model(Branches(), small.SAMPLE, str(job.config), str(job.record))
    model.train()
    for child in model.children() if frozen == "all" else [model.get_submodule(frozen)]:
        child.eval()
    for i in range(2):
        checkpoint(model, small.batch(i)[0].requires_grad_(), use_reentrant=False).sum().backward()
    assert all(q.calibrated for q in quantizers(model))
    evaluate(model)
    assert len(read_record(str(job.record)).quant) == 3


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return (self.a(x) * self.b(x)).mean((2, 3))


def test_a_batch_that_raises_leaves_the_modes(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    model.bn1.eval()
    with pytest.raises(amct_ext.AmctError, match="NaN or Inf"):
        amct_ext.calibrate(model, [small.SAMPLE * float("nan")])
    assert model.training and not model.bn1.training and not any(q.calibrated for q in quantizers(model))
