"""The pruning flow: golden created states and records, exact restore, plain export, its checks."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import onnx
import pytest
import torch
from support.checks.onnx_run import run_onnx
from support.checks.rejection import rejected
from support.golden.run import Case
from support.jobs.prune_job import Job
from support.jobs.retrain_job import assert_same_state, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.record.text import parse_record, read_record

GOLDEN = [
    "cnn_24_f0", "cnn_24_f2", "cnn_filter_asc", "cnn_filter_noasc", "cnn_mixed_prune", "cnn_override_prune",
    "concat_filter_asc", "mlp_24", "mlp_filter_asc", "reused_24",
]  # fmt: skip
CONFIGS = {
    "filter": small.FILTER,
    "sparse": small.SPARSE % 0,
    "sparse_refreshed": small.SPARSE % 2,
    "mixed": small.FILTER + small.MIXED,
    "quantisation_ignored": small.FILTER + small.MIXED + small.QUANT,
}


@pytest.fixture(params=list(CONFIGS))
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    return Job(tmp_path, CONFIGS[request.param])


def test_signatures() -> None:
    expected = {
        amct_ext.create_prune_retrain_model: "model input_data config_defination record_file",
        amct_ext.restore_prune_retrain_model: "model input_data record_file config_defination pth_file state_dict_name",
        amct_ext.save_prune_retrain_model: "model save_path input_data input_names output_names dynamic_axes",
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY] == names.split()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_created_state_and_record(golden: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden, name, tmp_path)
    model = amct_ext.create_prune_retrain_model(case.float_model(), case.data["sample_x"], case.config, case.record)
    ours, theirs = amct_ext.to_amct_state_dict(model), case.load.created_state(name)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype, key
        if not key.endswith("wts_mask"):  # ours are made at create, AMCT's at the first forward
            assert torch.equal(ours[key].nan_to_num(7), value.nan_to_num(7)), key
    written, expected = read_record(case.record), parse_record(case.load.record(name, "after_create"))
    assert written.channel == expected.channel
    assert [(s.name, s.mask_shape) for s in written.sparse] == [(s.name, s.mask_shape) for s in expected.sparse]


@pytest.mark.parametrize("name", ["cnn_24_f0", "cnn_filter_noasc", "cnn_mixed_prune"])
def test_golden_checkpoint_restores(golden: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden, name, tmp_path)
    Path(case.record).write_text(case.load.record(name, "after_train"))
    checkpoint = str(golden / name / "checkpoint.pth")
    model = amct_ext.restore_prune_retrain_model(
        case.float_model(), case.data["sample_x"], case.record, case.config, checkpoint, "state_dict"
    )
    torch.testing.assert_close(case.evaluate(model), case.golden_results["eval_out"], atol=1e-5, rtol=1e-5)


def test_train_restore_save(job: Job) -> None:
    float_model = small.build().eval()
    model = job.create(float_model)
    assert not model.training and type(float_model.fc) is nn.Linear
    assert all(layer.weight_quant is None for _, layer in compressed_layers(model))
    train(model, optimizer_of(model), range(3))
    torch.save(model.state_dict(), job.folder / "state.pth")
    restored = job.restore(job.folder / "state.pth")
    assert_same_state(restored, model)
    expected = evaluate(model)
    assert torch.equal(evaluate(restored), expected)
    assert read_record(job.record).quant == ()
    model.train()
    job.save(model)
    assert model.training
    plain, deploy = (job.folder / "out" / f"net_{kind}_model.onnx" for kind in ("fake_quant", "deploy"))
    for path in (plain, deploy):
        torch.testing.assert_close(run_onnx(path, small.batch(50)[0]), expected, atol=1e-5, rtol=1e-5)
    assert plain.read_bytes() == deploy.read_bytes()


def test_amct_checkpoint_with_activation_state_is_accepted(tmp_path: Path) -> None:
    """AMCT's 2:4 wrappers hold activation entries where the file also quantises; they mean nothing here."""
    job = Job(tmp_path, small.SPARSE % 0 + small.QUANT)
    model = job.create()
    state = amct_ext.to_amct_state_dict(model)
    for name, _ in compressed_layers(model):
        state |= {f"{name}.acts_clip_{side}": torch.tensor(1.0) for side in ("max", "min")}
        state |= {f"{name}.acts_{item}": torch.tensor(float("nan")) for item in ("clip_max_pre", "scale", "offset")}
    torch.save(state, tmp_path / "amct.pth")
    assert_same_state(job.restore(tmp_path / "amct.pth"), model)


def test_save_takes_any_float_model(tmp_path: Path) -> None:
    model = nn.Sequential(small.build())  # a pruned model inside another one has no session at its root
    amct_ext.save_prune_retrain_model(model, str(tmp_path / "net"), small.SAMPLE, ["image"], ["scores"])
    graph = onnx.load(tmp_path / "net_deploy_model.onnx").graph
    assert graph.input[0].name == "image" and graph.output[0].name == "scores"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("nothing to do",)),
        (small.QUANT, ("no prune_config",)),
        ('skip_layer_types: "Conv2d"\nskip_layer_types: "Linear"\n' + small.FILTER, ("skipped",)),
        ('regular_prune_skip_types: "Conv2d"\nregular_prune_skip_types: "Linear"\n' + small.FILTER + small.QUANT,
         ("every layer is skipped",)),
    ],
)  # fmt: skip
def test_nothing_to_prune(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    job = Job(tmp_path, text)
    Path(job.record).write_text("precious\n")
    with rejected(tmp_path, ValueError, "prune.cfg", *words):
        job.create()


def test_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(tmp_path, small.FILTER)
    torch.save(job.create().state_dict(), tmp_path / "state.pth")
    Path(job.record).write_text("")
    with caplog.at_level(logging.WARNING), rejected(tmp_path, RuntimeError, "shape: stem.weight"):
        job.restore(tmp_path / "state.pth")
    assert "no prune_record" in caplog.text
    Path(job.record).unlink()
    with rejected(tmp_path, FileNotFoundError, "record.txt"):
        job.restore(tmp_path / "state.pth")


def test_quantised_models_and_wrong_types_are_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, small.CONFIGS["filter_quant"])
    both = amct_ext.create_compressed_retrain_model(small.build(), small.SAMPLE, job.config, job.record)
    with rejected(tmp_path, RuntimeError, "stem", "save_compressed_retrain_model"):
        job.save(both)
    with rejected(tmp_path, RuntimeError, "compressed already"):
        job.create(both)
    with rejected(tmp_path, TypeError, "config_defination"):
        amct_ext.create_prune_retrain_model(small.build(), small.SAMPLE, None, job.record)
    with rejected(tmp_path, TypeError, "dynamic_axes"):
        amct_ext.save_prune_retrain_model(small.build(), "net", small.SAMPLE, dynamic_axes=[1])
    with rejected(tmp_path, ValueError, "record_file"):
        amct_ext.create_prune_retrain_model(small.build(), small.SAMPLE, job.config, "")
