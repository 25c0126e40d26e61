"""Quantised LSTM and GRU: training, shapes, states, clips, exact restore, copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs.retrain_job import assert_same_state
from support.jobs.rnn_job import (
    KINDS,
    PER_TENSOR,
    Job,
    batch,
    evaluate,
    every_kind,
    every_setting,
    optimizer_of,
    train,
)
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.flows import saving
from amct_ext.layers.recurrent.rnn import CompressedGRU, CompressedLSTM


@every_kind
@every_setting
def test_weights_are_trained(tmp_path: Path, kind: str, setting: str) -> None:
    """Every parameter gets a gradient, and the recurrent layer's weights alone bring the loss down."""
    model = Job(tmp_path, kind, setting).create()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, range(2))
    for name, value in model.named_parameters():
        assert value.grad is not None and torch.isfinite(value).all(), name
        assert "quant" in name or not torch.equal(value, start[name]), name
    weights = [model.rnn.weight_ih_l0, model.rnn.weight_hh_l0]
    losses = train(model, range(90), torch.optim.SGD(weights, lr=0.5, momentum=0.9))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert torch.isfinite(evaluate(model)).all()


@every_kind
def test_weight_gradients_are_those_of_the_rounded_network(tmp_path: Path, kind: str) -> None:
    """Straight through the weights' rounding: the gradient of a float layer that holds the rounded weights."""
    model = Job(tmp_path, kind).create().train()
    train(model, range(1))
    x, layer = batch(7)[0], model.rnn
    for quantizer in (layer.act_quant, layer.hidden_quant):
        quantizer.num_bits = 16  # as good as float and never clipped, so that the float layer below is comparable
        quantizer.clip_max.data.fill_(8.0)
        quantizer.clip_min.data.fill_(-8.0)
    model.zero_grad()
    layer(x)[0].square().sum().backward()
    plain = KINDS[kind](6, 8)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "quant" not in k})
    with torch.no_grad():
        plain.weight_ih_l0.copy_(layer.weight_quant(layer.weight_ih_l0))
        plain.weight_hh_l0.copy_(layer.hidden_weight_quant(layer.weight_hh_l0))
    plain(x)[0].square().sum().backward()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, value.grad, rtol=2e-3, atol=2e-3)


@every_kind
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_shapes_states_and_structure(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    job = Job(tmp_path, kind, **options)
    model = job.create()
    layer, plain = model.rnn, job.net.rnn
    assert type(layer) in (CompressedLSTM, CompressedGRU) and isinstance(layer, KINDS[kind])
    children = {"act_quant", "hidden_quant", "weight_quant", "hidden_weight_quant"}
    assert {n for n, _ in layer.named_children()} == children
    assert set(plain.state_dict()) <= set(layer.state_dict())
    x = job.sample
    zeros = torch.zeros(1, 4, 8)
    states: Any = (zeros, zeros) if kind == "LSTM" else zeros
    output, last = layer(x, states)
    expected, expected_last = plain(x, states)
    assert output.shape == expected.shape
    for ours, theirs in zip(last, expected_last, strict=True):
        assert ours.shape == theirs.shape
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0)
    missing, _ = layer(x)
    assert torch.equal(missing, output)
    # Two halves with the state handed on are one sequence.
    time = 1 if layer.batch_first else 0
    first, state = layer(x.narrow(time, 0, 2))
    second, _ = layer(x.narrow(time, 2, 3), state)
    torch.testing.assert_close(torch.cat([first, second], time), output)


@every_kind
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"num_layers": 2}, "num_layers is 2"), ({"bidirectional": True}, "bidirectional is True")],
    ids=["layers", "directions"],
)
def test_other_variants_stay_float(tmp_path: Path, kind: str, options: dict[str, Any], reason: str) -> None:
    job = Job(tmp_path, kind, **options)
    if "bidirectional" in options:
        job.net.fc = nn.Linear(16, 3)
    model = job.create()
    assert type(model.rnn) is KINDS[kind]
    assert reason in amct_ext.explain(model)["rnn"].not_quantised


@every_kind
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("setting", ["quant", "two_batches"])
def test_hidden_clips_come_from_the_states_that_are_read(
    tmp_path: Path, kind: str, options: dict[str, Any], setting: str
) -> None:
    """From the initial state to the last but one: the last output is never quantised. AMCT's numbers follow."""
    job = Job(tmp_path, kind, setting, **options)
    plain, model = copy.deepcopy(job.net.rnn), job.create().train()
    states = []
    for x in [job.sample, job.sample * 0.5][: 2 if setting == "two_batches" else 1]:
        model(x)
        output = plain(x)[0].detach()
        output = output.transpose(0, 1) if plain.batch_first else output
        states += [torch.zeros_like(output[:1]), output[:-1]]
    high, low = ops.search_clip_range(torch.cat(states).flatten(), 8)[2:]
    quantizer = model.rnn.hidden_quant
    torch.testing.assert_close((quantizer.clip_max.detach(), quantizer.clip_min.detach()), (high, low))


@every_kind
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_hidden_clips_of_a_single_step(tmp_path: Path, kind: str, start: float) -> None:
    """A zero state alone would give steps of 1, which no later state survives."""
    job = Job(tmp_path, kind)
    plain, model = copy.deepcopy(job.net.rnn), job.create().train()
    state = torch.full((1, 4, 8), start)
    given: Any = (state, state) if kind == "LSTM" else state
    model(job.sample[:1], given)
    expected = plain(job.sample[:1], given)[0].detach() if start == 0 else state
    high = ops.search_clip_range(expected.flatten(), 8)[2]
    torch.testing.assert_close(model.rnn.hidden_quant.clip_max.detach(), high)


@every_kind
def test_fixed_min_only_where_it_is_asked_for(tmp_path: Path, kind: str) -> None:
    """A ReLU in front fixes the input's lower clip; a hidden state has both signs whatever it starts from."""
    job = Job(tmp_path, kind)

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = job.net.rnn, job.net.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(torch.relu(x))[0][-1])

    job.net = Behind()
    model = job.create()
    assert model.rnn.act_quant.fixed_min and not model.rnn.hidden_quant.fixed_min


class BehindRelu(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.before, self.rnn = nn.Linear(6, 6), rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.before(x).relu())[0]


@every_kind
@pytest.mark.parametrize("asked", [None, True])
def test_a_learned_lower_clip_of_amct_survives(tmp_path: Path, kind: str, asked: bool | None) -> None:
    """AMCT sees no ReLU before a layer with the batch axis first, so its checkpoints hold lower clips below 0."""
    setting = (
        small.QUANT if asked is None else small.QUANT.replace("ulq_quantize { }", "ulq_quantize { fixed_min: true }")
    )
    job = Job(tmp_path, kind, setting, batch_first=True)
    job.net = BehindRelu(job.net.rnn)
    model = job.create()
    model.train()(job.sample)
    state = amct_ext.to_amct_state_dict(model)
    keys = [key for key in state if key.startswith("rnn.") and key.endswith(("acts_clip_min", "acts_h_clip_min"))]
    state.update({key: torch.tensor(-0.05) for key in keys})
    restored = job.restore(state)
    evaluate(restored, job.sample)
    expected = -0.05 if asked is None else 0.0
    for quantizer in (restored.rnn.act_quant, restored.rnn.hidden_quant):
        assert float(quantizer.clip_min.detach()) == pytest.approx(expected, abs=float(quantizer.scale))


@every_kind
def test_shared_input_keeps_own_clips(tmp_path: Path, kind: str) -> None:
    job = Job(tmp_path, kind, PER_TENSOR)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc, self.beside = job.net.rnn, job.net.fc, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(x)[0][-1]) + self.beside(x)[-1]

    job.net = Both()
    model = job.create()
    assert model.rnn.act_quant is not None and model.beside.act_quant is not None
    assert model.rnn.act_quant is not model.beside.act_quant
    train(model, range(2))
    assert_same_state(model, job.restore(amct_ext.to_amct_state_dict(model)))


@every_kind
@every_setting
def test_restore_is_exact(tmp_path: Path, kind: str, setting: str) -> None:
    """Training restored half way equals training in one go; so do AMCT's names, and a fresh model."""
    job = Job(tmp_path, kind, setting)
    whole = job.create()
    if setting != "two_batches":  # AMCT's file does not hold the data of an unfinished calibration
        assert_same_state(whole, job.restore(amct_ext.to_amct_state_dict(whole)))
    optimizer = optimizer_of(whole)
    train(whole, range(3), optimizer)
    state, momentum = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    dialect = amct_ext.to_amct_state_dict(whole)
    train(whole, range(3, 6), optimizer)
    halves = []
    for given in (state, dialect):
        half = job.restore(given)
        optimizer = optimizer_of(half)
        optimizer.load_state_dict(copy.deepcopy(momentum))
        train(half, range(3, 6), optimizer)
        assert_same_state(whole, half)
        halves.append(half)
    expected = evaluate(whole)
    assert all(torch.equal(evaluate(half), expected) for half in halves)


@every_kind
def test_copies_are_independent(tmp_path: Path, kind: str) -> None:
    model = Job(tmp_path, kind).create()
    train(model, range(2))
    expected = evaluate(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()]
    train(model, range(2))
    for other in copies:
        assert torch.equal(evaluate(other), expected)
        train(other, range(1))
        plain = saving.to_float_form(other, batch(50)[0]).model
        assert type(plain.rnn) is KINDS[kind] and "quant" not in " ".join(plain.state_dict())
        assert torch.isfinite(evaluate(plain)).all()
