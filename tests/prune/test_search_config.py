"""The configuration of the ratio search and its override file: what they settle, and what is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from support.checks.rejection import rejected
from support.jobs.channel_search import Search
from support.models import small

import amct_ext
from amct_ext.config.text import parse_config


@pytest.fixture
def search(tmp_path: Path) -> Search:
    return Search(tmp_path)


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
