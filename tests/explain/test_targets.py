"""The table of device families, and the warnings about methods that a family gains nothing from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from support.models import small

import amct_ext
from amct_ext.config.json import read_json
from amct_ext.config.text import parse_config
from amct_ext.explain.targets import TARGETS, find_target

INT4 = 'override_layer_types { layer_type: "Linear" retrain_weight_quant_config { arq_retrain { dst_type: INT4 } } }\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "job.cfg"
    path.write_text(text)
    return path


def test_table() -> None:
    assert all(target.int8_quantisation and target.channel_pruning for target in TARGETS)
    assert not any(target.int4_quantisation for target in TARGETS)
    assert [target.name for target in TARGETS if target.sparsity_2to4] == ["Atlas A3", "Atlas A2"]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Ascend 950PR", "Ascend 950"), ("ascend950dt", "Ascend 950"), ("950", "Ascend 950"), ("A2", "Atlas A2"),
        ("Atlas A2 Training Series Products", "Atlas A2"), ("atlas-a3-inference", "Atlas A3"), ("AtlasA3", "Atlas A3"),
    ],
)  # fmt: skip
def test_names(name: str, family: str) -> None:
    assert find_target(name).name == family


@pytest.mark.parametrize("name", ["", "Atlas", "H200", "A4"])
def test_unknown_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="Atlas A2 training"):
        amct_ext.check_target(write(tmp_path, small.QUANT), name)


@pytest.mark.parametrize(
    ("text", "target", "words"),
    [
        (small.QUANT, "950PR", ()),
        (small.FILTER + small.QUANT, "950PR", ()),
        (small.SPARSE % 0 + small.QUANT, "A3 training", ()),
        (small.SPARSE % 0 + small.QUANT, "950DT", ("2:4 sparsity", "Ascend 950", "the global settings")),
        (small.FILTER + small.MIXED, "950", ("2:4 sparsity", "type 'Linear'")),
        (small.QUANT + INT4, "Atlas A2", ("INT4 weights", "type 'Linear'")),
    ],
)
def test_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, target: str, words: tuple[str, ...]
) -> None:
    path = write(tmp_path, text)
    with caplog.at_level(logging.WARNING, logger="amct_ext"):
        warnings = amct_ext.check_target(str(path), target)
    assert len(warnings) == bool(words)
    assert [record.getMessage() for record in caplog.records] == warnings
    assert all(word in warnings[0] for word in words)
    assert amct_ext.check_target(parse_config(path), target) == warnings


def test_both_at_once(tmp_path: Path) -> None:
    warnings = amct_ext.check_target(write(tmp_path, small.SPARSE % 0 + small.QUANT + INT4), "950PR")
    assert [warning.split(" is no gain")[0] for warning in warnings] == ["INT4 weights", "2:4 sparsity"]


def test_model(tmp_path: Path) -> None:
    config = write(tmp_path, small.MIXED + small.QUANT)
    model = amct_ext.create_compressed_retrain_model(
        small.build(), small.SAMPLE, str(config), str(tmp_path / "record.txt")
    )
    assert amct_ext.check_target(model, "A2") == []
    (warning,) = amct_ext.check_target(model, "950PR")
    assert "layer 'fc'" in warning
    with pytest.raises(RuntimeError, match="create_"):
        amct_ext.check_target(small.build(), "A2")
    with pytest.raises(TypeError, match="model_or_config"):
        amct_ext.check_target(3, "950")


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "quant.json"
    config = str(write(tmp_path, small.QUANT + INT4))
    amct_ext.create_quant_retrain_config(str(path), small.build(), small.SAMPLE, config)
    for source in (path, read_json(path)):
        (warning,) = amct_ext.check_target(source, "A3")
        assert "layer 'fc'" in warning and "INT4" in warning
