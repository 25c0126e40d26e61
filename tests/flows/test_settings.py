"""configure, forward_choices and update_record: what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.jobs.retrain_job import Job
from support.models import small
from torch import nn

import amct_ext
from amct_ext.errors import ModelError
from amct_ext.model_surgery.lookup import compressed_layers


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    return Job(tmp_path, small.QUANT).create()


def settings(model: nn.Module) -> list[tuple[Any, ...]]:
    layers = [layer for _, layer in compressed_layers(model)]
    quantizers = [quantizer for layer in layers for quantizer in layer.own_quantizers]
    return [(layer.product_choice is None,) for layer in layers] + [(q.validate_now, q.stash) for q in quantizers]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"validation": "later"}, "'deferred' or 'eager'"),
        ({"stash": True}, "'rebuild' or 'off'"),
        ({"calibration": "fast"}, "'exact' or 'histogram'"),
        ({"forward": "int8"}, "forward must be 'float', 'auto'"),
        ({"forward": {"conv9": "integer"}}, "no compressed layer 'conv9'"),
    ],
)
def test_wrong_values_change_nothing(model: nn.Module, wrong: dict[str, Any], words: str) -> None:
    before = settings(model)
    others = {"validation": "eager", "stash": "off", "forward": "integer"}
    with pytest.raises(ValueError, match=words):
        amct_ext.configure(model, **{**others, **wrong})
    assert settings(model) == before


def test_settings_are_those_of_one_model(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Job(tmp_path / "other", small.QUANT).create()
    before = settings(other)
    amct_ext.configure(model, validation="eager", stash="off")
    assert settings(model) != before and settings(other) == before
    amct_ext.configure(model, validation="deferred", stash="rebuild")
    assert settings(model) == before


def test_choices_can_be_repeated(model: nn.Module) -> None:
    model.train()(small.SAMPLE)
    amct_ext.configure(model, forward={"conv1": "integer"})
    model.eval()(small.SAMPLE)
    choices = amct_ext.forward_choices(model)
    assert choices["conv1"] == "integer" and set(choices.values()) == {"integer", "float"}
    amct_ext.configure(model, forward="float")
    amct_ext.configure(model, forward=choices)
    model(small.SAMPLE)
    assert amct_ext.forward_choices(model) == choices


@pytest.mark.parametrize("function", [amct_ext.configure, amct_ext.forward_choices, amct_ext.shift_bits])
def test_float_models_are_refused(function: Any) -> None:
    with pytest.raises(ModelError):
        function(small.build())
