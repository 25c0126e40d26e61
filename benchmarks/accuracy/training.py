"""The training that every method gets: AdamW, warm-up and cosine, the task's batches in the same order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WEIGHT_DECAY = 1e-2
_WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Budget:
    """Steps, the highest learning rate, samples per step."""

    steps: int
    lr: float
    batch: int


class TrainingTask(Protocol):
    """What the training asks of a task."""

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]: ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...


ParamGroup = dict[str, Any]
LossFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # input, output, target


def lr_factor(step: int, steps: int) -> float:
    """Learning rate relative to the highest: linear warm-up over 10 % of the steps, then a cosine to 0."""
    warmup = int(steps * _WARMUP_SHARE)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model: nn.Module,
    task: TrainingTask,
    budget: Budget,
    seed: int,
    param_groups: list[ParamGroup] | None = None,
    loss_fn: LossFn | None = None,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Train in place; without ``param_groups`` all parameters at the budget rate, without ``loss_fn`` by the task's."""
    torch.manual_seed(seed)
    param_groups = param_groups or [{"params": list(model.parameters()), "lr": budget.lr}]
    optimizer = torch.optim.AdamW(param_groups, weight_decay=WEIGHT_DECAY)
    highest = [group["lr"] for group in param_groups]
    model.train()
    for step in range(budget.steps):
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * lr_factor(step, budget.steps)
        if before_step is not None:
            before_step(step)
        x, y = task.batch(step, seed)
        output = model(x)
        loss = task.loss(output, y) if loss_fn is None else loss_fn(x, output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
