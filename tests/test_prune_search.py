"""The search for pruning ratios: real costs, reachable ratios, own plug-ins, override files, bad input."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small_models as small
import torch
from google.protobuf import text_format
from test_bad_input import rejected
from test_prune_cost import operations, wide
from torch import Tensor, nn

import amct_ext
from amct_ext.config.text import FilterPrune, parse_config
from amct_ext.files import write_if_changed

DATA, LABEL = torch.randn(6, 3, 12, 12), torch.randn(6, 5)


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


def test_more_samples_add_up(search: Search) -> None:
    model = small.build().eval()
    group = amct_ext.SearchGroup(("conv1",), ("bn1", "conv2"), 16, (0, 1))
    measure = amct_ext.TaylorLossSensitivity()
    samples = [((DATA[i : i + 1],), LABEL[i : i + 1]) for i in range(3)]
    one_by_one = [measure.get_sensitivity(model, [group], [sample])[0] for sample in samples]
    torch.testing.assert_close(measure.get_sensitivity(model, [group], samples)[0], sum(one_by_one))
    for iterations in (1, 6):
        search.run(f"compress_ratio: 1.5 ascend_optimized: false test_iteration: {iterations}")


def test_least_sensitive_layer_goes_first(search: Search) -> None:
    class OnlyConv1(amct_ext.SensitivityBase):
        def get_sensitivity(self, model: nn.Module, groups: Any, samples: Any) -> Sequence[Tensor]:
            assert len(samples) == 2 and all(len(arguments[0]) == 1 for arguments, _ in samples)
            return [torch.full((g.channels,), 1e-9 if "conv1" in g.producers else 1e9) for g in groups]

    ratios = search.run("compress_ratio: 1.1 ascend_optimized: false test_iteration: 2", sensitivity=OnlyConv1())
    assert [name for name, ratio in ratios.items() if ratio] == ["conv1"]


def test_own_algorithm_and_coupled_layers(search: Search) -> None:
    class Half(amct_ext.SearchChannelBase):
        def channel_prune_search(self, groups: Any, sensitivity: Any, cost: Any, compress_ratio: float) -> list[int]:
            assert cost([0] * len(groups)) == cost.original and compress_ratio == 2.0
            return [group.channels // 2 for group in groups]

    ratios = search.run("compress_ratio: 2 ascend_optimized: false", search_alg=Half())
    assert ratios == {"stem": 0.5, "conv1": 0.5, "conv2": 0.5, "down": 0.5, "fc": 0.0}


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


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([DATA], RuntimeError, ("[data, label]",)),
        ([DATA, "label"], RuntimeError, ("tensors",)),
        ((DATA, LABEL), TypeError, ("input_data", "list")),
        ([DATA[:, :2], LABEL], RuntimeError, ("rejects",)),
        ([DATA, torch.randn(6, 4)], RuntimeError, ("rejects input_data",)),
        ([DATA * float("nan"), LABEL], RuntimeError, ("NaN",)),
    ],
)
def test_bad_data(search: Search, data: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    search.config.write_text("compress_ratio: 2")
    with rejected(search.folder, error, *words):
        search.run("compress_ratio: 2", data=data)


def test_bad_plugins(search: Search) -> None:
    class Wrong(amct_ext.SensitivityBase, amct_ext.SearchChannelBase):
        def get_sensitivity(self, *args: Any) -> Any:
            return [torch.ones(3)]

        def channel_prune_search(self, groups: Any, *args: Any) -> list[int]:
            return [group.channels for group in groups]

    for plugins, words in (
        ({"sensitivity": "Hessian"}, ("Hessian", "TaylorLossSensitivity")),
        ({"search_alg": "Random"}, ("Random", "GreedySearch")),
        ({"sensitivity": Wrong()}, ("1 score vectors",)),
        ({"search_alg": Wrong()}, ("removes 8 channels of stem",)),
    ):
        search.config.write_text("compress_ratio: 2")
        with rejected(search.folder, ValueError, *words):
            search.run("compress_ratio: 2", **plugins)
    with rejected(search.folder, TypeError, "search_alg"):
        search.run("compress_ratio: 2", search_alg=3)


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
