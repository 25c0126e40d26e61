"""The compressed layers of a model by name: shared modules once, names of create after a wrapper was put around one."""

from __future__ import annotations

from pathlib import Path

from support.jobs.retrain_job import Job
from support.models import small
from torch import nn

from amct_ext.model_surgery.lookup import compressed_layers, compressed_modules, layers_by_created_name, planned_layers
from amct_ext.model_surgery.session import session_of

LAYERS = ["stem", "conv1", "conv2", "down", "fc"]


def test_compressed_layers_and_their_plans(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    assert [name for name, _ in compressed_layers(model)] == LAYERS
    assert compressed_modules(model) == [layer for _, layer in compressed_layers(model)]
    assert [plan.name for plan in planned_layers(session_of(model).plan)] == LAYERS
    model.again = model.conv1  # registered twice, one layer
    assert len(compressed_modules(model)) == len(LAYERS)


def test_a_wrapped_layer_keeps_the_name_of_create(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    conv = model.conv1
    model.conv1 = nn.Sequential(conv)
    assert layers_by_created_name(model)["conv1"] == ("conv1.0", conv)
    assert layers_by_created_name(model)["fc"] == ("fc", model.fc)
