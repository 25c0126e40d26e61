"""TorchScript inside a model stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs.linear_job import Job, X, build, close, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import ModelError


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)).relu()


SCRIPTED: dict[str, Callable[[], Any]] = {
    "scripted": lambda: torch.jit.script(Part()),
    "traced": lambda: torch.jit.trace(Part().eval(), X),
    "without parameters": lambda: torch.jit.script(nn.ReLU()),
    "nested": lambda: nn.Sequential(nn.Linear(8, 8), torch.jit.script(Part())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("config", ["quant", "filter_quant"])
@pytest.mark.parametrize("kind", SCRIPTED)
def test_scripted_parts_stay_float(tmp_path: Path, kind: str, config: str) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 8), SCRIPTED[kind](), nn.Linear(8, 8), nn.Linear(8, 4))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    train(model)  # the copy's parameters are leaves
    want = model.eval()(X)
    assert close(job.save(model), want)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(net, X, job.config, job.record, str(tmp_path / "s.pth"))
    assert torch.equal(restored.eval()(X), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_script_function_and_a_scripted_model(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 4), torch.jit.script(rectified)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x)))

    job = Job(tmp_path)
    model = job.create(Net())
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    with pytest.raises(ModelError, match="TorchScript"):
        job.create(torch.jit.script(build()))


def rectified(x: Tensor) -> Tensor:
    return torch.relu(x)
