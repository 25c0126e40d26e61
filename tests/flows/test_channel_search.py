"""The search for pruning ratios: real costs, reachable ratios, own plug-ins, override files, bad input."""

from __future__ import annotations

import importlib
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from support import small_models as small
from support.rejection import rejected
from support.wide_model import operations, wide
from torch import Tensor, nn

import amct_ext
from amct_ext.common.files import write_if_changed
from amct_ext.config.text import FilterPrune, parse_config
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.search_space import SearchGraph, search_records

DATA, LABEL, CLASSES = torch.randn(6, 3, 12, 12), torch.randn(6, 5), torch.randint(5, (6,))


class Search:
    """A search in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config, self.out = folder, folder / "search.cfg", folder / "out" / "prune.cfg"

    def run(self, text: str, model: nn.Module | None = None, data: Any = None, **plugins: Any) -> dict[str, float]:
        """Search; returns layer -> ratio as written, 0 for skipped layers."""
        write_if_changed(self.config, text)
        amct_ext.auto_channel_prune_search(
            model or small.build(), str(self.config), data or [DATA, LABEL], str(self.out), **plugins
        )
        config = parse_config(self.out)
        ratios = {item.target: item.prune.ratio for item in config.override_layer_configs}  # type: ignore[union-attr]
        return ratios | dict.fromkeys(config.regular_prune_skip_layers, 0.0)

    def cost_ratio(self, build: Any = small.build, sample: Tensor = small.SAMPLE) -> float:
        """How many times cheaper create makes the model with the written file, counted on the pruned model itself."""
        pruned = amct_ext.create_prune_retrain_model(build(), sample, str(self.out), str(self.folder / "record.txt"))
        return operations(build(), sample) / operations(pruned, sample)


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
        {"stem", "conv1", "conv2", "down", "fc"} if build is small.build else {"a", "b", "grouped", "fc"}
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


def scores(records: Any) -> dict[str, list[float]]:
    nodes = [record.producer[0] for record in records]
    return {node.name: list(next(a.floats for a in node.attr if a.name == "sensitivity")) for node in nodes}


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


def write_floats(record: Any, values: list[float]) -> None:
    """As the guide's readers write it: a message of AMCT's with a name, a type and floats."""
    attr = record.producer[0].attr.add(name="sensitivity", type=4)
    attr.floats.extend(values)


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


def test_the_samples_import_lines() -> None:
    """The module has the function's name, and the function stays what the package's name gives."""
    module = importlib.import_module("amct_ext.auto_channel_prune_search")
    assert module.TaylorLossSensitivity is amct_ext.TaylorLossSensitivity
    assert module.GreedySearch is amct_ext.GreedySearch
    assert module.auto_channel_prune_search is amct_ext.auto_channel_prune_search and callable(
        module.auto_channel_prune_search
    )


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


def test_class_numbers_are_measured_by_cross_entropy() -> None:
    model = small.build().eval()
    output = model(DATA[:1])
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(output, CLASSES[:1]), [model.conv1.weight])
    expected = (model.conv1.weight * gradient).flatten(1).abs().sum(1).detach()
    for label in (CLASSES, CLASSES.to(torch.uint8)):
        torch.testing.assert_close(measured(model, 1, DATA, label), expected)


def test_limit_per_layer_and_unreachable_ratio(search: Search, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ratios = search.run("compress_ratio: 50 ascend_optimized: false max_prune_ratio: 0.25")
    assert "cannot be reached" in caplog.text
    assert {name: ratio for name, ratio in ratios.items() if ratio} == dict.fromkeys(
        ("stem", "conv1", "conv2", "down"), 0.25
    )


def test_override_file(search: Search) -> None:
    override = search.folder / "keep.cfg"
    override.write_text(
        'skip_layers: "stem"\noverride_layer_configs { layer_name: "down" ' + small.FILTER.replace("0.3", "0.5") + "}\n"
    )
    text = f'compress_ratio: 1.4 ascend_optimized: false override_prune_cfg: "{override}"'
    ratios = search.run(text)
    assert ratios["down"] == ratios["conv2"] == 0.5  # coupled to the layer whose ratio is given
    assert "stem" not in ratios and parse_config(search.out).skip_layers == ("stem",)
    assert search.cost_ratio() >= 1.4
    explanation = amct_ext.explain(small.build(), small.SAMPLE, search.out)
    assert explanation["stem"].not_pruned == "named in skip_layers"
    assert explanation["down"].pruned == "8 of 16 output channels removed"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("compress_ratio: 1\n", ValueError, ("search.cfg:1", "compress_ratio", "greater than 1")),
        ("test_iteration: 1\n", ValueError, ("compress_ratio", "required")),
        ("compress_ratio: 2\nmax_prune_ratio: 1.5\n", ValueError, ("search.cfg:2", "max_prune_ratio")),
        ("compress_ratio: 2\nmax_prune_ratio: 0\n", ValueError, ("max_prune_ratio",)),
        ("compress_ratio: 2\ntest_iteration: 0\n", ValueError, ("test_iteration",)),
        ("compress_ratio: 2\ntest_iteration: 7\n", RuntimeError, ("7", "6 sample")),
        ('compress_ratio: 2\noverride_prune_cfg: "absent.cfg"\n', ValueError, ("absent.cfg",)),
        ("compress_ratio: two\n", RuntimeError, ("search.cfg:1",)),
        ("compres_ratio: 2\n", text_format.ParseError, ("compres_ratio", "compress_ratio")),
    ],
)
def test_bad_configuration(search: Search, text: str, error: type[Exception], words: tuple[str, ...]) -> None:
    search.config.write_text(text)
    with rejected(search.folder, error, *words):
        search.run(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_num: 1\n", ("keep.cfg:1", "batch_num")),
        (small.QUANT, ("keep.cfg", "retrain_data_quant_config")),
        (small.FILTER, ("prune_config",)),
        (small.MIXED, ("Linear", "filter_pruner")),
        ('override_layer_configs { layer_name: "fc" retrain_weight_quant_config { } }', ("fc", "filter_pruner")),
        ('skip_layers: "stm"\n', ("stm", "stem")),
        ('skip_layer_types: "Conv2d"\nskip_layer_types: "Linear"\n', ("skipped",)),
        ('skip_layer_types: "Conv2d"\n', ("no layer is left to search",)),
    ],
)
def test_bad_override_file(search: Search, text: str, words: tuple[str, ...]) -> None:
    override = search.folder / "keep.cfg"
    override.write_text(text)
    search.config.write_text(config := f'compress_ratio: 2\noverride_prune_cfg: "{override}"\n')
    with rejected(search.folder, ValueError, *words):
        search.run(config)


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


class Returns(amct_ext.SearchChannelBase):
    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen

    def channel_prune_search(self, graph_info: Any, search_records: Any, prune_config: Any) -> Any:
        return self.chosen


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


def test_the_model_is_left_alone(search: Search) -> None:
    model = small.build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    search.run("compress_ratio: 1.5 ascend_optimized: false", model)
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
