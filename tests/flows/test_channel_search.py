"""The search for pruning ratios: real costs, reachable ratios, the file it writes, bad data."""

from __future__ import annotations

import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.rejection import rejected
from support.jobs.channel_search import DATA, LABEL, Returns, Search
from support.models import small
from support.models.wide_model import wide
from torch import Tensor, nn

import amct_ext
from amct_ext.config.plan import LayerPlan, Plan
from amct_ext.config.text import FilterPrune, parse_config
from amct_ext.graph.trace import trace
from amct_ext.prune.search_space import read_group, search_records
from amct_ext.prune.walk import discover


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


def test_signature() -> None:
    names = "model config input_data output_cfg sensitivity search_alg"
    parameters = inspect.signature(amct_ext.auto_channel_prune_search).parameters
    assert list(parameters) == names.split()
    assert [parameters[name].default for name in names.split()[4:]] == ["TaylorLossSensitivity", "GreedySearch"]


@pytest.mark.parametrize("wanted", [1.2, 1.7, 2.5])
@pytest.mark.parametrize(("build", "ascend"), [(small.build, False), (wide, False), (wide, True)])
def test_ratio_is_reached_and_not_overshot(search: Search, build: Any, ascend: bool, wanted: float) -> None:
    ratios = search.run(f"compress_ratio: {wanted} ascend_optimized: {str(ascend).lower()}", build())
    reached = search.cost_ratio(build)
    assert reached >= wanted
    if not ascend:
        assert reached < wanted * 1.3  # steps are small
    assert set(ratios) == (
        {"stem", "conv1", "conv2", "down", "fc"} if build is small.build else {"a", "b", "grouped", "up", "fc"}
    )
    if ascend:
        record = amct_ext.explain(build(), small.SAMPLE, search.out)
        kept = {
            n: int(r.pruned.split()[2]) - int(r.pruned.split()[0]) for n, r in record.items() if "output" in r.pruned
        }
        assert kept and all(count % 16 == 0 for count in kept.values())


def test_file_form(search: Search) -> None:
    search.run("compress_ratio: 1.3")
    assert search.out.stat().st_mode & 0o777 == 0o640
    config = parse_config(search.out)
    assert config.prune == FilterPrune(0.3, True) and config.data is None and config.weight is None
    assert "fc" in config.regular_prune_skip_layers  # an output of the model: not pruned, and said so


def test_the_samples_import_lines() -> None:
    """The module has the function's name, and the function stays what the package's name gives."""
    module = importlib.import_module("amct_ext.auto_channel_prune_search")
    assert module.TaylorLossSensitivity is amct_ext.TaylorLossSensitivity
    assert module.GreedySearch is amct_ext.GreedySearch
    assert module.auto_channel_prune_search is amct_ext.auto_channel_prune_search and callable(
        module.auto_channel_prune_search
    )


def test_limit_per_layer_and_unreachable_ratio(search: Search, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ratios = search.run("compress_ratio: 50 ascend_optimized: false max_prune_ratio: 0.25")
    assert "cannot be reached" in caplog.text
    assert {name: ratio for name, ratio in ratios.items() if ratio} == dict.fromkeys(
        ("stem", "conv1", "conv2", "down"), 0.25
    )


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([DATA], RuntimeError, ("[data, label]",)),
        ([DATA, "label"], RuntimeError, ("tensors",)),
        ((DATA, LABEL), TypeError, ("input_data", "list")),
        ([DATA[:, :2], LABEL], RuntimeError, ("rejects",)),
        ([DATA * float("nan"), LABEL], RuntimeError, ("NaN",)),
        ([DATA, LABEL * float("nan")], RuntimeError, ("NaN",)),
        # Labels that torch would broadcast, or that are no classes of this model.
        ([DATA, torch.randn(6, 4)], RuntimeError, ("label", "[1, 4]", "[1, 5]")),
        ([DATA, torch.randn(6, 1)], RuntimeError, ("label", "[1, 1]", "set_loss_func")),
        ([DATA, torch.randn(6)], RuntimeError, ("label", "[1]", "set_loss_func")),
        ([DATA, torch.randint(5, (6, 1))], RuntimeError, ("label", "[1, 1]")),
        ([DATA, torch.full((6,), 5)], RuntimeError, ("label", "0..4", "5")),
        ([DATA, torch.zeros(6, dtype=torch.bool)], RuntimeError, ("label", "bool")),
    ],
)
def test_bad_data(search: Search, data: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    search.config.write_text("compress_ratio: 2")
    with rejected(search.folder, error, *words):
        search.run("compress_ratio: 2", data=data)


def test_coupled_layers_and_rounding_follow_create(search: Search, caplog: pytest.LogCaptureFixture) -> None:
    """Of coupled layers the one that loses fewest counts; what create's rounding makes of a ratio is told."""
    chosen = {"conv1": [0] * 3 + [1] * 13, "conv2": [0] * 8 + [1] * 8, "down": [0] * 4 + [1] * 12}
    with caplog.at_level(logging.WARNING):
        ratios = search.run("compress_ratio: 2 ascend_optimized: true", search_alg=Returns(chosen))
    assert ratios == {"stem": 0.0, "conv1": 3 / 16, "conv2": 0.25, "down": 0.25, "fc": 0.0}
    assert "conv1: of the 3 channels" in caplog.text and "create will remove 0" in caplog.text


def test_groups_that_the_model_cannot_lose_are_left_out(search: Search, caplog: pytest.LogCaptureFixture) -> None:
    class Rigid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if x.shape[1] != 8:
                raise ValueError("eight channels are needed")
            return self.c(x).mean((2, 3))

    ratios = search.run("compress_ratio: 1.2 ascend_optimized: false", Rigid())
    assert ratios["a"] > 0 and ratios["b"] == ratios["c"] == 0
    assert "eight channels are needed" in caplog.text


class SplitAndJoined(nn.Module):
    """Half of the channels take a way of their own and come back (C2f, CSP): readers have them in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).chunk(2, 1)
        return self.out(torch.cat([self.m(one), two], 1)).mean((2, 3))


def test_channels_in_another_order_keep_their_readers() -> None:
    model = SplitAndJoined().eval()
    layers = {name: LayerPlan(name, "Conv2d", None, FilterPrune(0.5)) for name in ("a", "m", "out")}
    plan = Plan(1, layers, fp16=False, write_shift_bit=False, quant_active=False, prune_active=True)
    groups = discover(trace(model, DATA[:2]), plan, model).prunable
    assert any(member.index_pairs for group in groups for member in group.consumers)
    for record, group in zip(search_records(groups), groups, strict=True):
        again = read_group(record)
        for members, wanted in ((again.producers, group.producers), (again.consumers, group.consumers)):
            assert [m.indices(range(group.count)) for m in members] == [m.indices(range(group.count)) for m in wanted]
            assert [m.per_channel(group.count) for m in members] == [m.per_channel(group.count) for m in wanted]


def test_a_split_that_is_joined_again_has_a_cost_and_a_score(search: Search) -> None:
    text = "compress_ratio: 1.3 ascend_optimized: false"
    assert 0 < search.run(text, SplitAndJoined(), sensitivity="GateTaylorSensitivity")["a"] < 0.75
    assert 0 < search.run(text, SplitAndJoined())["a"] < 0.75
    assert search.cost_ratio(SplitAndJoined) >= 1.3


def test_the_model_is_left_alone(search: Search) -> None:
    model = small.build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    search.run("compress_ratio: 1.5 ascend_optimized: false", model)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
