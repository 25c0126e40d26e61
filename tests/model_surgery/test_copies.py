"""Averaged copies and several models at once: a compressed model behaves like a plain module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import amct_ext


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("name", ["quant", "sparse_learned", "filter_quant"])
def test_averaged_copy(tmp_path: Path, name: str, use_buffers: bool) -> None:
    """An EMA copy averages its own parameters, leaves the original alone, evaluates and saves."""
    job = Job(tmp_path, small.CONFIGS[name])
    model, twin = job.create(), job.create()
    optimizer, twin_optimizer = optimizer_of(model), optimizer_of(twin)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for i in range(4):
        train(model, optimizer, range(i, i + 1))
        train(twin, twin_optimizer, range(i, i + 1))
        average.update_parameters(model)
    assert_same_state(model, twin)
    assert all(torch.isfinite(p).all() for p in average.parameters())
    assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    assert not torch.equal(average.module.conv1.weight, model.conv1.weight)
    evaluate(model)
    recorded = job.record.read_text()
    out = evaluate(average.module)  # a copy has no record file until it is given one
    assert torch.isfinite(out).all() and job.record.read_text() == recorded
    with pytest.raises(RuntimeError, match="update_record"):
        amct_ext.save_compressed_retrain_model(average.module, str(job.record), str(tmp_path / "ema"), small.SAMPLE)
    own = str(tmp_path / "ema.txt")
    with pytest.raises(RuntimeError, match="no record file of its own"):
        amct_ext.update_record(average.module)
    amct_ext.update_record(average.module, own)
    amct_ext.save_compressed_retrain_model(average.module, own, str(tmp_path / "ema"), small.SAMPLE)
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)


def test_restores_in_any_order(tmp_path: Path) -> None:
    names = ("sparse_quant", "filter_quant", "learned")
    jobs, expected = {}, {}
    for name in names:
        (tmp_path / name).mkdir()
        jobs[name] = Job(tmp_path / name, small.CONFIGS[name])
        model = jobs[name].create()
        train(model, optimizer_of(model), range(2))
        torch.save(model.state_dict(), tmp_path / name / "state.pth")
        expected[name] = evaluate(model)
    for order in (names, names[::-1]):
        models = {name: jobs[name].restore(tmp_path / name / "state.pth", None) for name in order}
        for name in names:
            assert torch.equal(evaluate(models[name]), expected[name])


def test_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    original = small.build()
    original.stem.weight.requires_grad_(False)
    original.fc.requires_grad_(False)
    job = Job(tmp_path, small.CONFIGS["mixed_quant"])
    model = amct_ext.create_compressed_retrain_model(original, small.SAMPLE, str(job.config), str(job.record))
    assert not model.stem.weight.requires_grad
    assert not model.fc.weight.requires_grad
    assert model.conv1.weight.requires_grad
    before = model.fc.weight.clone()
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), range(2))
    assert torch.equal(model.fc.weight, before)


def test_attention_between_two_inputs_is_left_float_with_a_reason(tmp_path: Path) -> None:
    """One parameter holds the projections of both inputs, and the output layer is never called."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.fc = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            other = x.flip(1) * 2
            return self.fc(self.attention(x, other, other, need_weights=False)[0])

    (tmp_path / "c.cfg").write_text(small.QUANT)
    x = torch.randn(2, 5, 16)
    model = amct_ext.create_compressed_retrain_model(Net(), x, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    report = amct_ext.explain(model)
    assert report["fc"].quantised
    assert report["attention.out_proj"].left_alone
    assert report["attention.out_proj"].not_quantised
    assert model(x).shape == (2, 5, 4)
