"""What the accuracy benchmark says about its numbers: statistics, results kept, tables, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.accuracy.amct import Options
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.prepared_model import split_param_groups
from benchmarks.accuracy.quick import CHECKS, is_broken
from benchmarks.accuracy.report import planned_runs
from benchmarks.accuracy.results import Result, append, read
from benchmarks.accuracy.statistics import area_under_curve, summarize
from benchmarks.accuracy.tables import accuracy_table, comparison_table, costs_table, skipped_list
from benchmarks.accuracy.tasks.image import Digits
from benchmarks.accuracy.tasks.registry import SETTINGS
from benchmarks.accuracy.training import lr_factor


def test_standard_error_of_the_mean() -> None:
    summary = summarize([1.0, 2.0, 3.0])
    assert (summary.mean, summary.count) == (2.0, 3)
    assert summary.error == pytest.approx(1 / 3**0.5)
    assert summary.text(1) == "2.0 ± 0.6"
    assert summarize([2.5]).text(2) == "2.50 (1 seed)"


def test_area_under_the_curve_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="what areas are compared with: pip install -e .[demo]")
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(500, generator=generator), torch.rand(500, generator=generator) > 0.7
    scores += 0.2 * labels
    assert area_under_curve(scores, labels) == pytest.approx(metrics.roc_auc_score(labels.numpy(), scores.numpy()))


def test_results_come_back_and_the_last_of_a_run_counts(tmp_path: Path) -> None:
    first = Result("lm", "int8", "amct", 0, score=2.1, prepare_seconds=1.0, train_seconds=20.0)
    skipped = Result("lm", "half", "nncf", 0, skipped="no channel pruning")
    for result in (first, skipped, Result("lm", "int8", "amct", 0, score=2.2)):
        append(result, tmp_path)
    found = read(tmp_path)
    assert found[skipped.run] == skipped
    assert found[first.run].score == 2.2 and len(found) == 2


def test_tables_have_means_leaders_costs_and_reasons() -> None:
    results = [Result("lm", "float", "float-budget", seed, score=2.0 + seed / 10, train_seconds=5) for seed in range(3)]
    results += [Result("lm", "int8", "brevitas", 0, score=2.3), Result("lm", "int8", "nncf", 0, score=2.2)]
    results.append(Result("lm", "sparse", "nncf", 0, skipped="no masks"))
    table = accuracy_table(results)
    row = next(line for line in table if "float + budget" in line)
    assert row.count("2.1000 ± 0.0577") == 3  # the same in every setting
    assert "**2.2000 (1 seed)**" in next(line for line in table if line.startswith("| NNCF"))
    assert "**" not in next(line for line in table if line.startswith("| Brevitas"))
    assert "0 + 5" in next(line for line in costs_table(results) if "float + budget" in line)
    assert skipped_list(results) == ["* NNCF: no masks"]


def test_standings_pair_the_seeds_and_count_bits_downwards() -> None:
    results = [Result("lm", "int8", "brevitas", seed, score=2.3 + seed / 10) for seed in range(3)]
    results += [Result("lm", "int8", "amct", seed, score=2.2 + seed / 10) for seed in range(2)]
    row = comparison_table(results)[-1]
    assert row == "| lm, INT8 | Brevitas | amct_ext, default | 0.1000 ± 0.0000 | 2 |"


def test_further_seeds_are_in_the_comparison_alone() -> None:
    results = [Result("lm", "int8", name, 0, score=2.0) for name in ("brevitas", "amct")]
    results += [Result("lm", "int8", "brevitas", 3, score=1.0), Result("lm", "int8", "amct", 3, score=3.0)]
    results.append(Result("lm", "int8", "nncf", 4, score=0.0))  # no seed of the choice
    assert "2.0000 (1 seed)" in next(line for line in accuracy_table(results) if line.startswith("| Brevitas"))
    assert "| Brevitas | amct_ext, default | -1.0000 ± 1.0000 | 2 |" in comparison_table(results)[-1]


def test_options_apply_where_they_change_something() -> None:
    recurrent, plain = nn.Sequential(nn.GRU(2, 2)), nn.Sequential(nn.Linear(2, 2))
    option = Options(profile="BEST", float_recurrent=True)
    assert option.apply_to(recurrent, SETTINGS["int8"]) and not option.apply_to(plain, SETTINGS["int8"])
    learned = Options(learned_scales=True)
    assert learned.apply_to(plain, SETTINGS["int8"]) and not learned.apply_to(plain, SETTINGS["half"])


def test_float_networks_run_once_for_a_task() -> None:
    assert planned_runs(["lm"], ["float"]) == [("lm", "float", "float")]
    assert len(planned_runs(["lm"], ["amct"])) == 3
    assert {method.kind for method in METHODS.values()} == {"float", "peer", "ours", "option"}


def test_batches_depend_on_step_and_seed_alone(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e .[demo]")
    task = Digits(tmp_path)
    batches = [task.batch(step, seed)[0] for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2))]
    assert torch.equal(batches[0], batches[1])
    assert not any(torch.equal(batches[0], other) for other in (*batches[2:], *task.calibration(2)))


def test_what_a_toolkit_added_trains_without_decay() -> None:
    model = nn.Linear(2, 2)
    names = [name for name, _ in model.named_parameters()]
    model.scale = nn.Parameter(torch.ones(()))
    weights, added = split_param_groups(model, names, lr=0.5, quantizer_lr_scale=0.1)
    assert len(weights["params"]) == 2 and added["params"][0] is model.scale
    assert (added["lr"], added["weight_decay"]) == (0.05, 0.0)


def test_the_rate_rises_and_falls() -> None:
    rates = [lr_factor(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01


def test_broken_scores_are_told_from_bad_ones() -> None:
    digits, text = CHECKS[0], CHECKS[2]
    assert not is_broken(digits, 60.0, 90.0) and is_broken(digits, 30.0, 90.0) and is_broken(digits, float("nan"), 90.0)
    assert not is_broken(text, 4.5, 4.0) and is_broken(text, 6.5, 4.0)
