"""Module names with quotes, keywords and newlines: compressed, restored and saved under their own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.linear_job import Job, X, close, train
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.export.safe_names import make_names_safe

ODD = ("a b", 'a"b', "a'b", "a\nb", "a\\b", "a/b", "class", "a\0b", "日本", "{a}", "%s")


@pytest.mark.parametrize("config", ["quant", "sparse"])
def test_odd_names(tmp_path: Path, config: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = nn.ModuleDict({name: nn.Linear(8, 8) for name in ODD})
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.stack([layer(x) for layer in self.box.values()]).sum(0))

    job = Job(tmp_path, small.CONFIGS[config])
    model = job.create(Net())
    assert all(not amct_ext.explain(model)[f"box.{name}"].left_alone for name in ODD)
    train(model)
    want = model.eval()(X)
    assert close(job.save(model), want)
    torch.save(model.state_dict(), tmp_path / "s.pth")
    restored = amct_ext.restore_compressed_retrain_model(Net(), X, job.config, job.record, str(tmp_path / "s.pth"))
    assert torch.equal(restored.eval()(X), want)


def test_only_names_that_cannot_be_written_are_changed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("plain", "class", "a b")})

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.box.values()]).sum(0)

    program = torch.export.export(Net(), (X,))
    assert list(make_names_safe(program).values()) == ["box.class.weight"]
    assert {"box.plain.weight", "box.a b.weight"} < program.state_dict.keys()
