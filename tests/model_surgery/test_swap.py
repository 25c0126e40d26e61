"""Compressed layers are put into a model and taken out again; layers of one input share clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small
from torch import nn

from amct_ext.graph.inputs import parse_inputs
from amct_ext.graph.trace import trace
from amct_ext.model_surgery.session import session_of
from amct_ext.model_surgery.swap import fold_layers, sharing_groups, unreplaceable


def test_fold_gives_the_float_layers_back(tmp_path: Path) -> None:
    job = Job(tmp_path, small.CONFIGS["sparse"])
    model = job.create()
    train(model, optimizer_of(model), range(2))
    expected = evaluate(model)
    plain = fold_layers(model)
    assert type(plain.conv1) is nn.Conv2d and type(plain.fc) is nn.Linear
    assert set(plain.state_dict()) == set(small.build().state_dict())
    assert torch.equal(evaluate_plain(plain), expected)


def evaluate_plain(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(small.batch(50)[0])


@pytest.mark.parametrize(("name", "expected"), [("quant", [("conv1", "down")]), ("sparse_quant", [])])
def test_layers_of_one_input_share_unless_masks_are_on(
    tmp_path: Path, name: str, expected: list[tuple[str, ...]]
) -> None:
    model = Job(tmp_path, small.CONFIGS[name]).create()
    graph = trace(small.build(), small.SAMPLE)
    assert sharing_groups(graph, session_of(model).plan) == expected


def test_a_layer_in_an_array_of_objects_cannot_be_replaced() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(4, 4), nn.Linear(4, 4)
            self.array = np.full(1, self.hidden, dtype=object)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.array[0](self.seen(x))

    net, x = Hidden(), torch.randn(2, 4)
    modules = dict(net.named_modules())
    found = unreplaceable(net, parse_inputs(net, x), ["seen", "hidden"])
    assert list(found) == ["hidden"] and "array of objects" in found["hidden"]
    assert dict(net.named_modules()) == modules
