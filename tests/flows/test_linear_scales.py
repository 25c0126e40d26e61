"""`profile: BEST`: an INT8 Linear has a scale per output channel, in training, in checkpoints and in saved files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, resume, train, train_and_save
from support.models import small

import amct_ext

BEST = "profile: BEST\n"
CONFIGS = {
    "adaptive": BEST + small.QUANT,
    "learned": BEST + small.LEARNED,
    "sparse": BEST + small.CONFIGS["sparse_quant"],
}
every_config = pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_restore_is_exact(text: str, tmp_path: Path) -> None:
    job = Job(tmp_path, text)
    whole = job.create()
    assert whole.fc.weight_quant.scale.shape == (5,) and whole.fc.weight_quant.num_bits == 8
    train(whole, optimizer_of(whole), range(4))
    first = train_and_save(job, tmp_path / "half.pth", range(2))
    second, optimizer = resume(job, tmp_path / "half.pth")
    assert torch.equal(evaluate(first), evaluate(job.restore(tmp_path / "half.pth")))
    train(second, optimizer, range(2, 4))
    assert_same_state(whole, second)


@every_config
def test_saved_files_and_the_integer_forward_agree(text: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="saved files are run: pip install -e .[dev]")
    import numpy as np
    from support.checks.onnx_run import run_onnx
    from support.models.export_models import tensors

    job = Job(tmp_path, text)
    model = train_and_save(job, tmp_path / "end.pth", range(2))
    x = small.batch(50)[0]
    expected = evaluate(model)
    again = job.restore(tmp_path / "end.pth")
    amct_ext.configure(again, forward="integer")
    torch.testing.assert_close(evaluate(again), expected, rtol=1e-3, atol=1e-3)
    amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)
    count = len(small.SAMPLE)
    run = run_onnx(tmp_path / "net_fake_quant_model.onnx", x[:count])
    torch.testing.assert_close(run, expected[:count], rtol=1e-3, atol=1e-2)
    deploy = tensors(tmp_path / "net_deploy_model.onnx")
    assert deploy["fc.weight"].dtype == np.int8
    factors = deploy["fc.dequant.param"].astype(np.uint32).view(np.float32)
    assert factors.shape == (5,)
    np.testing.assert_allclose(factors, model.fc.deq_scale().numpy(), rtol=1e-6)


def test_rows_of_other_sizes_cost_each_other_nothing(tmp_path: Path) -> None:
    """A row a thousand times smaller than the largest is lost under one scale and kept under one of its own."""
    kept = {}
    for name, text in (("best", CONFIGS["adaptive"]), ("amct", small.QUANT)):
        folder = tmp_path / name
        folder.mkdir()
        model = Job(folder, text).create()
        with torch.no_grad():
            model.fc.weight[0] *= 1e-3
            kept[name] = float(model.fc.compressed_weight()[0].norm() / model.fc.weight[0].norm())
    assert kept["best"] == pytest.approx(1, abs=0.01) and kept["amct"] == 0


@pytest.mark.parametrize("profile", ["BEST", "AMCT"])
def test_int4_layers_that_become_int8_keep_their_scales(profile: str, tmp_path: Path) -> None:
    """Where pruning leaves an odd number of input channels, the weight takes 8 bits."""
    quant = small.QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }")
    model = Job(tmp_path, f"profile: {profile}\n" + small.FILTER + quant).create()
    assert model.fc.in_features % 2 and model.fc.weight_quant.num_bits == 8
    assert model.fc.weight_quant.scale.numel() == (5 if profile == "BEST" else 1)
