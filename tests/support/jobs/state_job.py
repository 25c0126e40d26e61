"""Training by the step, and the clips of a model as numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.jobs.retrain_job import optimizer_of, train
from support.models import small
from torch import nn

CONFIGS = small.CONFIGS | {"two_batches_learned": "batch_num: 2\n" + small.LEARNED}


quantizing = pytest.mark.parametrize("name", [name for name in CONFIGS if "quant" in name or "learned" in name])


def clips(model: nn.Module) -> dict[str, float]:
    return {key: float(value) for key, value in model.state_dict().items() if "quant.clip_" in key}


def steps(model: nn.Module, count: int = 5, average: Callable[[], None] = lambda: None) -> None:
    optimizer = optimizer_of(model)
    for i in range(count):
        train(model, optimizer, range(i, i + 1))
        average()


def floats_only(average: nn.Module, model: nn.Module) -> None:
    """As the averages of detection trainers do: counters and flags, which are integers, stay behind."""
    for key, value in average.state_dict().items():
        if value.dtype.is_floating_point:
            value.mul_(0.5).add_(0.5 * model.state_dict()[key])


def copied(source: nn.Module, target: nn.Module, through_data: bool = False) -> nn.Module:
    with torch.no_grad():
        for mine, new in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            (mine.data if through_data else mine).copy_(new)
    return target
