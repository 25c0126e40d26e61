"""The record file follows the model it belongs to, whatever changed it; nobody else's work is lost."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.record.text import read_record


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, small.QUANT)


def trained(job: Job, steps: int = 2) -> nn.Module:
    model = job.create()
    train(model, optimizer_of(model), range(steps))
    return model


def save(model: nn.Module, job: Job) -> None:
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(job.folder / "net"), small.SAMPLE)


# -- every evaluation records the state it saw


def a_weight(model: nn.Module) -> None:
    model.conv2.weight.mul_(1.5)


def a_batchnorm_factor(model: nn.Module) -> None:
    model.bn1.weight.mul_(0.5)


def a_variance(model: nn.Module) -> None:
    model.stem_bn.running_var.mul_(3)


def clips(model: nn.Module) -> None:
    model.fc.act_quant.clip_max.mul_(0.7)


def a_weight_exchanged(model: nn.Module) -> None:
    model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))


def a_batchnorm_exchanged(model: nn.Module) -> None:
    model.bn2 = copy.deepcopy(model.bn2)
    model.bn2.weight.fill_(2.0)


@pytest.mark.parametrize(
    "change", [a_weight, a_batchnorm_factor, a_variance, clips, a_weight_exchanged, a_batchnorm_exchanged]
)
@pytest.mark.parametrize("forward", ["float", "integer"])
def test_after_a_change_by_hand(job: Job, change: Callable[[nn.Module], None], forward: str) -> None:
    model = trained(job)
    amct_ext.configure(model, forward=forward)
    evaluate(model)
    before = job.record.read_text()
    with torch.no_grad():
        change(model)
    with pytest.raises(amct_ext.AmctError, match=r"update_record\(model, '.*record.txt'\)"):
        save(model, job)
    evaluate(model)
    assert job.record.read_text() != before
    save(model, job)


@pytest.mark.parametrize("config", [small.LEARNED, small.SPARSE % 0 + small.QUANT], ids=["learned", "sparse"])
def test_learned_scales_and_masks(tmp_path: Path, config: str) -> None:
    job = Job(tmp_path, config)
    model = trained(job)
    evaluate(model)
    before = job.record.read_text()
    with torch.no_grad():
        if model.conv2.sparsity is None:
            model.conv2.weight_quant.scale.mul_(1.1)
        else:
            model.conv2.sparsity.mask.copy_(~model.conv2.sparsity.mask)
    evaluate(model)
    assert job.record.read_text() != before
    save(model, job)


def test_training_goes_on_in_eval_mode(job: Job) -> None:
    """As with a frozen BatchNorm, or by a loop that never goes back to train mode."""
    model = trained(job)
    optimizer = optimizer_of(model)
    for i in range(3):
        model.eval()
        nn.functional.cross_entropy(model(small.batch(i)[0]), small.batch(i)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluate(model)
    save(model, job)


def test_an_evaluation_of_the_same_state_writes_nothing_anew(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(job)
    evaluate(model)
    monkeypatch.setattr(
        "amct_ext.model_surgery.record_factors.build_record", lambda *_: pytest.fail("factors were made again")
    )
    for _ in range(3):
        evaluate(model)


# -- copies


def test_a_copy_writes_no_file_until_it_is_told_one(job: Job) -> None:
    student = trained(job)
    teacher = copy.deepcopy(student)
    train(teacher, optimizer_of(teacher), range(2, 4))
    evaluate(student)
    written = job.record.read_bytes()
    evaluate(teacher)
    assert job.record.read_bytes() == written
    save(student, job)
    with pytest.raises(amct_ext.AmctError, match="no record file of its own"):
        amct_ext.update_record(teacher)
    own = job.folder / "teacher.txt"
    amct_ext.update_record(teacher, str(own))
    train(teacher, optimizer_of(teacher), range(4, 5))
    evaluate(teacher)  # from here on it keeps its own
    amct_ext.save_compressed_retrain_model(teacher, str(own), str(job.folder / "teacher"), small.SAMPLE)
    assert job.record.read_bytes() == written


def test_a_pickle_goes_on_with_its_file(job: Job) -> None:
    model = pickle.loads(pickle.dumps(trained(job)))
    evaluate(model)
    save(model, job)


def test_update_record_elsewhere_changes_nothing_of_the_models_own(job: Job) -> None:
    model = trained(job)
    amct_ext.update_record(model, str(job.folder / "snapshot.txt"))
    evaluate(model)
    assert job.record.read_text() == (job.folder / "snapshot.txt").read_text()


def test_two_models_on_one_file_are_told(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    one, two = trained(job), trained(job, 3)
    evaluate(one)
    with caplog.at_level(logging.WARNING):
        evaluate(two)
        assert "another model or process" in caplog.text and str(job.record) in caplog.text


# -- create


@pytest.mark.parametrize("config", [small.QUANT, small.SPARSE % 2 + small.QUANT, small.SPARSE % 2], ids=str)
def test_create_keeps_the_record_of_a_finished_run(
    tmp_path: Path, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(tmp_path, config)
    kept = []
    for i in range(3):
        model = trained(job, 2 + i)
        with torch.no_grad():
            model.conv2.weight.add_(torch.randn_like(model.conv2.weight))
        train(model, optimizer_of(model), range(4, 7))
        evaluate(model)
        kept.append(job.record.read_bytes())
    with caplog.at_level(logging.WARNING):
        job.create()
        job.create()  # nothing more to keep
    names = [f"record.txt.bak{number}" for number in ("", 1, 2)]
    assert [(tmp_path / name).read_bytes() for name in names] == kept
    assert sorted(path.name for path in tmp_path.glob("*.bak*")) == names
    assert [r.message for r in caplog.records if "record.txt.bak2" in r.message and str(job.record) in r.message]
    assert not read_record(str(job.record)).quant


def test_a_failed_create_keeps_nothing_and_replaces_nothing(job: Job) -> None:
    job.record.write_text("precious\n")
    job.config.write_text("no configuration")
    with pytest.raises(ValueError):
        job.create()
    assert job.record.read_text() == "precious\n" and not list(job.folder.glob("*.bak*"))
