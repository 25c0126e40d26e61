"""Weights and biases that something computes: parametrisations, properties, torch's own pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils as utils
from support.checks.onnx_run import run_onnx
from support.jobs.any_job import AnyJob, off
from support.jobs.linear_job import Change, Job, X, build, close, train
from support.models import small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import amct_ext
from amct_ext.errors import ModelError

COMPUTED: dict[str, tuple[Change, str]] = {
    "parametrised": (parametrizations.spectral_norm, "weight"),
    "weight norm": (parametrizations.weight_norm, "weight"),
    "bias": (lambda layer: utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()), "bias"),
    "old weight norm": (utils.weight_norm, "weight"),
    "old spectral norm": (utils.spectral_norm, "weight"),
    "torch's pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("config", ["quant", "sparse_learned"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_before_create(tmp_path: Path, kind: str, config: str) -> None:
    """The layer stays float with the reason; the caller's model can be copied though its weight has a history."""
    change, name = COMPUTED[kind]
    net = build()
    change(net[0])
    net(X)
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    report = amct_ext.explain(model)
    assert f"its {name} is computed" in report["0"].not_quantised and report["2"].quantised
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    net(X).sum().backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_after_create(tmp_path: Path, kind: str) -> None:
    """It trains and evaluates; save names the layer and what to do, and works after that."""
    change, name = COMPUTED[kind]
    job = Job(tmp_path)
    model = job.create(build())
    train(model)
    change(model[0])
    train(model)
    model.eval()(X)
    with pytest.raises(ModelError, match=rf"'0'.*{name} is computed \(parametrisation"):
        job.save(model)
    if kind == "parametrised":
        utils.parametrize.remove_parametrizations(model[0], "weight")
        train(model)
        want = model.eval()(X)
        assert close(job.save(model), want)


class Centred(nn.Linear):
    """The weight is a property."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.weight_raw = nn.Parameter(self._parameters.pop("weight").detach())

    @property
    def weight(self) -> Tensor:
        return self.weight_raw - self.weight_raw.mean(1, keepdim=True)


class Doubled(nn.Linear):
    """The bias is a property."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.raw = nn.Parameter(self._parameters.pop("bias").detach())

    @property
    def bias(self) -> Tensor:
        return 2 * self.raw


@pytest.mark.parametrize("layer", [Centred, Doubled])
@pytest.mark.parametrize("config", ["quant", "sparse", "filter"])
def test_properties(tmp_path: Path, config: str, layer: Any) -> None:
    net = nn.Sequential(layer(8, 8), nn.ReLU(), *build())
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    assert "is computed (property" in str(amct_ext.explain(model)["0"])
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs() + 0.1


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("config", ["filter", "filter_quant"])
def test_a_computed_batch_norm_keeps_its_channels(tmp_path: Path, parameter: str, config: str) -> None:
    """Its channels cannot be cut out of what computes them; other layers are pruned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    utils.parametrize.register_parametrization(net[1], parameter, Positive())
    job = AnyJob(tmp_path, small.CONFIGS[config])
    x = torch.randn(2, 3, 6, 6)
    model = job.calibrated(net, x)
    report = amct_ext.explain(model)
    assert f"its {parameter} is computed" in report["0"].not_pruned
    assert model[3].out_channels < 8
    seen = model.eval()(x)
    assert off(run_onnx(job.save(model, x)[0], x), seen) < 0.02
