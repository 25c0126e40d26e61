"""What create and restore log or refuse: coverage, branches merged later, lists of images, pruning without effect."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks.onnx_run import onnx_outputs
from support.checks.rejection import rejected
from support.jobs.any_job import AnyJob, off
from support.jobs.prune_job import Job
from support.models import small
from support.models.merging import Branches
from support.models.net_of_function import Net
from torch import Tensor, nn

import amct_ext
from amct_ext.errors import AmctError, InputDataError

X = torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize(("width", "level"), [(40, logging.INFO), (2, logging.WARNING)])
def test_coverage_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, width: int, level: int) -> None:
    (tmp_path / "job.cfg").write_text(small.QUANT)
    net = Net(lambda net, x: F.linear(net.fc(x), net.u), fc=nn.Linear(4, width), u=nn.Parameter(torch.randn(2, width)))
    net = net if width == 2 else nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 4), net)
    with caplog.at_level(logging.INFO, "amct_ext"):
        amct_ext.create_compressed_retrain_model(
            net, torch.randn(3, 4), str(tmp_path / "job.cfg"), str(tmp_path / "record.txt")
        )
    said = [line for line in caplog.records if "of weights" in line.getMessage()]
    assert [line.levelno for line in said] == [level]


def test_blocks_to_be_merged_are_told_at_create(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Branches(), Branches(), nn.Conv2d(8, 4, 1))
    job = AnyJob(tmp_path, small.QUANT)
    model = job.calibrated(net, X)
    assert caplog.text.count("switch_to_deploy() merges layers") == 1
    assert "'1' and 1 more (Branches)" in caplog.text
    for block in model[1:3]:  # type: ignore[index]
        block.switch_to_deploy()
    seen = model.eval()(X)
    assert off(onnx_outputs(job.save(model, X)[0], X)[0], seen) < 0.02
    caplog.clear()
    for block in net[1:3]:
        block.switch_to_deploy()
    assert amct_ext.explain(job.create(net, X))["1.merged"].quantised
    assert "merges layers" not in caplog.text


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"scores": self.body(image[None]).flatten()} for image in images]


def test_images_one_by_one(tmp_path: Path) -> None:
    images, job = [torch.rand(3, 12, 16), torch.rand(3, 20, 12)], AnyJob(tmp_path, small.QUANT)
    with pytest.raises(InputDataError, match="a list of one item"):
        job.create(Images(), (images,))
    model = job.create(Images(), (images[:1],))
    model.train()(images)
    seen = model.eval()(images[:1])[0]["scores"]
    assert off(onnx_outputs(job.save(model, (images[:1],))[0], images[0])[0], seen) < 0.02
    with pytest.raises(AmctError, match="runs 2 times"):
        job.save(model, (images,))


def mixes(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1)  # every channel depends on those before it


def counts(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] != 8:
        raise ValueError("eight channels are needed")
    return x


class Held(nn.Module):
    """No group of channels may lose any: what stands between the two convolutions holds the first one's."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self.a(x)))


FLOWS = {
    "compressed": small.FILTER,
    "compressed_quant": small.FILTER + small.QUANT,
    "prune": small.FILTER + small.QUANT,
}


@pytest.mark.parametrize("flow", list(FLOWS))
@pytest.mark.parametrize(
    ("between", "reason"),
    [(mixes, "works along the channels"), (counts, "would fail or differ"), (nn.Softmax(1), "a: ")],
)
def test_no_group_may_lose_channels(tmp_path: Path, flow: str, between: Any, reason: str) -> None:
    job = Job(tmp_path, FLOWS[flow])
    with rejected(tmp_path, ValueError, "prune.cfg", "nothing is left to prune", "b: ", reason):
        if flow == "prune":
            job.create(Held(between))
        else:
            amct_ext.create_compressed_retrain_model(Held(between), small.SAMPLE, job.config, job.record)


def test_no_group_may_lose_channels_but_something_is_done(tmp_path: Path) -> None:
    """2:4 sparsity beside it, or a report: no error."""
    sparse = 'override_layer_configs { layer_name: "b" ' + small.SPARSE % 0 + "}"
    job = Job(tmp_path, small.FILTER + sparse)
    assert job.create(Held(mixes)).b.sparsity is not None
    report = amct_ext.explain(Held(mixes), small.SAMPLE, str(Job(tmp_path, small.FILTER).config))
    assert "cumsum" in report["a"].not_pruned


@pytest.mark.parametrize("flow", ["compressed", "prune"])
def test_restoring_what_could_never_be_pruned(tmp_path: Path, flow: str) -> None:
    job = Job(tmp_path, small.FILTER)
    Path(job.record).write_text("")  # as AMCT leaves it
    torch.save(Held(mixes).state_dict(), tmp_path / "state.pth")
    restore = {"compressed": amct_ext.restore_compressed_retrain_model, "prune": amct_ext.restore_prune_retrain_model}
    files = (job.config, job.record) if flow == "compressed" else (job.record, job.config)
    with rejected(tmp_path, ValueError, "prune.cfg", "nothing is left to prune"):
        restore[flow](Held(mixes), small.SAMPLE, *files, str(tmp_path / "state.pth"))


def test_rounding_that_keeps_all_channels_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Job(tmp_path, small.FILTER.replace("false", "true")).create(small.build())
    assert "keep all channels" in caplog.text
