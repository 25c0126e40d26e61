"""A compressed model on floats and on integers, side by side."""

from __future__ import annotations

import copy

from torch import Tensor, nn

import amct_ext


def took_integers(model: nn.Module) -> bool:
    return set(amct_ext.forward_choices(model).values()) == {"integer"}


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Copies of the model on floats and on integers."""
    models = copy.deepcopy(model), copy.deepcopy(model)
    amct_ext.configure(models[1], forward="integer")
    return models


def output_and_gradients(model: nn.Module, x: Tensor, factors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients for an upstream gradient that does not depend on it."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.backward(factors.to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), {"input": leaf.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
