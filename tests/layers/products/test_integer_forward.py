"""The integer forward: its settings, exact results, and what it keeps between forwards."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.checks.integer_forward import both, took_integers
from support.checks.saved_tensors import Watch
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from support.models.single_layer import Chain, compressed
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.model_surgery.lookup import compressed_layers


def test_settings(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    with pytest.raises(ValueError, match="'float', 'auto', 'integer' or 'prepared'"):
        amct_ext.configure(model, forward="fast")
    with pytest.raises(ValueError, match="no compressed layer 'nowhere'"):
        amct_ext.configure(model, forward={"nowhere": "integer"})
    amct_ext.configure(model, forward="integer")
    model(small.batch(0)[0])
    assert took_integers(model)
    amct_ext.configure(model, validation="deferred")
    model(small.batch(0)[0])
    assert took_integers(model)
    amct_ext.configure(model, forward="float")
    model(small.batch(0)[0])
    assert set(amct_ext.forward_choices(model).values()) == {"float"}


def test_the_result_is_the_exact_one(tmp_path: Path) -> None:
    """Against float64 on the codes; the float path is off by its rounding, the integer path is not."""
    model = compressed(nn.Sequential(nn.Conv2d(30, 40, 3, padding=1)), torch.randn(2, 30, 9, 9), tmp_path)
    amct_ext.configure(model, forward="integer")
    layer, x = model[0], torch.randn(2, 30, 9, 9)
    y = model(x)
    scale, offset = layer.act_quant.scale, layer.act_quant.offset
    codes = torch.clamp(torch.round(x / scale + offset), -128, 127).double() - offset
    weight = ops.quantize_weight(layer.weight.detach(), layer.weight_quant.scale, 8, 0).double()
    sums = F.conv2d(codes, weight, None, padding=1)
    factors = scale.double() * layer.weight_quant.scale.double()
    exact = sums * factors.view(-1, 1, 1) + layer.bias.detach().double().view(-1, 1, 1)
    assert torch.equal(y, exact.float())


def test_a_shared_input_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    amct_ext.configure(model, forward="integer")
    model(small.batch(0)[0])
    made: list[Watch] = []
    real = ops.ulq_quantize

    def watched(*args: object) -> tuple[Tensor, ...]:
        result = real(*args)
        made.append(Watch(result[0]))
        return result

    monkeypatch.setattr(ops, "ulq_quantize", watched)
    y = model(small.batch(1)[0])
    layers = [layer for _, layer in compressed_layers(model)]
    assert len(made) == sum(layer.act_quant is not None for layer in layers) < len(layers)
    assert all(w.freed for w in made)  # nothing in the graph holds the codes
    y.sum().backward()


def test_evaluation_keeps_the_weight_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.CONFIGS["sparse_quant"]).create()
    train(model, optimizer_of(model), range(1))
    amct_ext.configure(model, forward="integer")
    model.eval()
    packed: list[tuple[int, ...]] = []
    real = ops.pack_weight
    monkeypatch.setattr(ops, "pack_weight", lambda *a: packed.append(a[0].shape) or real(*a))
    x, layers = small.batch(3)[0], len(list(compressed_layers(model)))

    def evaluated() -> tuple[Tensor, int]:
        packed.clear()
        with torch.no_grad():
            return model(x), len(packed)

    first, count = evaluated()
    assert count == layers
    assert evaluated()[1] == 0
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copied(x), first)
        model.conv1.weight[0] *= 2
    changed, count = evaluated()
    assert count == 1 and not torch.equal(changed, first)
    model.load_state_dict(copied.state_dict())
    again, count = evaluated()
    assert count == layers and torch.equal(again, first)
    model.conv1.sparsity.mask.logical_not_()
    assert evaluated()[1] == 1
    model.conv1.weight.data.mul_(2)  # as averaged weights are swapped in; no version tells
    assert model.eval() is model and evaluated()[1] == layers
    train(model, optimizer_of(model), range(1, 2))
    model.eval()
    assert evaluated()[1] == layers


def test_evaluation_gathers_shifts(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    plain, model = both(model)
    x = small.batch(1)[0]
    for each in (plain, model):
        each.eval()
        with torch.no_grad():
            each(x)
    assert took_integers(model)
    assert amct_ext.shift_bits(model).keys() == amct_ext.shift_bits(plain).keys()


def test_nan_is_noticed(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path)
    amct_ext.configure(model, forward="integer", validation="eager")
    with pytest.raises(amct_ext.AmctError, match="NaN or Inf"):
        model(torch.full((3, 8), math.nan))
