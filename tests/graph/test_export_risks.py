"""What a save will meet is told at create: operators, reads inside of torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.jobs.any_job import AnyJob
from support.models import small
from torch import Tensor, nn

from amct_ext.errors import AmctError
from amct_ext.graph.export_risks import ExportRisk, exportable_submodules

X = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """A convolution, and an expression of what it returns."""

    def __init__(self, expression: str = "f") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid(), nn.Conv2d(16, 16, 1))
        self.expression = expression

    def forward(self, x: Tensor) -> Tensor:
        scope: dict[str, Any] = {"f": self.body(x), "torch": torch, "F": F}
        result: Tensor = eval(self.expression, scope)
        return result


def told_and_saved(folder: Path, net: nn.Module, x: Any, caplog: pytest.LogCaptureFixture) -> tuple[str, str, str]:
    """What create says of the export, how save fails, and what it says."""
    job = AnyJob(folder, small.QUANT)
    with caplog.at_level(logging.WARNING):
        model = job.calibrated(net, x)
        said = caplog.text
        caplog.clear()
        model.eval()(*(x if isinstance(x, tuple) else (x,)))
        try:
            job.save(model, x)
        except AmctError as error:
            return said, str(error), caplog.text
    return said, "", caplog.text


EXPORTED = {
    "norm of torch.batch_norm": "F.batch_norm(f, torch.zeros(16), torch.ones(16))",
    "norm of a vector": "F.normalize(f)",
    "windows": "f.unfold(2, 3, 1)",
    "bilinear": "F.bilinear(f.flatten(2)[..., :4], f.flatten(2)[..., :4], torch.ones(3, 4, 4))",
    "noise": "f + 0 * torch.randn_like(f)",
    "complex": "torch.view_as_real(torch.complex(f, f))",
    "fourier": "torch.fft.fft2(f).real",
    "volumes": "F.grid_sample(f[:, :, None], torch.zeros(2, 1, 3, 3, 3), align_corners=False)",
    "batches": "torch.addbmm(f[0, 0], f[0], f[0])",
    "attention": "F.scaled_dot_product_attention(f, f, f)",
    "bags": "F.embedding_bag((f.flatten(1)[:, :4] > 0).long(), torch.ones(2, 3))",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_what_exporters_know_is_not_tried_at_create(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amct_ext.flows.create_checks.try_capture", lambda *_, **__: pytest.fail("tried"))
    said, error, note = told_and_saved(tmp_path, Net(EXPORTED[name]), X, caplog)
    assert not error and "traced" not in note and "export" not in said


REFUSED = {
    "pinv": "torch.linalg.pinv(f[0, 0])",
    "pdist": "F.pdist(f.flatten(1))",
    "mvlgamma": "torch.mvlgamma(f.abs() + 3, 2)",
    "randperm": "torch.randperm(3) + f[0, 0, 0, :3]",
    "cov": "torch.cov(f[0, 0])",
}
TRACED = {
    "cdist": "torch.cdist(f.flatten(2), f.flatten(2))",
    "one_hot": "F.one_hot((f.flatten(1)[:, :4] > 0).long())",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_exporter_knows_is_told_at_create(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said, error, _ = told_and_saved(tmp_path, Net(REFUSED[name]), X, caplog)
    assert error and "save will fail" in said and "such as 'body'" in said


@pytest.mark.parametrize("name", TRACED)
def test_what_is_traced_is_told_at_create(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said, error, note = told_and_saved(tmp_path, Net(TRACED[name]), X, caplog)
    assert not error and "was traced" in note and "save may trace" in said


def test_a_read_that_torch_export_takes_out_is_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said, error, note = told_and_saved(tmp_path, Net("F.one_hot((f.flatten(1)[:, :4] > 0).long(), 2)"), X, caplog)
    assert not error and "traced" not in note and "save" not in said


def test_parts_that_can_be_saved() -> None:
    layers = ["body.0.conv", "body.1.conv", "neck.conv", "head.cls.conv", "head.loc.conv", "last"]
    assert exportable_submodules([ExportRisk("x", "", "head.loc.decode")], layers) == ["body", "neck", "head.cls"]
    assert exportable_submodules([ExportRisk("x", "", "")], layers) == ["body", "head", "neck"]
