"""The coverage benchmark: what it counts, the jobs it runs, results kept, tables."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.coverage import measure as measuring
from benchmarks.coverage import run
from benchmarks.coverage.layers import find_layers, macs
from benchmarks.coverage.measure import TookTooLongError, measure, time_limit
from benchmarks.coverage.quantised import difference, same_bits
from benchmarks.coverage.results import Pruned, Quantised, Result, append, read
from benchmarks.coverage.run import chosen, missing_parts
from benchmarks.coverage.tables import failures, models_table, reasons_table, shortfalls, totals
from benchmarks.coverage.zoo.entry import Entry, images
from benchmarks.coverage.zoo.registry import ENTRIES


class Gated(nn.Module):
    """A residual block with a depthwise convolution and a gate, then two heads of which one is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1))
        self.widen = nn.Conv2d(16, 20, 1)
        self.head, self.unused = nn.Linear(20, 5), nn.Linear(20, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x) * self.gate(x).sigmoid()
        return self.head(self.widen(x).relu().mean((2, 3))).softmax(1)


GATED = Entry("own/gated", "torch", Gated, images(16))


def test_asked_are_layers_that_count_but_do_not_make_the_outputs() -> None:
    layers = find_layers(Gated(), GATED.inputs())
    assert layers.outputs == ("head",)
    assert layers.widths == {"stem.0": 16, "gate.1": 8, "gate.3": 16, "widen": 20}
    assert layers.asked(0.3) == 4 + 2 + 4 + 6
    assert "head.weight" in layers.used and "unused.weight" not in layers.used


def test_outputs_of_a_sum_are_made_by_both_layers() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 4, 1), nn.Conv1d(6, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.a(x) + self.b(x)

    layers = find_layers(Sum(), (torch.rand(1, 2, 9),))
    assert layers.outputs == ("a", "b") and layers.widths == {"first": 6}


def test_multiplications_are_those_of_convolutions_and_products() -> None:
    stem, depthwise, gate, widen, head = 64 * 27 * 16, 64 * 9 * 16, 2 * 16 * 8, 64 * 16 * 20, 20 * 5
    assert macs(Gated(), (torch.rand(1, 3, 16, 16),)) == stem + depthwise + gate + widen + head


def test_a_model_is_pruned_quantised_restored_and_saved() -> None:
    result = measure(GATED, ("ours", "quantised"))
    assert not result.error and result.ours is not None and result.quantised is not None
    assert not result.ours.error and not result.quantised.error
    assert result.asked == 16 and result.ours.pruned >= 15  # a group with several producers rounds once
    assert result.ours.parameters_left < 0.75 and result.ours.macs_left < 0.75
    job = result.quantised
    assert job.equal and job.onnx_equal and (job.weights, job.macs) == (1.0, 1.0)
    assert all(seconds is not None for seconds in (job.create, job.restore, job.save))


def test_the_other_pruner_keeps_the_outputs() -> None:
    pytest.importorskip("torch_pruning", reason="measured beside amct_ext: pip install -e .[models]")
    peer = measure(GATED, ("peer",)).peer
    assert peer is not None and not peer.error and peer.pruned >= 15


def test_reasons_and_failures_are_part_of_the_result() -> None:
    whole = Entry("own/whole", "torch", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images(8))
    ours = measure(whole, ("ours",)).ours
    assert ours is not None and ours.pruned == 0 and "refuses" in ours.note

    def broken() -> nn.Module:
        raise ValueError("no such size\nsecond line")

    assert measure(Entry("own/broken", "torch", broken, images(8))).error == "ValueError: no such size"


def test_models_whose_package_is_missing_get_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENTRIES, "own/none", Entry("own/none", "no_such_package", Gated, images(8)))
    monkeypatch.setattr(sys, "argv", ["run", "--models", "own/none", "--results", str(tmp_path / "results.jsonl")])
    monkeypatch.setattr(run, "limit_process", lambda: None)
    run.main()
    assert "no_such_package is not installed" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


def test_a_part_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TookTooLongError, match=r"0\.05 s"), time_limit(0.05):
        time.sleep(5)
    monkeypatch.setattr(measuring.torch_pruning_pruner, "prune", lambda *_: time.sleep(5))
    result = measure(GATED, ("peer",), seconds=0.05)
    assert result.peer is not None and "not done" in result.peer.error


def test_later_lines_of_a_model_complete_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = Result("own/net", "early", asked=10, ours=Pruned(pruned=3), peer=Pruned(error="no"))
    for result in (first, replace(first, version="later", ours=Pruned(pruned=9, reasons={"why": 1}), peer=None)):
        append(result, path)
    found = read(path)["own/net"]
    assert found.ours == Pruned(pruned=9, reasons={"why": 1}) and found.peer == first.peer
    assert found.versions == {"ours": "later", "peer": "early"}
    assert missing_parts(found, ("ours", "peer", "quantised")) == ["quantised"]
    assert missing_parts(Result("own/net", error="fails"), ("ours",)) == []
    assert not read(tmp_path / "none.jsonl")


def test_tables_count_who_works_and_name_what_fails() -> None:
    good = Result(
        "own/a", asked=100, parameters=1000, macs=1000, ours=Pruned("", 99, 0.5, 0.5, proof=1e-7),
        peer=Pruned("", 90, 0.6, 0.5),
        quantised=Quantised("", "", 1.0, 1.0, 1.0, 2.0, 3.0, True, 1e-6, 0.0),
    )  # fmt: skip
    short = Result("own/b", asked=100, parameters=1000, macs=10, ours=Pruned(pruned=10, reasons={"a *reason*": 30}))
    short = replace(short, peer=Pruned(error="raises"), quantised=Quantised("save", "no file", 0.5, 0.5, 1.0))
    results = [good, short, Result("own/c", error="cannot be built")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in totals(results)]
    rows = {row[0]: row[1] for row in cells}
    assert rows["models measured"] == "2"
    assert rows["channels pruned by amct_ext"] == "109 of 200, 54.5 %"
    assert rows["models that amct_ext alone / Torch-Pruning alone prunes"] == "1 / 0"
    assert rows["where both prune: parameters left, amct_ext / Torch-Pruning"] == "50.0 % / 60.0 %"
    assert rows["99 % of the weights and more in INT8"] == "1 of 2"
    assert rows["restored bit for bit"] == "1 of 1"
    assert len(models_table(results)) == 2 + 2
    assert any("own/c" in line and "cannot be built" in line for line in failures(results))
    assert sum("own/b" in line for line in failures(results)) == 2
    assert "a \\*reason\\*" in reasons_table(results)[-1]


def test_what_is_below_the_aim_is_told_with_its_reason() -> None:
    over = Result("own/a", asked=10, ours=Pruned(pruned=10, parameters_left=0.5), peer=Pruned(pruned=20))
    over = replace(over, peer=replace(over.peer, parameters_left=0.2))
    few = Result("own/b", asked=10, ours=Pruned(pruned=3, reasons={"held": 7}), peer=Pruned(pruned=9))
    job = Quantised(weights=0.5, create=1.0, first_line="INT8: 50 %")
    floats = Result("own/c", asked=1, quantised=job, best=replace(job, weights=1.0))
    told = shortfalls([over, few, floats])
    assert "removes 2.0 times what is asked" in told[0] and "own/b" in told[1] and told[1].endswith("held")
    assert told[2].endswith("INT8: 50 %; with `profile: BEST` 100 %") and len(told) == 3
    assert "| 1 of 1 " in next(line for line in totals([over, few, floats]) if "with `profile: BEST`" in line)


def test_differences_are_relative_and_bits_are_compared_with_nan() -> None:
    right = torch.tensor([3.0, 4.0])
    assert difference([right.numpy() + 0.5], [right]) == pytest.approx(0.5**0.5 / 5)
    assert difference([right[:1].numpy()], [right]) == float("inf")
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, right)


def test_the_list_has_models_of_every_package() -> None:
    assert len(ENTRIES) >= 120
    assert len({entry.package for entry in ENTRIES.values()}) == 7
    assert chosen(["smp/*"]) and set(chosen([])) == set(ENTRIES)


def test_a_model_of_the_list_runs() -> None:
    pytest.importorskip("transformers", reason="its models are on the list: pip install -e .[frameworks]")
    entry = ENTRIES["transformers/bert"]
    layers = find_layers(entry.build(), entry.inputs())
    assert layers.outputs == ("classifier",) and len(layers.widths) == 2 * 6 + 1
