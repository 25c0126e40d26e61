"""The training that every method gets: AdamW, warm-up and cosine, the task's batches in the same order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WEIGHT_DECAY = 1e-2
_WARM_UP = 0.1


@dataclass(frozen=True)
class Budget:
    """Steps, the highest learning rate, samples per step."""

    steps: int
    lr: float
    batch: int


class Lesson(Protocol):
    """What the training asks of a task."""

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]: ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...


Group = dict[str, Any]
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # input, output, target


def rate(step: int, steps: int) -> float:
    """The share of the highest rate: 10 % of the steps rising, then a cosine to 0."""
    warm = int(steps * _WARM_UP)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def train(
    model: nn.Module,
    lesson: Lesson,
    budget: Budget,
    seed: int,
    groups: list[Group] | None = None,
    loss_of: LossOf | None = None,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Trains in place. ``groups``: other parameter groups than all at the budget's rate; ``loss_of``: another loss."""
    torch.manual_seed(seed)
    groups = groups or [{"params": list(model.parameters()), "lr": budget.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    highest = [group["lr"] for group in groups]
    model.train()
    for step in range(budget.steps):
        for group, lr in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = lr * rate(step, budget.steps)
        if before_step is not None:
            before_step(step)
        x, y = lesson.batch(step, seed)
        output = model(x)
        loss = lesson.loss(output, y) if loss_of is None else loss_of(x, output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
