"""A compressed model on floats and on integers, side by side."""

from __future__ import annotations

import copy

from torch import nn

import amct_ext


def took_integers(model: nn.Module) -> bool:
    return set(amct_ext.forward_choices(model).values()) == {"integer"}


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of the model on floats and on integers."""
    models = copy.deepcopy(model), copy.deepcopy(model)
    amct_ext.configure(models[1], forward="integer")
    return models
