"""Configuration files of either format, checked without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amct_ext.config.files import check_config, read_config
from amct_ext.config.json import JsonConfig
from amct_ext.config.text import RetrainConfig
from amct_ext.errors import ConfigError

TEXT = "batch_num: 2 retrain_data_quant_config { ulq_quantize { } }"
WIDE = {"retrain_data_config": {"dst_type": "INT16"}, "retrain_weight_config": {"dst_type": "INT4"}}
LAYER = {"retrain_enable": True, "retrain_data_config": {}, "retrain_weight_config": {}}


def written(folder: Path, content: str | dict[str, object]) -> Path:
    path = folder / "job.cfg"
    path.write_text(content if isinstance(content, str) else "\n " + json.dumps(content))
    return path


def test_the_brace_tells_the_formats_apart(tmp_path: Path) -> None:
    text = read_config(written(tmp_path, TEXT))
    assert isinstance(text, RetrainConfig) and text.batch_num == 2
    content = read_config(written(tmp_path, {"version": 1, "batch_num": 3, "conv1": LAYER}))
    assert isinstance(content, JsonConfig) and content.settings.batch_num == 3


@pytest.mark.parametrize("content", [TEXT, {"version": 1, "batch_num": 1, "conv1": LAYER}], ids=["text", "json"])
def test_what_a_model_could_use_passes(tmp_path: Path, content: str | dict[str, object]) -> None:
    check_config(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_num: 2", "nothing to do"),
        (f'{TEXT} skip_layer_types: "Conv4d"', "layer type 'Conv4d' is not one of"),
        ({"version": 1, "batch_num": 1, "conv1": {**LAYER, "retrain_enable": False}}, "every layer is disabled"),
        (
            {"version": 1, "batch_num": 1, "conv1": WIDE},
            "INT16 activations with INT4 weights do not go together",
        ),
    ],
)
def test_what_no_model_could_use_is_refused(tmp_path: Path, content: str | dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(written(tmp_path, content))
