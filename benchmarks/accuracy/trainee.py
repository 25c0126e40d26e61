"""A network that a method has made ready for the training, and the parameter groups it trains in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from benchmarks.accuracy.training import Group, LossOf

CALIBRATION_BATCHES = 8


class NotOfferedError(RuntimeError):
    """A method that cannot do what is asked, with the reason."""


@dataclass
class Trainee:
    """``groups``: None puts all parameters into one; ``trained``: False leaves out the training."""

    model: nn.Module
    groups: list[Group] | None = None
    loss_of: LossOf | None = None
    before_step: Callable[[int], None] | None = None
    trained: bool = True


def groups_beside(model: nn.Module, float_names: Iterable[str], lr: float, quantiser_rate: float = 1.0) -> list[Group]:
    """Parameters of the float network, and those that a toolkit added: without decay, at a rate relative to ``lr``."""
    known = set(float_names)
    weights: list[nn.Parameter] = []
    added: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (weights if name in known else added).append(parameter)
    groups: list[Group] = [{"params": weights, "lr": lr}]
    if added:
        groups.append({"params": added, "lr": lr * quantiser_rate, "weight_decay": 0.0})
    return groups
