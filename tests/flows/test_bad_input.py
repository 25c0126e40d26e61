"""Each bad input of the flow gives one clear error and changes no file."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from support.checks.rejection import rejected
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from torch import nn

import amct_ext


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job with all its files: created, trained two steps, checkpoint saved."""
    job = Job(tmp_path, small.CONFIGS["mixed_quant"])
    model = job.create()
    train(model, optimizer_of(model), range(2))
    torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
    return job


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            "batch_num: 1\nretrain_dta_quant_config { }\n",
            text_format.ParseError,
            ("compress.cfg", "2", "retrain_dta_quant_config"),
        ),
        ("batch_num: 1\nretrain_data_quant_config {\n", text_format.ParseError, ("compress.cfg",)),
        ('quant_skip_layers: "conv9"\n' + small.QUANT, ValueError, ("conv9",)),
        ('override_layer_configs { layer_name: "stemm" retrain_weight_quant_config { } }\n', ValueError, ("stemm",)),
        (small.FILTER.replace("0.3", "1.5"), ValueError, ("prune_ratio", "1.5")),
        (small.FILTER.replace("0.3", "0.0"), ValueError, ("prune_ratio",)),
        ("prune_config { }\n", ValueError, ("prune_config",)),
        ("", ValueError, ()),
        ("batch_num: 0\n" + small.QUANT, ValueError, ("batch_num",)),
    ],
)
def test_configuration(tmp_path: Path, text: str, error: type[Exception], words: tuple[str, ...]) -> None:
    job = Job(tmp_path, text)
    job.record.write_text("precious\n")
    with rejected(tmp_path, error, *words):
        job.create()


def test_argument_types(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    create = amct_ext.create_compressed_retrain_model
    with rejected(tmp_path, TypeError, "config_defination"):
        create(small.build(), small.SAMPLE, job.config, str(job.record))
    with rejected(tmp_path, ValueError, "record_file"):
        create(small.build(), small.SAMPLE, str(job.config), str(tmp_path) + "/")
    with rejected(tmp_path, FileNotFoundError, "absent.cfg"):
        create(small.build(), small.SAMPLE, str(tmp_path / "absent.cfg"), str(job.record))


@pytest.mark.parametrize("data", [torch.randn(2, 5, 12, 12), (torch.randn(2, 3, 12, 12), torch.ones(1)), [1, 2]])
def test_input_that_the_model_rejects(tmp_path: Path, data: object) -> None:
    job = Job(tmp_path, small.QUANT)
    job.record.write_text("precious\n")
    with rejected(tmp_path, RuntimeError):
        amct_ext.create_compressed_retrain_model(small.build(), data, str(job.config), str(job.record))


def test_compressed_already(job: Job) -> None:
    model = job.create()
    with rejected(job.folder, RuntimeError, "compressed already"):
        amct_ext.create_compressed_retrain_model(model, small.SAMPLE, str(job.config), str(job.record))


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.first(x)).mean((2, 3)))


def test_record_of_another_model(job: Job) -> None:
    with rejected(job.folder, RuntimeError, "record.txt"):
        job.restore(job.folder / "state.pth", model=Other())


def test_record_naming_missing_layers(job: Job) -> None:
    job.record.write_text(job.record.read_text().replace('name: "conv2"', 'name: "conv7"'))
    with rejected(job.folder, RuntimeError, "conv7"):
        job.restore(job.folder / "state.pth")


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated_record(job: Job, share: float) -> None:
    text = job.record.read_text()
    job.record.write_text(text[: int(len(text) * share)])
    with rejected(job.folder, RuntimeError, "record.txt"):
        job.restore(job.folder / "state.pth")


def test_no_record(job: Job) -> None:
    job.record.unlink()
    with rejected(job.folder, FileNotFoundError, "record.txt"):
        job.restore(job.folder / "state.pth")


def test_checkpoint_of_another_model(job: Job) -> None:
    torch.save({"model": Other().state_dict()}, job.folder / "other.pth")
    with rejected(job.folder, RuntimeError, "missing: stem.weight", "unexpected: first.weight", "shape: fc.weight"):
        job.restore(job.folder / "other.pth")


def test_checkpoint_with_missing_keys_lists_all(job: Job) -> None:
    state = torch.load(job.folder / "state.pth", weights_only=True)["model"]
    gone = ["conv1.weight", "conv2.act_quant.clip_max", "fc.sparsity.mask", "bn1.running_mean"]
    torch.save({"model": {k: v for k, v in state.items() if k not in gone}}, job.folder / "part.pth")
    with rejected(job.folder, RuntimeError, *gone):
        job.restore(job.folder / "part.pth")


def test_checkpoint_entry(job: Job) -> None:
    with rejected(job.folder, KeyError, "weights", "model"):
        job.restore(job.folder / "state.pth", "weights")
    with rejected(job.folder, RuntimeError, "state_dict_name"):
        job.restore(job.folder / "state.pth", None)
    with rejected(job.folder, FileNotFoundError, "absent.pth"):
        job.restore(job.folder / "absent.pth")


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


def test_checkpoint_with_code_is_not_executed(job: Job) -> None:
    torch.save({"model": {}, "hook": Bomb(str(job.folder / "exploded"))}, job.folder / "bomb.pth")
    with rejected(job.folder, pickle.UnpicklingError, "bomb.pth"):
        job.restore(job.folder / "bomb.pth")
    assert not (job.folder / "exploded").exists()


def test_truncated_checkpoint(job: Job) -> None:
    raw = (job.folder / "state.pth").read_bytes()
    (job.folder / "short.pth").write_bytes(raw[: len(raw) // 2])
    with rejected(job.folder, RuntimeError, "short.pth"):
        job.restore(job.folder / "short.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_activations_in_calibration(tmp_path: Path, value: float) -> None:
    model = Job(tmp_path, small.QUANT).create()
    x = small.batch(0)[0]
    x[1, 2, 3, 4] = value
    with rejected(tmp_path, RuntimeError, "stem", "NaN or Inf"):
        model.train()(x)


@pytest.mark.parametrize("when", ["eager", "evaluation", "state_dict", "save"])
def test_bad_activations_in_training(tmp_path: Path, when: str) -> None:
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    train(model, optimizer_of(model), range(2))
    x = small.batch(0)[0]
    x[0, 0, 0, 0] = float("nan")
    if when == "eager":
        amct_ext.configure(model, validation="eager")
        with rejected(tmp_path, RuntimeError, "stem", "NaN or Inf"):
            model.train()(x)
        return
    model.train()(x)
    with rejected(tmp_path, RuntimeError, "stem", "NaN or Inf"):
        if when == "evaluation":
            evaluate(model)
        elif when == "state_dict":
            model.state_dict()
        else:
            amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "out" / "net"), small.SAMPLE)


def test_one_bad_batch_raises_once(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(2))
    x = small.batch(0)[0]
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        for each in model.modules():
            if isinstance(each, torch.nn.BatchNorm2d):
                each.eval()
        model(x)
    with rejected(tmp_path, RuntimeError, "stem", "more: conv1", "NaN or Inf"):
        model.state_dict()
    model.state_dict()


def test_save_needs_an_up_to_date_record(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    save = lambda: amct_ext.save_compressed_retrain_model(model, str(job.record), str(tmp_path / "net"), small.SAMPLE)  # noqa: E731
    train(model, optimizer_of(model), range(2))
    with rejected(tmp_path, RuntimeError, "eval mode"):
        save()
    evaluate(model)
    train(model, optimizer_of(model), range(2, 4))
    with rejected(tmp_path, RuntimeError, "stem", "update_record"):
        save()
    with rejected(tmp_path, RuntimeError, "create_*"):
        amct_ext.save_compressed_retrain_model(small.build(), str(job.record), str(tmp_path / "net"), small.SAMPLE)


def test_configure_rejects_unknown_values(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    with pytest.raises(ValueError, match="validation"):
        amct_ext.configure(model, validation="sometimes")
