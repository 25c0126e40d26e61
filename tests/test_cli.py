"""The command line: what each command shows, and that bad files end with status 1 and one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from typer.testing import CliRunner

import amct_ext
from amct_ext.cli import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path, "write_shift_bit: true\n" + small.CONFIGS["mixed_quant"])
    model = job.create()
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    torch.save(amct_ext.to_amct_state_dict(model), tmp_path / "amct.pth")
    return job


def test_info_and_targets() -> None:
    assert "simd" in run("info")[1]
    code, text = run("targets")
    assert code == 0
    assert "Atlas A2" in text


def test_validate(job: Job) -> None:
    assert run("validate", job.config) == (0, f"{job.config}: valid\n")
    code, text = run("validate", job.config, "--target", "950PR")
    assert code == 0
    assert "2:4" in text
    job.config.write_text("batch_numm: 1\n")
    code, text = run("validate", job.config)
    assert code == 1
    assert "batch_numm" in text


def test_inspect(job: Job) -> None:
    code, text = run("inspect", job.record)
    assert code == 0
    for word in ("stem", "scale_w", "channel groups", "2:4 sparsity", "fc", "INT8/INT8"):
        assert word in text
    job.record.write_text("record { key: 'a'")
    code, text = run("inspect", job.record)
    assert code == 1
    assert "record.txt" in text


def test_checkpoint(job: Job) -> None:
    code, text = run("checkpoint", job.folder / "ours.pth", "--state-dict-name", "model")
    assert code == 0
    assert "native names" in text
    assert "AMCT names" in run("checkpoint", job.folder / "amct.pth")[1]
    code, text = run("checkpoint", job.folder / "ours.pth", "--state-dict-name", "other")
    assert code == 1
    assert "other" in text


def refused(command: str, path: Path, *options: str) -> str:
    """The command ends with status 1 and one message that names the file."""
    result = CliRunner().invoke(app, [command, str(path), *options], env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, result.output
    assert path.name in result.output and "Traceback" not in result.output and len(result.output) < 2000
    return str(result.output)


LAYER = '{"version": 1, "batch_num": 1, "fc": %s}'
BAD_JSON = {
    "string for a number": '{"version": 1, "batch_num": "two"}',
    "list for a layer": LAYER % "[1]",
    "null for settings": LAYER % '{"retrain_data_config": null}',
    "list for a name": LAYER % '{"retrain_data_config": {"algo": ["x"]}}',
    "deep objects": '{"a":' * 100_000,
    "deep lists": '{"a":' + "[" * 100_000,
    "deep value": '{"version": 1, "batch_num": ' + "[" * 900 + "]" * 900 + "}",
    "duplicate deep inside": '{"a":' * 100 + '{"k": 1, "k": 2}' + "}" * 100,
    "long number": '{"version": 1, "batch_num": ' + "9" * 6000 + "}",
    "large number": '{"version": 1, "batch_num": 4294967296}',
    "not float32": LAYER % '{"retrain_data_config": {"clip_max": 1e39, "clip_min": -1.0}}',
    "vanishes in float32": LAYER % '{"retrain_data_config": {"clip_max": 1e-50, "clip_min": -1.0}}',
    "half a surrogate pair": LAYER % '{"retrain_data_config": {"\\ud800": 1}}',
    "no layer enabled": LAYER % '{"retrain_enable": false}',
    "no layer": '{"version": 1, "batch_num": 1}',
}
BAD_TEXT = {
    "empty": "",
    "comments": "# nothing asked for\n",
    "only batch_num": "batch_num: 2",
    "only skips": 'skip_layers: "fc"',
    "unknown type to skip": 'skip_layer_types: "Conv9"\n' + small.QUANT,
    "unknown type to override": 'override_layer_types { layer_type: "Conv9" retrain_weight_quant_config { } }',
    "bits that do not go together": small.QUANT.replace("ulq_quantize { }", "ulq_quantize { dst_type: INT16 }").replace(
        "arq_retrain { }", "arq_retrain { dst_type: INT4 }"
    ),
    "long word": "a" * 50_000 + " {",
    "long line": "skip_layers: " + "a" * 50_000 + " {",
    "bytes": "\x00" * 1000,
}


@pytest.mark.parametrize("name", [*BAD_JSON, *BAD_TEXT])
def test_validate_and_create_agree_on_bad_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.cfg"
    path.write_text(BAD_JSON.get(name) or BAD_TEXT[name])
    refused("validate", path)
    refused("validate", path, "--target", "A2")
    record = str(tmp_path / "record.txt")
    if name in BAD_JSON:
        create = lambda: amct_ext.create_quant_retrain_model(str(path), small.build(), record, small.SAMPLE)  # noqa: E731
    else:
        create = lambda: amct_ext.create_compressed_retrain_model(small.build(), small.SAMPLE, str(path), record)  # noqa: E731
    with pytest.raises((ValueError, TypeError), match=r"bad\.cfg"):
        create()
    assert not (tmp_path / "record.txt").exists()


BAD_RECORDS = {
    "no producer": "prune_record { }",
    "deep": "record {" * 50_000,
    "brackets": "[" * 50_000,
    "long name": 'record { key: "' + "x" * 50_000 + '"',
    "long number": "record { key: 'a' value { scale_d: 1 offset_d: " + "9" * 6000 + " } }",
    "negative shape": 'prune_record { selective_prune { name: "a" attr { name: "mask_shape" type: INTS ints: -1 } } }',
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("name", list(BAD_RECORDS))
def test_inspect_bad_records(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.txt").write_text(BAD_RECORDS[name])
    refused("inspect", tmp_path / "bad.txt")


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Brackets are no markup, control characters and halves of surrogate pairs do not reach the terminal."""
    record = tmp_path / "r.txt"
    record.write_text(
        'record { key: "[/a]\\033[2J" value { scale_d: 1 offset_d: 0 scale_w: 1 offset_w: 0 } }\n'
        'prune_record { selective_prune { name: "[red]b" attr { name: "mask_shape" type: INTS ints: 1 ints: 4 } } }\n'
    )
    code, text = run("inspect", record)
    assert code == 0 and "[/a]\\x1b[2J" in text and "[red]b" in text
    torch.save({"[/c]": torch.ones(1), "\ud800": torch.ones(2, dtype=torch.complex64)}, tmp_path / "s.pth")
    code, text = run("checkpoint", tmp_path / "s.pth")
    assert code == 0 and "[/c]" in text and "\\ud800" in text and "complex64" in text


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("content", "options", "word"),
    [
        ({"a": torch.empty(2, device="meta")}, (), "meta device"),
        ({"a": torch.eye(3).to_sparse()}, (), "sparse_coo"),
        ({"a": torch.ones(3)}, ("--state-dict-name", "a"), "no state dict"),
        ({"a": 3}, ("--state-dict-name", "a"), "no state dict"),
        ({"a": {}}, ("--state-dict-name", "a"), "empty"),
        (torch.ones(3), (), "no state dict"),
        ([1, 2], (), "no state dict"),
        ({1: torch.ones(1)}, (), "no state dict"),
    ],
)
def test_checkpoint_bad_files(tmp_path: Path, content: object, options: tuple[str, ...], word: str) -> None:
    torch.save(content, tmp_path / "bad.pth")
    assert word in refused("checkpoint", tmp_path / "bad.pth", *options)


NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3)), torch.randn(2, 3, 8, 8)
"""


def test_verify_checks_a_record_and_fails_beyond_the_tolerance(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "prune.cfg").write_text(small.CONFIGS["filter"])
    scope: dict[str, object] = {}
    exec(NETWORK, scope)
    model, x = scope["build"]()  # type: ignore[operator]
    amct_ext.create_prune_retrain_model(model, x, str(tmp_path / "prune.cfg"), str(tmp_path / "record.txt"))
    status, text = run("verify", f"{tmp_path}/net.py:build", tmp_path / "record.txt")
    assert status == 0 and "channels removed" in text and "% of the parameters left" in text
    assert run("verify", f"{tmp_path}/net.py:build", tmp_path / "record.txt", "--tolerance", "-1")[0] == 1
    for network, message in ((f"{tmp_path}/net.py:make", "no function 'make'"), ("absent.py:build", "no file")):
        status, text = run("verify", network, tmp_path / "record.txt")
        assert status == 1 and message in text
