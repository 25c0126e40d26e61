"""Clips and scales keep at least float32 when the model around them is cast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from amct_ext.layers.precision import KeepsPrecision


class State(KeepsPrecision):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("errors", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(3))


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "to half": lambda model: model.to(torch.float16),
    "to half and meta": lambda model: model.to("meta", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_narrower_types_are_not_taken(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = cast(nn.Sequential(nn.Linear(2, 2), State()))
    state = model[1]
    assert (state.scale.dtype, state.errors.dtype, state.count.dtype) == (torch.float32, torch.float64, torch.int64)
    assert state.scale.device == model[0].weight.device


def test_wider_types_are() -> None:
    state = State().double()
    assert state.scale.dtype == torch.float64
    assert state.float().scale.dtype == torch.float64  # and stay
