"""The table of layer types agrees with torch's classes."""

from __future__ import annotations

import pytest
from support.models.single_layer import SAMPLES
from torch import nn

from amct_ext.common.layer_kinds import LAYER_KINDS, QUANTIZABLE, LayerKind, kind_named, kind_of
from amct_ext.layers.classes import standard_class

SIZES = {"RNN": (4, 6), "LSTM": (4, 6), "GRU": (4, 6), "Linear": (4, 6)}


def example(kind: LayerKind) -> nn.Module:
    if kind.widths[0] == kind.widths[1]:
        return kind.cls(4)
    return kind.cls(*SIZES.get(kind.name, (4, 6, 3)))


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
def test_widths_and_axes_are_those_of_the_class(kind: LayerKind) -> None:
    layer = example(kind)
    assert kind_of(layer) is kind
    assert kind_named(kind.name) is kind
    channels = [getattr(layer, name) for name in kind.widths]
    gates = len(kind.onnx_gates) or 1
    weight = getattr(layer, "weight", getattr(layer, "weight_ih_l0", None))
    assert [weight.shape[axis] for axis in kind.weight_axes] == [channels[0], channels[1] * gates]


def test_other_modules_are_of_no_kind() -> None:
    assert kind_of(nn.Embedding(3, 4)) is None
    assert kind_named("relu") is None


def test_every_quantised_type_has_a_compressed_class_and_a_sample() -> None:
    assert {kind.name for kind in LAYER_KINDS if standard_class(example(kind)) is not None} == set(QUANTIZABLE)
    assert {sample.cls.__name__ for sample in SAMPLES.values()} == set(QUANTIZABLE)
