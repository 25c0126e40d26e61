"""Configuration text -> RetrainConfig, without a model."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from amct_ext.config.text import (
    DataQuant,
    FilterPrune,
    RetrainConfig,
    SparsePrune,
    WeightSettings,
    parse_config,
    shortest_decimal,
)
from amct_ext.errors import ConfigError, ConfigParseError
from amct_ext.proto import message_class


@pytest.fixture
def parse(tmp_path: Path):
    def _parse(text: str) -> RetrainConfig:
        path = tmp_path / "job.cfg"
        path.write_text(text)
        return parse_config(path)

    return _parse


def ratio(text: str) -> str:
    return f"prune_config {{ filter_pruner {{ balanced_l2_norm_filter_prune {{ {text} }} }} }}"


def test_an_empty_file_parses_to_the_defaults(parse):
    config = parse("")
    assert config == RetrainConfig()
    assert (config.batch_num, config.fp16, config.write_shift_bit) == (1, False, False)


def test_every_field(parse):
    config = parse(
        """
        batch_num: 3  # a comment
        fakequant_precision_mode: FORCE_FP16_QUANT
        write_shift_bit: true
        retrain_data_quant_config {
          ulq_quantize { clip_max_min { clip_max: 2.5 clip_min: -1.5 } fixed_min: false dst_type: INT16 }
        }
        retrain_weight_quant_config: { ulq_retrain { dst_type: INT4 channel_wise: false } }
        prune_config { n_out_of_m_pruner { l1_selective_prune { n_out_of_m_type: M4N2 update_freq: 7 } } }
        skip_layers: ["a", "b"] skip_layer_types: "LSTM"
        quant_skip_layers: "c" quant_skip_types: "GRU"
        regular_prune_skip_layers: "d" regular_prune_skip_types: "Linear"
        override_layer_configs { layer_name: "e" retrain_data_quant_config {} }
        override_layer_types < layer_type: "Conv2d" retrain_weight_quant_config < arq_retrain <> > >
        """
    )
    assert config.batch_num == 3
    assert config.fp16
    assert config.write_shift_bit
    assert config.data == DataQuant(16, 2.5, -1.5, False)
    assert config.weight == WeightSettings("ulq_retrain", 4, False)
    assert config.prune == SparsePrune(7)
    assert config.skip_layers == ("a", "b")
    assert config.skip_layer_types == ("LSTM",)
    assert config.quant_skip_layers == ("c",)
    assert config.quant_skip_types == ("GRU",)
    assert config.regular_prune_skip_layers == ("d",)
    assert config.regular_prune_skip_types == ("Linear",)
    (by_name,), (by_type,) = config.override_layer_configs, config.override_layer_types
    assert (by_name.target, by_name.data, by_name.weight, by_name.prune) == ("e", DataQuant(), None, None)
    assert (by_type.target, by_type.data, by_type.weight) == ("Conv2d", None, WeightSettings())


def test_empty_messages_count_as_present(parse):
    config = parse("retrain_data_quant_config {} retrain_weight_quant_config {}")
    assert config.data == DataQuant()
    assert config.weight == WeightSettings("arq_retrain", 8, None)


def test_clips_are_float32_and_the_ratio_is_what_was_written(parse):
    config = parse(
        "retrain_data_quant_config { ulq_quantize { clip_max_min { clip_max: 0.1 clip_min: -0.1 } } }"
        + ratio("prune_ratio: 0.3")
    )
    assert config.data is not None
    assert (config.data.clip_max, config.data.clip_min) == (0.10000000149011612, -0.10000000149011612)
    assert config.prune == FilterPrune(0.3, True)


def test_a_scalar_given_twice_keeps_the_last_value(parse):
    assert parse("batch_num: 2 batch_num: 5").batch_num == 5


@given(st.floats(0, 1, width=32))
def test_shortest_decimal_is_the_same_float32(value: float):
    short = shortest_decimal(value)
    assert struct.pack("<f", short) == struct.pack("<f", value)
    assert len(repr(short)) <= len(repr(value))


@given(st.integers(1, 9999))
def test_shortest_decimal_gives_back_what_a_user_writes(digits: int):
    written = digits / 10000
    assert shortest_decimal(struct.unpack("<f", struct.pack("<f", written))[0]) == written


@pytest.mark.parametrize(
    ("text", "location", "words"),
    [
        ("batch_num: 1\nbatch_nun: 2\n", ":2:1:", ["'batch_nun'", "did you mean 'batch_num'"]),
        ("\nbatch_num: many", ":2:12:", ["'batch_num'", "many"]),
        ("retrain_data_quant_config {\n ulq_quantize {\n dst_type: INT9 } }", ":3:", ["'dst_type'", "INT9"]),
        ("batch_num: 1\nprune_config {\n", ":2:", ["truncated"]),
        ('skip_layers: "a\n', ":1:14:", ["'skip_layers'", "quote"]),
        ("batch_num: -1", ":1:12:", ["'batch_num'", "-1"]),
        ('skip_layers: ["a",\n 5]', ":2:", ["string"]),
        ("prune_config { ratio: 1 }", ":1:16:", ["'ratio' in PruneConfig", "filter_pruner"]),
        ("{}", ":1:1:", []),
    ],
)
def test_text_that_does_not_parse_gives_file_line_and_field(parse, text: str, location: str, words: list[str]):
    with pytest.raises(ConfigParseError) as caught:
        parse(text)
    message = str(caught.value)
    assert f"job.cfg{location}" in message
    assert all(word in message for word in words)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, text_format.ParseError)
    assert caught.value.GetLine() == int(location.split(":")[1])


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\nbatch_num: 0", 2, ["batch_num", "1 or more"]),
        ("\n\nprune_config {}", 3, ["prune_config", "empty"]),
        ("prune_config {\n filter_pruner {} }", 2, ["balanced_l2_norm_filter_prune is required"]),
        ("prune_config {\n n_out_of_m_pruner {} }", 2, ["l1_selective_prune is required"]),
        (ratio(""), 1, ["prune_ratio is required"]),
        (ratio("\nprune_ratio: 1"), 2, ["prune_ratio", "between 0 and 1"]),
        (ratio("\nprune_ratio: 0"), 2, ["prune_ratio"]),
        (ratio("\nprune_ratio: -0.5"), 2, ["prune_ratio"]),
        (ratio("\nprune_ratio: nan"), 2, ["prune_ratio"]),
        ("retrain_data_quant_config { ulq_quantize {\n dst_type: INT4 } }", 2, ["INT4 activations"]),
        ("retrain_weight_quant_config { arq_retrain {\n dst_type: INT16 } }", 2, ["INT16 weights"]),
        ("retrain_data_quant_config { ulq_quantize { clip_max_min {\n clip_max: 1 } } }", 1, ["clip_min is required"]),
        (
            "retrain_data_quant_config { ulq_quantize { clip_max_min {\n clip_max: -1\n clip_min: -2 } } }",
            2,
            ["greater than 0"],
        ),
        (
            "retrain_data_quant_config { ulq_quantize { clip_max_min {\n clip_max: 1\n clip_min: 0 } } }",
            3,
            ["less than 0"],
        ),
        (
            "retrain_data_quant_config { ulq_quantize { clip_max_min {\n clip_max: inf\n clip_min: -1 } } }",
            2,
            ["finite"],
        ),
        ("\noverride_layer_configs {}", 2, ["layer_name is required"]),
        ('override_layer_types { layer_type: "A" }\noverride_layer_types { layer_type: "A" }', 2, ["'A'", "two"]),
        ('override_layer_configs { layer_name: "a"\n prune_config {} }', 2, ["prune_config", "empty"]),
    ],
)
def test_bad_values_give_file_and_line(parse, text: str, line: int, words: list[str]):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert f"job.cfg:{line}: " in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "job.cfg").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigParseError, match="byte 0 is not UTF-8"):
        parse_config(tmp_path / "job.cfg")
    with pytest.raises(FileNotFoundError):
        parse_config(tmp_path / "missing.cfg")


def test_repeated_skip_names_are_noted(parse, caplog):
    assert parse('skip_layers: "a" skip_layers: "a"').skip_layers == ("a", "a")
    assert "skip_layers names a layer or type more than once" in caplog.text


def test_a_config_can_be_pickled(parse):
    config = parse("batch_num: 4")
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("message", "defaults"),
    [
        ("ActULQquantize", {"dst_type": 1}),
        ("BalancedL2NormFilterPruner", {"ascend_optimized": True}),
        ("L1SelectivePruner", {"n_out_of_m_type": 0, "update_freq": 0}),
        ("AutoChannelPruneConfig", {"ascend_optimized": True, "max_prune_ratio": 1.0, "test_iteration": 1}),
    ],
)
def test_schema_defaults(message: str, defaults: dict[str, object]):
    built = message_class(f"amct_ext.config.{message}")()
    assert {name: getattr(built, name) for name in defaults} == defaults


def test_golden_configurations(golden: Path):
    rejected = {}
    files = sorted(golden.glob("*/compress.cfg"))
    assert files
    for path in files:
        try:
            parse_config(path)
        except ConfigError as error:
            rejected[path.parent.name] = str(error)
    assert set(rejected) == {"cnn_a4w4", "cnn_a4w8_error"}  # AMCT raises ValueError there too
    assert all("INT4 activations" in message for message in rejected.values())
