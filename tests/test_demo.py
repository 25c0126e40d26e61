"""The demo's machinery on a single epoch: a killed and restored run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's extra is not installed: pip install -e .[demo]")
pytest.importorskip("matplotlib", reason="the demo's extra is not installed: pip install -e .[demo]")

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
MODULES = ("data", "model", "train", "measure", "runs", "summary", "demo")


@pytest.fixture(scope="module")
def digits() -> Iterator[SimpleNamespace]:
    """The demo's modules; they are siblings in a folder, not a package, so they leave sys.modules again."""
    sys.path.insert(0, str(DIGITS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child processes: bits are equal at an equal number of threads
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    torch.set_num_threads(threads)
    sys.path.remove(str(DIGITS))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def start(digits: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float network after one epoch."""
    folder = tmp_path_factory.mktemp("float")
    digits.train.train(folder, digits.data.load_data(), None, None, epochs=1, peak=3e-3, every=10)
    return folder / "last.pth"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["prune_int8.cfg", "sparse_int8.cfg"])
def test_killed_run_ends_with_the_same_bits(digits: SimpleNamespace, start: Path, config: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    digits.train.train(whole, digits.data.load_data(), DIGITS / config, start, epochs=1, peak=1e-3, every=5)

    arguments = ["--run", str(killed), "--config", str(DIGITS / config), "--start", str(start)]
    arguments += ["--epochs", "1", "--learning-rate", "1e-3", "--checkpoint-every", "5", "--threads", "1"]
    with digits.runs.progress_bar(digits.demo.terminal()) as progress:
        lost = digits.runs.watch(arguments, progress, "to be killed", kill_at=12)
        again = digits.runs.watch(arguments, progress, "restored")

    assert lost.saved == 10
    assert min(again.losses) == 11
    states = [torch.load(folder / "last.pth", weights_only=True) for folder in (whole, killed)]
    assert digits.demo.same_bits(*states)
    assert (whole / "record.txt").read_bytes() == (killed / "record.txt").read_bytes()


def test_same_bits_sees_signs_of_zero_and_accepts_nan(digits: SimpleNamespace) -> None:
    same_bits, nan = digits.demo.same_bits, torch.tensor([float("nan")])
    assert same_bits({"a": [nan, 1]}, {"a": [nan.clone(), 1]})
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits({"a": 1}, {"b": 1})


def test_a_failing_child_is_reported_with_its_message(digits: SimpleNamespace, tmp_path: Path) -> None:
    arguments = ["--run", str(tmp_path), "--start", str(tmp_path / "missing.pth")]
    with (
        digits.runs.progress_bar(digits.demo.terminal()) as progress,
        pytest.raises(RuntimeError, match=r"missing\.pth"),
    ):
        digits.runs.watch(arguments, progress, "float32")
