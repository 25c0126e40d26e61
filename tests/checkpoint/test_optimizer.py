"""An AMCT job's optimizer goes on here: its parameters in their order, moments, options, shared clips."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden.deviations import WITHOUT_MODEL
from support.golden.run import Case, case_names
from support.jobs import rnn_job
from support.jobs.retrain_job import Job, assert_same_state, train
from support.models import small
from torch import nn

import amct_ext
from amct_ext.checkpoint.optimizer import amct_parameters

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


def as_amct(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, Any]:
    """The state that AMCT's optimizer over its model.parameters() would have: other positions, more parameters."""
    named = dict(model.named_parameters())
    state = {}
    for index, ours in enumerate(amct_parameters(model).values()):
        if ours is not None and named[ours] in optimizer.state:
            state[index] = copy.deepcopy(optimizer.state[named[ours]])
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} | options
    return {"state": state, "param_groups": [{**group, "params": list(range(len(amct_parameters(model))))}]}


@pytest.mark.parametrize("name", [name for name in case_names() if name not in WITHOUT_MODEL])
def test_parameters_are_those_of_amct_in_its_order(golden: Path, tmp_path: Path, name: str) -> None:
    case = Case(golden, name, tmp_path)
    assert list(amct_parameters(case.created)) == case.facts["named_parameters"]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("name", ["quant", "learned", "filter_quant", "sparse_learned", "mixed_quant"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, kind: str, name: str) -> None:
    job = Job(tmp_path, small.CONFIGS[name])
    whole = job.create()
    optimizer = OPTIMIZERS[kind](whole.parameters())
    train(whole, optimizer, range(3))
    torch.save({"model": amct_ext.to_amct_state_dict(whole)}, tmp_path / "amct.pth")
    saved = as_amct(whole, optimizer, lr=2e-3, initial_lr=0.1, max_lr=0.1, min_lr=1e-6)  # of OneCycleLR, too
    assert len(saved["param_groups"][0]["params"]) > len(list(whole.parameters()))
    half = job.restore(tmp_path / "amct.pth")
    resumed = OPTIMIZERS[kind](half.parameters())
    resumed.load_state_dict(amct_ext.from_amct_optimizer_state_dict(half, resumed, saved))
    assert resumed.param_groups[0]["lr"] == 2e-3 and resumed.param_groups[0]["initial_lr"] == 0.1
    assert len(resumed.state) == len(optimizer.state)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, resumed.state[b][key]), key
    optimizer.param_groups[0]["lr"] = 2e-3
    train(whole, optimizer, range(3, 5))
    train(half, resumed, range(3, 5))
    assert_same_state(whole, half)


@rnn_job.every_kind
def test_recurrent_layers(tmp_path: Path, kind: str) -> None:
    """AMCT trains the biases of its second copy."""
    model = rnn_job.Job(tmp_path, kind).create()
    names = amct_parameters(model)
    assert names["rnn.quant_module.comp_module.bias_ih_l0"] == "rnn.bias_ih_l0"
    assert names["rnn.quant_module.replaced_module.bias_ih_l0"] is None
    assert names["rnn.quant_module.replaced_module.weight_hh_l0"] == "rnn.weight_hh_l0"
    assert names["rnn.quant_module.acts_h_clip_max"] == "rnn.hidden_quant.clip_max"
    assert sorted(filter(None, names.values())) == sorted(name for name, _ in model.named_parameters())


def test_a_shared_clip_is_one_parameter(tmp_path: Path) -> None:
    """conv1 and down read one tensor; AMCT lists its clips once, at the layer that was registered first."""
    model = Job(tmp_path, small.QUANT).create()
    names = amct_parameters(model)
    clips = [name for name in names if "clip_max" in name]
    assert "conv1.quant_module.acts_clip_max" in clips and not any(name.startswith("down.") for name in clips)
    values = [value for value in names.values() if value is not None]
    assert len(values) == len(set(values)) == len(list(model.parameters()))


@pytest.fixture
def made(tmp_path: Path) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    model = Job(tmp_path, small.QUANT).create()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    train(model, optimizer, range(1))
    return model, optimizer, as_amct(model, optimizer)


def test_what_is_left_out_is_named(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, state = made
    names = list(amct_parameters(model))
    state["state"][names.index("stem.quant_module.wts_scales")] = {"momentum_buffer": torch.ones(8)}
    with caplog.at_level(logging.INFO, "amct_ext"):
        amct_ext.from_amct_optimizer_state_dict(model, optimizer, state)
    levels = {record.levelname: record.getMessage() for record in caplog.records}
    assert levels["WARNING"].endswith(": stem.quant_module.wts_scales")
    assert "fc.quant_module.wts_offsets" in levels["INFO"] and "stem.quant_module.wts_offsets" in levels["INFO"]


@pytest.mark.parametrize("kept", ["names", "param_names"])
def test_groups(made: Any, kept: str) -> None:
    """Clips in a group of their own with another learning rate, the classifier's weight not trained at all."""
    model, optimizer, state = made
    names = list(amct_parameters(model))
    clips = [name for name in names if "clip" in name]
    others = [name for name in names if name not in clips and not name.startswith("fc.quant_module.replaced_module")]
    (group,) = state["param_groups"]
    moments = {name: state["state"].get(names.index(name)) for name in names}
    groups = [
        {**group, "params": list(range(len(clips))), "lr": 0.5},
        {**group, "params": list(range(len(clips), len(clips) + len(others))), "lr": 0.25},
    ]
    state = {"param_groups": groups, "state": {i: moments[n] for i, n in enumerate(clips + others) if moments[n]}}
    if kept == "param_names":
        for part, held in zip(groups, (clips, others), strict=True):
            part["param_names"] = [f"module.{name}" for name in held]
    ours = [
        [p for n, p in model.named_parameters() if "clip" in n],
        [p for n, p in model.named_parameters() if "clip" not in n and n not in ("fc.weight", "fc.bias")],
    ]
    fresh = torch.optim.SGD([{"params": part} for part in ours], lr=0.01, momentum=0.9)
    given = {"names": clips + others} if kept == "names" else {}
    fresh.load_state_dict(amct_ext.from_amct_optimizer_state_dict(model, fresh, state, **given))
    assert [part["lr"] for part in fresh.param_groups] == [0.5, 0.25]
    for parameter in ours[0] + ours[1]:
        assert torch.equal(fresh.state[parameter]["momentum_buffer"], optimizer.state[parameter]["momentum_buffer"])
    if kept == "names":
        with pytest.raises(ValueError, match="2 groups"):
            amct_ext.from_amct_optimizer_state_dict(model, fresh, state)
        with pytest.raises(ValueError, match="alike"):
            amct_ext.from_amct_optimizer_state_dict(model, optimizer, state, **given)


def test_what_does_not_fit(made: Any) -> None:
    model, optimizer, state = made
    translate = amct_ext.from_amct_optimizer_state_dict
    with pytest.raises(ValueError, match="no parameter of AMCT's"):
        translate(model, optimizer, state, ["weight"] * len(state["param_groups"][0]["params"]))
    with pytest.raises(ValueError, match="another kind"):
        translate(model, torch.optim.AdamW(model.parameters()), state)
    state["state"][next(iter(state["state"]))] = {"momentum_buffer": torch.ones(3)}
    with pytest.raises(RuntimeError, match="momentum_buffer of stem"):
        translate(model, optimizer, state)
    state["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="2 parameters"):
        translate(model, optimizer, state)
    with pytest.raises(RuntimeError, match=r"create_\*"):
        translate(small.build(), optimizer, state)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"state": {}},
        {"state": {}, "param_groups": []},
        {"state": {}, "param_groups": [{"lr": 1.0}]},
        {"state": [], "param_groups": [{"params": [0]}]},
        {"state": {0: 3}, "param_groups": [{"params": [0]}]},
        {"model": {}, "optimizer": {}},
        None,
    ],
)
def test_what_is_no_state_of_an_optimizer(made: Any, state: Any) -> None:
    model, optimizer, _ = made
    with pytest.raises(RuntimeError, match="must be what an optimizer's state_dict"):
        amct_ext.from_amct_optimizer_state_dict(model, optimizer, state)
