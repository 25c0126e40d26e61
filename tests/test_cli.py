"""The command line: what each command shows, and that bad files end with status 1 and one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_models as small
import torch
from test_restore import Job, evaluate, optimizer_of, train
from typer.testing import CliRunner

import amct_ext
from amct_ext.cli import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path, "write_shift_bit: true\n" + small.CONFIGS["mixed_quant"])
    model = job.create()
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    torch.save(amct_ext.to_amct_state_dict(model), tmp_path / "amct.pth")
    return job


def test_info_and_targets() -> None:
    assert "simd" in run("info")[1]
    code, text = run("targets")
    assert code == 0
    assert "Atlas A2" in text


def test_validate(job: Job) -> None:
    assert run("validate", job.config) == (0, f"{job.config}: valid\n")
    code, text = run("validate", job.config, "--target", "950PR")
    assert code == 0
    assert "2:4" in text
    job.config.write_text("batch_numm: 1\n")
    code, text = run("validate", job.config)
    assert code == 1
    assert "batch_numm" in text


def test_inspect(job: Job) -> None:
    code, text = run("inspect", job.record)
    assert code == 0
    for word in ("stem", "scale_w", "channel groups", "2:4 sparsity", "fc", "INT8/INT8"):
        assert word in text
    job.record.write_text("record { key: 'a'")
    code, text = run("inspect", job.record)
    assert code == 1
    assert "record.txt" in text


def test_checkpoint(job: Job) -> None:
    code, text = run("checkpoint", job.folder / "ours.pth", "--state-dict-name", "model")
    assert code == 0
    assert "native names" in text
    assert "AMCT names" in run("checkpoint", job.folder / "amct.pth")[1]
    code, text = run("checkpoint", job.folder / "ours.pth", "--state-dict-name", "other")
    assert code == 1
    assert "other" in text
