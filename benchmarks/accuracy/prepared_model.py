"""A network that a method has made ready for the training, and its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from benchmarks.accuracy.training import LossFn, ParamGroup

CALIBRATION_BATCHES = 8


class UnsupportedError(RuntimeError):
    """Why a method cannot run in a setting."""


@dataclass
class PreparedModel:
    """``param_groups``: None puts all parameters into one; ``needs_training``: False: it is evaluated as it is."""

    model: nn.Module
    param_groups: list[ParamGroup] | None = None
    loss_fn: LossFn | None = None
    before_step: Callable[[int], None] | None = None
    needs_training: bool = True


def split_param_groups(
    model: nn.Module, float_names: Iterable[str], lr: float, quantizer_lr_scale: float = 1.0
) -> list[ParamGroup]:
    """Parameters of the float network, and those that a toolkit added: without decay, at a rate relative to ``lr``."""
    known = set(float_names)
    weights: list[nn.Parameter] = []
    added: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (weights if name in known else added).append(parameter)
    param_groups: list[ParamGroup] = [{"params": weights, "lr": lr}]
    if added:
        param_groups.append({"params": added, "lr": lr * quantizer_lr_scale, "weight_decay": 0.0})
    return param_groups
