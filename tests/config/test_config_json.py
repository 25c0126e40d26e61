"""The JSON configuration: written byte for byte as laid down, read strictly, resolved like the text configuration."""

from __future__ import annotations

import json
import logging
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.rejection import rejected
from support.models import small
from torch import nn

import amct_ext
from amct_ext.config.json import read_json
from amct_ext.config.json_text import json_text
from amct_ext.config.plan import WeightQuant, resolve, resolve_json
from amct_ext.config.text import DataQuant, parse_config
from amct_ext.config.traits import LayerTraits
from amct_ext.errors import ConfigError

TRAITS = {
    "conv": LayerTraits("Conv2d", True, True, True, False),
    "circular": LayerTraits("Conv2d", False, True, True, True, "padding_mode is 'circular'"),
    "up": LayerTraits("ConvTranspose2d", True, False, True, True),
    "fc": LayerTraits("Linear", True, True, True, True),
}
EVERYTHING = """
fakequant_precision_mode: FORCE_FP16_QUANT
batch_num: 3
retrain_data_quant_config { ulq_quantize { clip_max_min { clip_max: 0.1 clip_min: -2 } fixed_min: true } }
retrain_weight_quant_config { arq_retrain { channel_wise: true } }
quant_skip_layers: "up"
override_layer_configs { layer_name: "fc"
  retrain_data_quant_config { ulq_quantize { dst_type: INT16 } } retrain_weight_quant_config { ulq_retrain { } } }
"""
WRITTEN = """{
    "version":1,
    "fakequant_precision_mode":"FORCE_FP16_QUANT",
    "batch_num":3,
    "conv":{
        "retrain_enable":true,
        "retrain_data_config":{
            "algo":"ulq_quantize",
            "clip_max":0.10000000149011612,
            "clip_min":-2.0,
            "fixed_min":true,
            "dst_type":"INT8"
        },
        "retrain_weight_config":{
            "algo":"arq_retrain",
            "channel_wise":true,
            "dst_type":"INT8"
        }
    },
    "up":{
        "retrain_enable":false,
        "retrain_data_config":{
            "algo":"ulq_quantize",
            "clip_max":0.10000000149011612,
            "clip_min":-2.0,
            "fixed_min":true,
            "dst_type":"INT8"
        },
        "retrain_weight_config":{
            "algo":"arq_retrain",
            "channel_wise":true,
            "dst_type":"INT8"
        }
    },
    "fc":{
        "retrain_enable":true,
        "retrain_data_config":{
            "algo":"ulq_quantize",
            "dst_type":"INT16"
        },
        "retrain_weight_config":{
            "algo":"ulq_retrain",
            "dst_type":"INT8",
            "channel_wise":false
        }
    }
}"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "job.cfg"
    path.write_text(EVERYTHING)
    return path


def read(tmp_path: Path, content: Any) -> Any:
    """Write content as JSON (a string as it is), read it, resolve it."""
    path = tmp_path / "quant.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return resolve_json(read_json(path), TRAITS)


def test_layout(text: Path) -> None:
    assert json_text(parse_config(text), TRAITS) == WRITTEN


def test_json_resolves_like_the_text_it_was_made_from(text: Path, tmp_path: Path) -> None:
    assert read(tmp_path, WRITTEN) == resolve(parse_config(text), TRAITS)


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    plan = read(tmp_path, {"version": 1, "batch_num": 2, "conv": {}, "fc": {"retrain_enable": True}})
    assert plan.batch_num == 2 and plan.quant_active and not plan.prune_active and not plan.fp16
    for name, channel_wise in (("conv", True), ("fc", False)):
        assert plan.layers[name].quant.data == DataQuant()
        assert plan.layers[name].quant.weight == WeightQuant(channel_wise=channel_wise)
    assert plan.layers["up"].quant is None  # not listed


@pytest.mark.parametrize("config", ["", 'quant_skip_layers: "fc"\n', "batch_num: 2\n", None])
def test_whatever_the_text_leaves_open_is_quantised_by_default(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "job.cfg").write_text(config)
    out = tmp_path / "deep" / "quant.json"
    model = small.build()
    amct_ext.create_quant_retrain_config(
        str(out), model, small.SAMPLE, None if config is None else str(tmp_path / "job.cfg")
    )
    layers = {name: layer for name, layer in json.loads(out.read_text()).items() if isinstance(layer, dict)}
    assert list(layers) == ["stem", "conv1", "conv2", "down", "fc"]
    assert [name for name, layer in layers.items() if not layer["retrain_enable"]] == (
        ["fc"] if config and "skip" in config else []
    )
    assert stat.S_IMODE(out.stat().st_mode) == 0o640 and stat.S_IMODE(out.parent.stat().st_mode) == 0o750
    assert not hasattr(model, "amct_ext_session") and type(model.conv1) is nn.Conv2d


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (small.FILTER + small.QUANT, "prune_config"),
        ('regular_prune_skip_layers: "fc"\n' + small.QUANT, "regular_prune_skip_layers"),
        (small.QUANT + small.MIXED, "job.cfg:5: prune_config"),  # inside override_layer_types
        ('override_layer_configs { layer_name: "fc" ' + small.FILTER + "}\n", "prune_config"),
        ('skip_layers: "nothing"\n', "nothing"),
        ('skip_layer_types: "Conv2d"\nskip_layer_types: "Linear"\n', "nothing is left"),
    ],
)
def test_text_that_does_not_suit_the_quant_flow(tmp_path: Path, config: str, word: str) -> None:
    (tmp_path / "job.cfg").write_text(config)
    (tmp_path / "quant.json").write_text("precious")
    with rejected(tmp_path, ValueError, word):
        amct_ext.create_quant_retrain_config(
            str(tmp_path / "quant.json"), small.build(), small.SAMPLE, str(tmp_path / "job.cfg")
        )


def layer(part: str, **values: Any) -> dict[str, Any]:
    return {"version": 1, "batch_num": 1, "conv": {f"retrain_{part}_config": values}}


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ('{"version": 1, "batch_num": 1, "conv": {}, "conv": {}}', ValueError, ("conv", "more than once")),
        ('{"version": 1, "batch_num": 1, "conv": {"retrain_data_config": {"algo": "a", "algo": "b"}}}', ValueError,
         ("'conv': 'retrain_data_config'", "algo")),
        ('{"version": 1,', ValueError, ("quant.json:1:", "JSON")),
        ("[1]", ValueError, ("object", "list")),
        ({"batch_num": 1, "conv": {}}, ValueError, ("version",)),
        ({"version": 1, "conv": {}}, ValueError, ("batch_num",)),
        ({"version": 2, "batch_num": 1, "conv": {}}, ValueError, ("version 2",)),
        ({"version": "1", "batch_num": 1, "conv": {}}, TypeError, ("version", "int")),
        ({"version": 1, "batch_num": True, "conv": {}}, TypeError, ("batch_num", "int")),
        ({"version": 1, "batch_num": 0, "conv": {}}, ValueError, ("batch_num",)),
        ({"version": 1, "batch_num": 1, "fakequant_precision_mode": "HALF", "conv": {}}, ValueError, ("HALF",)),
        ({"version": 1, "batch_num": 1, "conv": 3}, ValueError, ("conv", "object")),
        ({"version": 1, "batch_num": 1, "conv": {"retrain_enable": 1}}, TypeError, ("retrain_enable", "bool")),
        ({"version": 1, "batch_num": 1, "conv": {"regular_prune_enable": True}}, ValueError, ("regular_prune_enable",)),
        ({"version": 1, "batch_num": 1, "con": {}}, ValueError, ("no layer 'con'", "'conv'")),
        ({"version": 1, "batch_num": 1, "circular": {}}, ValueError, ("circular", "padding_mode")),
        ({"version": 1, "batch_num": 1, "con": {"retrain_enable": False}, "fc": {}}, ValueError, ("'con'",)),
        ({"version": 1, "batch_num": 1, "fc": {"retrain_enable": False}}, ValueError, ("every layer is disabled",)),
        (layer("data", algo="ifmr"), ValueError, ("ifmr", "ulq_quantize")),
        (layer("data", clip_max=1, clip_min=-1.0), TypeError, ("clip_max", "float")),
        (layer("data", clip_max=-1.0, clip_min=-1.0), ValueError, ("clip_max", "greater")),
        (layer("data", clip_max=1.0), ValueError, ("clip_min", "go together")),
        (layer("data", clip_max=1.0, clip_min=float("-inf")), ValueError, ("clip_min", "finite")),
        (layer("data", fixed_min="yes"), TypeError, ("fixed_min",)),
        (layer("data", dst_type="INT4"), ValueError, ("INT4 activations",)),
        (layer("data", dst="INT8"), ValueError, ("unknown key", "dst_type")),
        (layer("weight", algo="ulq"), ValueError, ("ulq", "arq_retrain")),
        (layer("weight", dst_type="INT16"), ValueError, ("INT16 weights",)),
        (layer("weight", channel_wise=1), TypeError, ("channel_wise",)),
        (layer("weight", compensate_rounding=1), TypeError, ("compensate_rounding", "bool")),
        ({"version": 1, "batch_num": 1, "fc": {"retrain_weight_config": {"channel_wise": True}}}, ValueError,
         ("fc", "channel_wise")),
        ({"version": 1, "batch_num": 1, "fc": {"retrain_data_config": {"dst_type": "INT16"},
                                               "retrain_weight_config": {"dst_type": "INT4"}}}, ValueError,
         ("fc", "INT16 activations with INT4")),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, content: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        read(tmp_path, content)
    assert isinstance(caught.value, (ConfigError, TypeError))
    for word in ("quant.json", *words):
        assert word in str(caught.value)


def test_int4_weights_are_checked_against_the_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    four = {"retrain_weight_config": {"dst_type": "INT4"}}
    plan = read(tmp_path, {"version": 1, "batch_num": 1, "conv": four, "fc": four})
    assert plan.layers["conv"].quant.weight.num_bits == 8 and plan.layers["fc"].quant.weight.num_bits == 4
    assert "conv" in caplog.text and "fc" not in caplog.text


def test_unknown_keys_of_a_layer_are_told_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, {"version": 1, "batch_num": 1, "conv": {"retrain_enabled": True}})
    assert "retrain_enabled" in caplog.text


def test_a_model_without_quantisable_layers(tmp_path: Path) -> None:
    with rejected(tmp_path, ValueError, "no layer"):
        amct_ext.create_quant_retrain_config(str(tmp_path / "quant.json"), nn.Sequential(nn.ReLU()), torch.randn(2, 3))
