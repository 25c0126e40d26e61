"""Sensitivity measures and search algorithms: the built-in ones, those derived from them, own plug-ins, bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.rejection import rejected
from support.jobs.channel_search import CLASSES, DATA, LABEL, Returns, Search, scores, write_floats
from support.models import small
from support.models.wide_model import wide
from torch import Tensor, nn

import amct_ext
from amct_ext.config.plan import resolve
from amct_ext.config.text import FilterPrune, RetrainConfig
from amct_ext.graph.trace import trace
from amct_ext.prune.cost import Cost, layer_costs
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.search_space import SearchGraph, graph_info, read_scores, search_records, write_scores
from amct_ext.prune.walk import discover


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


def measured(model: nn.Module, samples: int, data: Any, label: Any) -> Tensor:
    """Taylor's scores of conv1 from the first samples."""
    group = ChannelGroup(16, [Member("conv1", "Conv")], [Member("bn1", "BatchNormalization"), Member("conv2", "Conv")])
    records = search_records([group])
    measure = amct_ext.TaylorLossSensitivity()
    measure.setup_initialization((SearchGraph(model, ()), {}), [data, label], samples)
    measure.get_sensitivity(records)
    return torch.tensor(scores(records)["conv1"])


def test_more_samples_add_up(search: Search) -> None:
    model = small.build().eval()
    one_by_one = [measured(model, 1, DATA[i : i + 1], LABEL[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(measured(model, 3, DATA, LABEL), torch.stack(one_by_one).sum(0))
    for iterations in (1, 6):
        search.run(f"compress_ratio: 1.5 ascend_optimized: false test_iteration: {iterations}")


def test_class_numbers_are_measured_by_cross_entropy() -> None:
    model = small.build().eval()
    output = model(DATA[:1])
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(output, CLASSES[:1]), [model.conv1.weight])
    expected = (model.conv1.weight * gradient).flatten(1).abs().sum(1).detach()
    for label in (CLASSES, CLASSES.to(torch.uint8)):
        torch.testing.assert_close(measured(model, 1, DATA, label), expected)


class OnlyConv1(amct_ext.SensitivityBase):
    """An own measure with AMCT's methods."""

    def setup_initialization(
        self, graph_tuple: Any, input_data: Any, test_iteration: int, output_nodes: Any = None
    ) -> None:
        (self.graph, self.graph_info), self.data, self.count = graph_tuple, input_data, test_iteration

    def get_sensitivity(self, search_records: Any) -> None:
        assert self.count == 2 and self.data[0] is DATA and not self.graph.model.training
        assert {"stem", "conv1", "fc"} <= {node.name for node in self.graph.nodes if node.type in ("Conv", "Gemm")}
        for record in search_records:
            names = [node.name for node in record.producer]
            assert self.graph.model.get_submodule(names[0]).out_channels == self.graph_info[names[0]]["cout"]
            write_floats(record, [1e-9 if "conv1" in names else 1e9] * self.graph_info[names[0]]["ori_cout"])


class GuidesForm(OnlyConv1):
    """The form of the method that the guide shows for PyTorch: without output_nodes."""

    def setup_initialization(self, graph_tuple: Any, input_data: Any, test_iteration: int) -> None:  # type: ignore[override]
        super().setup_initialization(graph_tuple, input_data, test_iteration)


@pytest.mark.parametrize("own", [OnlyConv1, GuidesForm])
def test_least_sensitive_layer_goes_first(search: Search, own: Any) -> None:
    ratios = search.run("compress_ratio: 1.1 ascend_optimized: false test_iteration: 2", sensitivity=own())
    assert [name for name, ratio in ratios.items() if ratio] == ["conv1"]


class Half(amct_ext.SearchChannelBase):
    """An own algorithm with AMCT's method: half of each layer goes."""

    def channel_prune_search(self, graph_info: Any, search_records: Any, prune_config: Any) -> dict[str, list[int]]:
        assert prune_config == (2.0, False, 0.75)
        assert all({"cin", "cout", "ori_cout", "bitops"} <= set(entry) for entry in graph_info.values())
        assert all(any(a.name == "bitops" and a.f > 0 for a in r.producer[0].attr) for r in search_records)
        assert set(scores(search_records)) == {record.producer[0].name for record in search_records}
        widths = {node.name: graph_info[node.name]["cout"] for record in search_records for node in record.producer}
        return {name: [0] * (width // 2) + [1] * (width - width // 2) for name, width in widths.items()}


def test_own_algorithm_and_coupled_layers(search: Search) -> None:
    text = "compress_ratio: 2 ascend_optimized: false max_prune_ratio: 0.75"
    expected = {"stem": 0.5, "conv1": 0.5, "conv2": 0.5, "down": 0.5, "fc": 0.0}
    assert search.run(text, search_alg=Half()) == expected
    # The file says what holds for the whole model first.
    assert search.out.read_text().startswith("prune_config")


def test_methods_derived_from_the_built_in_ones(search: Search) -> None:
    """They may call what they override, and update_graph keeps the table they are given up to date."""

    class Doubled(amct_ext.TaylorLossSensitivity):
        def get_sensitivity(self, search_records: Any) -> None:
            super().get_sensitivity(search_records)
            for record in search_records:
                values = scores([record])[record.producer[0].name]
                attr = next(a for a in record.producer[0].attr if a.name == "sensitivity")
                attr.floats[:] = [2 * value for value in values]

    class Narrowed(amct_ext.GreedySearch):
        def channel_prune_search(self, graph_info: Any, search_records: Any, prune_config: Any) -> dict[str, list[int]]:
            kept = super().channel_prune_search(graph_info, search_records, prune_config)
            before = sum(entry["bitops"] for entry in graph_info.values())
            lost = {i: kept[r.producer[0].name].count(0) for i, r in enumerate(search_records)}
            self.update_graph(lost, graph_info, search_records)
            assert before / sum(entry["bitops"] for entry in graph_info.values()) == pytest.approx(1.5, rel=0.1)
            assert all(graph_info[n.name]["cout"] == sum(kept[n.name]) for r in search_records for n in r.producer)
            return kept

    text = "compress_ratio: 1.5 ascend_optimized: false"
    plain = search.run(text)
    assert search.run(text, sensitivity=Doubled(), search_alg=Narrowed()) == plain and search.cost_ratio() >= 1.5


class Counted(nn.CrossEntropyLoss):
    called = 0

    def forward(self, output: Tensor, label: Tensor) -> Tensor:
        type(self).called += 1
        return super().forward(output, label)


def test_a_loss_of_the_users_own(search: Search) -> None:
    measure = amct_ext.TaylorLossSensitivity()
    measure.set_loss_func(Counted())
    text = "compress_ratio: 1.5 ascend_optimized: false test_iteration: 3"
    ratios = search.run(text, data=[DATA, CLASSES], sensitivity=measure)
    assert Counted.called == 3
    measure.set_loss_func()
    assert search.run(text, data=[DATA, CLASSES], sensitivity=measure) == ratios  # the same loss, found from the labels
    with pytest.raises(TypeError, match="loss_func"):
        measure.set_loss_func("cross entropy")  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.MSELoss(), nn.SmoothL1Loss(), nn.HuberLoss()])
def test_a_given_loss_that_would_broadcast_the_labels(search: Search, loss: nn.Module) -> None:
    measure = amct_ext.TaylorLossSensitivity()
    measure.set_loss_func(loss)
    search.config.write_text("compress_ratio: 2")
    with rejected(search.folder, RuntimeError, "label", "target size"):
        search.run("compress_ratio: 2", data=[DATA, CLASSES], sensitivity=measure)


@pytest.mark.parametrize("loss", [lambda output, label: output, lambda output, label: 1.0, lambda output, label: label])
def test_a_loss_that_is_none(search: Search, loss: Any) -> None:
    measure = amct_ext.TaylorLossSensitivity()
    measure.set_loss_func(loss)
    search.config.write_text("compress_ratio: 2")
    with rejected(search.folder, RuntimeError, "loss", "one number"):
        search.run("compress_ratio: 2", sensitivity=measure)


class Writes(amct_ext.SensitivityBase):
    def __init__(self, values: list[float] | None) -> None:
        self.values = values

    def setup_initialization(self, *args: Any) -> None:
        pass

    def get_sensitivity(self, search_records: Any) -> None:
        for record in search_records if self.values is not None else ():
            write_floats(record, self.values)


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ({"sensitivity": "Hessian"}, ("Hessian", "TaylorLossSensitivity")),
        ({"search_alg": "Random"}, ("Random", "GreedySearch")),
        ({"sensitivity": Writes([1.0] * 3)}, ("stem", "8 scores", "3")),
        ({"sensitivity": Writes(None)}, ("stem", "8 scores", "none")),
        ({"search_alg": Returns([1])}, ("dict", "list")),
        ({"search_alg": Returns({"stm": [1] * 8})}, ("stm", "'stem'")),
        ({"search_alg": Returns({"stem": [1] * 7})}, ("stem", "8 flags")),
        ({"search_alg": Returns({"stem": [2] * 8})}, ("stem", "8 flags")),
        ({"search_alg": Returns({"stem": 0.5})}, ("stem", "8 flags")),
        ({"search_alg": Returns({"stem": torch.ones(8, 2)})}, ("stem", "8 flags")),
        ({"search_alg": Returns({"stem": "1" * 8})}, ("stem", "8 flags")),
        ({"search_alg": Returns({"stem": [0] * 8})}, ("all 8 channels", "stem")),
    ],
)
def test_bad_plugins(search: Search, plugins: dict[str, Any], words: tuple[str, ...]) -> None:
    search.config.write_text("compress_ratio: 2")
    with rejected(search.folder, ValueError, *words):
        search.run("compress_ratio: 2", **plugins)
    with rejected(search.folder, TypeError, "search_alg"):
        search.run("compress_ratio: 2", search_alg=3)


def test_taylor_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        model[1].weight.copy_(torch.tensor([[0.5, 2.0]]))
    group = ChannelGroup(2, [Member("0", "MatMul")], [Member("1", "MatMul")])
    records = search_records([group])
    measure = amct_ext.TaylorLossSensitivity()
    measure.setup_initialization(
        (SearchGraph(model, ()), {}), [torch.tensor([[1.0, 3.0]]), torch.tensor([[-100.0]])], 1
    )
    measure.get_sensitivity(records)
    # The loss grows with the output, so the gradient of w[c, i] is out_weight[c] * x[i].
    torch.testing.assert_close(read_scores(records[0], group), torch.tensor([0.5 * (1 + 6), 2.0 * (3 + 3)]))


def test_greedy_equals_its_definition() -> None:
    """Each step is the cheapest of all groups at the present widths, searched naively."""
    model = wide()
    graph = trace(model, small.SAMPLE)
    config = RetrainConfig(prune=FilterPrune(0.5, False))
    found = list(discover(graph, resolve(config, graph.traits(model)), model).prunable)
    works = layer_costs(graph, model)
    cost = Cost(works, found)
    records, scores = search_records(found), []
    for record, group in zip(records, found, strict=True):
        scores.append(torch.rand(group.count))
        write_scores(record, scores[-1])
    removed = [0] * len(found)
    while cost.original / cost(removed) < 1.5:
        steps = []
        for index, group in enumerate(found):
            num_subgroups = group.num_equal_subgroups or 1
            further = [*removed]
            further[index] += num_subgroups
            if further[index] < group.count:
                rows = scores[index].reshape(num_subgroups, -1).sort(1).values
                loss = rows[:, removed[index] // num_subgroups].double().sum().item()
                steps.append((loss / (cost(removed) - cost(further)), further))
        removed = min(steps)[1]
    kept = amct_ext.GreedySearch().channel_prune_search(graph_info(works), records, (1.5, False, 1.0))
    for group, values, count in zip(found, scores, removed, strict=True):
        num_subgroups = group.num_equal_subgroups or 1
        for member in group.producers:
            flags = torch.tensor(kept[member.name]).reshape(num_subgroups, -1)
            assert (flags == 0).sum(1).tolist() == [count // num_subgroups] * num_subgroups
            rows = values.reshape(num_subgroups, -1)
            assert rows[flags == 0].numel() == 0 or all(
                row[flag == 0].max() <= row[flag == 1].min() for row, flag in zip(rows, flags, strict=True)
            )
