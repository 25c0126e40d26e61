"""The choice between floats and integers by measurement."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checks.integer_forward import took_integers
from support.models.single_layer import Chain, compressed
from torch import nn

import amct_ext
from amct_ext.layers.products import timing


def test_auto_measures_once_per_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(model, forward="auto")
    clock = iter(range(10**6))
    measured: list[str] = []
    slow = "on_integers"

    def seconds(call: Callable[[], None]) -> float:
        call()
        measured.append(call.__name__)
        return next(clock) * 0 + (2.0 if call.__name__ == slow else 1.0)

    monkeypatch.setattr(timing, "_seconds", seconds)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 4, 8, 8))
    assert measured and amct_ext.forward_choices(model) == {"layer": "float"}
    count = len(measured)
    model(torch.randn(5, 4, 8, 8))
    assert len(measured) == count
    slow = "on_floats"
    model(torch.randn(2, 4, 9, 8))
    assert len(measured) == 2 * count and took_integers(model)
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8))
    assert len(measured) == 3 * count + count // 2 and took_integers(model)  # a third way
    assert before.keys() == model.state_dict().keys()
    chosen = amct_ext.forward_choices(model)
    other = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(other, forward=chosen)
    other(torch.randn(2, 4, 8, 8))
    assert amct_ext.forward_choices(other) == chosen and len(measured) == 3 * count + count // 2


def test_an_evaluation_may_take_a_third_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first evaluation chooses for those that defer results: floats must gain more than a tenth."""
    seconds = {"on_floats": 1.0, "on_integers": 2.0, "on_prepared_floats": 1.05}
    monkeypatch.setattr(timing, "_seconds", lambda call: call() or seconds[call.__name__])
    for net, x in ((nn.Conv2d(4, 4, 3, groups=4), torch.randn(2, 4, 8, 8)), (nn.Linear(6, 3), torch.randn(2, 6))):
        model = compressed(Chain(net), x, tmp_path)
        amct_ext.configure(model, forward="auto")
        model(x)
        assert amct_ext.forward_choices(model) == {"layer": "float"}
        model.eval()
        for _ in range(2):
            with torch.no_grad():
                model(x)
        chosen = amct_ext.forward_choices(model)
        assert chosen == {"layer": "prepared" if isinstance(net, nn.Conv2d) else "float"}
        amct_ext.configure(model, forward=chosen)
        with torch.no_grad():
            model(x)
        assert amct_ext.forward_choices(model) == chosen
