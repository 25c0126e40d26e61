"""Networks whose forwards are awkward to capture: the files equal the evaluation, or create says what save will."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.onnx_run import onnx_outputs
from support.jobs.any_job import AnyJob
from support.models import small
from support.models.awkward import NETS

import amct_ext
from amct_ext.graph.run import tensors_in


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("config", [small.QUANT, small.FILTER + small.QUANT], ids=["quant", "filter_quant"])
def test_save_does_what_create_says(name: str, config: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    make, arguments, fate = NETS[name]
    if name == "experts":  # which rows an expert gets changes with the channels: pruning refuses that
        config = small.QUANT
    args, net, job = arguments(), make(), AnyJob(tmp_path, config)
    named = args[-1] if isinstance(args[-1], Mapping) else {}

    def call(model: torch.nn.Module) -> Any:
        return model(*args[: len(args) - bool(named)], **named)

    with caplog.at_level(logging.WARNING):
        model = job.create(net, args)
        said = caplog.text
        caplog.clear()
        with torch.no_grad():
            call(model.train())
            expected = list(tensors_in(call(model.eval())))
        assert ("save will fail" in said) == (fate == "refused")
        assert ("save may trace" in said) == (fate == "traced")
        assert amct_ext.explain(model).export in said
        if fate == "refused":
            assert "awkward.py:" in said and "such as 'body'" in said
            with pytest.raises(amct_ext.AmctError):
                job.save(model, args)
            return
        if fate == "captured":
            assert "export" not in said
        seen = onnx_outputs(job.save(model, args)[0], *tensors_in(args))
    if fate == "captured":
        assert "was traced" not in caplog.text
    assert len(seen) == len(expected)
    for output, wanted in zip(seen, expected, strict=True):
        assert output.shape == wanted.shape
        difference, norm = (output.double() - wanted.double()).norm(), wanted.double().norm()
        assert difference <= 0.02 * norm  # rounding ties apart
