"""Averages of a model, however and whenever they are made, are models of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, evaluate
from support.jobs.state_job import CONFIGS, clips, copied, floats_only, quantizing, steps
from support.models import small
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from amct_ext.layers.weight.sparsity import Sparsity


@pytest.fixture
def job(tmp_path: Path, name: str) -> Job:
    return Job(tmp_path, CONFIGS[name])


def every_entry(average: nn.Module, model: nn.Module) -> None:
    for mine, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.5 * mine + 0.5 * new)


def interpolated(average: nn.Module, model: nn.Module) -> None:
    """As of image trainers: floats interpolated, the rest copied."""
    for mine, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.lerp_(new, 0.5) if mine.is_floating_point() else mine.copy_(new)


@quantizing
@pytest.mark.parametrize("rule", [floats_only, every_entry, interpolated])
def test_an_average_made_before_the_calibration_keeps_its_clips(job: Job, name: str, rule: Callable) -> None:
    model = job.create()
    average = copy.deepcopy(model).eval()
    steps(model, average=lambda: torch.no_grad()(rule)(average, model))
    before = clips(average)
    loud = 10 * small.batch(9)[0]
    with torch.no_grad():
        seen = average(loud)
        assert torch.equal(average(loud), seen)
    for key, value in clips(average).items():  # a forward writes the effective clips back: none has the wrong sign
        right = max(before[key], 0.0) if key.endswith("max") else min(before[key], 0.0)
        assert value == right, key
    # To compare with: the same values, loaded into a model that is told that its calibration is over.
    told = job.create()
    state = {key: value.clone() for key, value in average.state_dict().items()}
    for key, value in state.items():
        if key.endswith(("batches_seen", "initialised")):
            value.fill_(9)
    told.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(told.eval()(loud), seen)


@quantizing
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_update_throughout_a_calibration(job: Job, name: str, use_buffers: bool) -> None:
    model = job.create()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    steps(model, average=lambda: average.update_parameters(model))
    before = clips(average.module)
    evaluate(average.module)
    assert {k: v for k, v in clips(average.module).items() if "max" in k} == {
        k: v for k, v in before.items() if "max" in k
    }


def test_an_average_over_masks_stays_two_of_four(tmp_path: Path) -> None:
    """The average of two masks, written into a bool, is their union."""
    model = Job(tmp_path, small.CONFIGS["sparse_refreshed"]).create()
    average = copy.deepcopy(model)
    for layer in (m for m in model.modules() if isinstance(m, Sparsity)):
        layer.mask.logical_not_()
    with torch.no_grad():
        every_entry(average, model)
    assert all(m.mask.all() for m in average.modules() if isinstance(m, Sparsity) and m.mask.shape[1] % 4 == 0)
    evaluate(average)
    for key, mask in average.state_dict().items():
        if key.endswith("sparsity.mask") and mask.shape[1] % 4 == 0:
            rows = mask.movedim(1, -1).reshape(-1, 4)
            assert rows.sum(1).max() == 2, key


@pytest.mark.parametrize("name", ["learned", "two_batches_learned"])
def test_an_average_over_parameters_alone_keeps_learned_scales(job: Job, name: str) -> None:
    model = job.create()
    average = copy.deepcopy(model).eval()

    def lerp() -> None:
        for mine, new in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(new.data, 0.5)

    steps(model, average=lerp)
    with torch.no_grad():  # what it is compared with has the flags, too
        told = copied(model, job.create()).eval()
        for mine, new in zip(told.parameters(), average.parameters(), strict=True):
            mine.copy_(new)
        norms = [m for m in average.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for mine, new in zip([m for m in told.modules() if isinstance(m, type(norms[0]))], norms, strict=True):
            mine.load_state_dict(new.state_dict())
        assert torch.equal(evaluate(average), evaluate(told))
    before = {key: value.clone() for key, value in average.state_dict().items() if key.endswith("weight_quant.scale")}
    average.train()(small.batch(0)[0])
    assert all(torch.equal(average.state_dict()[key], value) for key, value in before.items())
