"""Running statistics of BatchNorm, estimated anew on a pruned model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job
from support.models import small
from torch import Tensor, nn

import amct_ext

BATCHES = [small.batch(i, size=16)[0] for i in range(4)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}


@pytest.mark.parametrize("name", ["filter", "filter_quant", "sparse_learned"])
def test_statistics_are_the_mean_over_the_batches_and_nothing_else_changes(tmp_path: Path, name: str) -> None:
    model = Job(tmp_path, small.CONFIGS[name]).create().train()
    model.bn2.eval()
    rest = {k: v.clone() for k, v in model.state_dict().items() if k not in statistics(model)}
    seen: list[Tensor] = []
    handle = model.stem_bn.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    amct_ext.reestimate_batchnorm(model, iter(BATCHES))
    handle.remove()
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(model.stem_bn.running_mean, means)
    torch.testing.assert_close(model.stem_bn.running_var, variances)
    assert int(model.bn1.num_batches_tracked) == len(BATCHES) and model.bn1.momentum == 0.1
    assert model.training and model.bn1.training and not model.bn2.training
    for key, value in rest.items():
        if not key.endswith("weight_quant.scale"):  # of adaptive ranges: what the last forward used
            assert torch.equal(model.state_dict()[key].nan_to_num(7), value.nan_to_num(7)), key


def test_an_evaluation_of_a_pruned_model_comes_near_its_training_forward(tmp_path: Path) -> None:
    model = Job(tmp_path, small.FILTER.replace("0.3", "0.5")).create()
    model.drop.p = 0.0
    x = BATCHES[0]

    def off() -> float:
        with torch.no_grad():
            evaluated, want = model.eval()(x), model.train()(x)
        return float((evaluated - want).abs().max() / want.abs().max())

    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = off()
    model.load_state_dict(state)  # the training forward above moved the statistics
    amct_ext.reestimate_batchnorm(model, [x])
    assert off() < 0.05 < before


def test_what_fails_leaves_the_old_statistics(tmp_path: Path) -> None:
    model = small.build()
    before = statistics(model)
    with pytest.raises(ValueError, match="no batch"):
        amct_ext.reestimate_batchnorm(model, [])
    with pytest.raises(TypeError, match=r"one Tensor; give several"):
        amct_ext.reestimate_batchnorm(model, BATCHES[0])
    with pytest.raises(RuntimeError):
        amct_ext.reestimate_batchnorm(model, [BATCHES[0], torch.zeros(1, 99)])
    after = statistics(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.bn1.momentum == 0.1 and model.training


def test_a_model_without_statistics_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    amct_ext.reestimate_batchnorm(net, [torch.randn(3, 4)])
    amct_ext.reestimate_batchnorm(net, [{"input": torch.randn(3, 4)}])
