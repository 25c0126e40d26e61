"""What every task has: a float network, batches by (step, seed), a loss, a score on test data, a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from benchmarks.accuracy.training import Budget, train

_CALIBRATION, _CALIBRATION_SEED = 10_000, 5  # step and seed of calibration batches: no training run draws them
_EXAMPLE_SEED = 77


@dataclass(frozen=True)
class Phase:
    """A part of the float network's training; ``frozen``: prefixes of the parameters that do not train in it."""

    steps: int
    lr: float
    frozen: tuple[str, ...] = ()


class Task(ABC):
    """Data, network, loss and score. Data that is made here and float weights are kept in ``cache``."""

    name: ClassVar[str]
    about: ClassVar[str]
    score_name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    decimals: ClassVar[int] = 2
    budget: ClassVar[Budget]
    float_training: ClassVar[tuple[Phase, ...]]
    shared_float_model: ClassVar[bool] = False
    keep_8_bits: ClassVar[tuple[str, ...]] = ()  # layers whose weights keep 8 bits where the others have 4
    heavy_tails: ClassVar[bool] = False  # peers take ranges that leave out 0.1 % of the values, else 0.01 %
    classifier: ClassVar[str] = ""  # the layer whose outputs are no channels to remove

    test_x: Tensor
    test_y: Tensor

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Reads the data."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The float network before its training."""

    @abstractmethod
    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, drawn from the training data by step and seed alone."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...

    @abstractmethod
    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        """How far the outputs are from those of the float network."""

    @abstractmethod
    def score(self, output: Tensor) -> float:
        """Of the outputs for the test inputs."""

    @property
    def percentile(self) -> float:
        """The share of the values, in %, that lies within the ranges of peers that take a percentile."""
        return 99.9 if self.heavy_tails else 99.99

    def calibration(self, count: int) -> list[Tensor]:
        """Inputs of batches of the training data that no step sees."""
        return [x for x, _ in self.labelled_calibration(count)]

    def labelled_calibration(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The same with their targets."""
        return [self.batch(_CALIBRATION + i, _CALIBRATION_SEED) for i in range(count)]

    def example(self) -> Tensor:
        """A batch to trace the network with."""
        return self.batch(0, _EXAMPLE_SEED)[0]

    def sample_indices(self, count: int, step: int, seed: int) -> tuple[Tensor, torch.Generator]:
        """Indices below ``count`` for a batch, and the generator for what else is random in it."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return torch.randint(count, (self.budget.batch,), generator=generator), generator

    def cached(self, make: Callable[[], Mapping[str, ArrayLike]]) -> dict[str, Tensor]:
        """The arrays of this task's data file, which the first call writes."""
        path = self.cache / f"{self.name}.npz"
        if not path.exists():
            np.savez(path, **make())  # type: ignore[arg-type]
        with np.load(path) as file:
            return {key: torch.from_numpy(file[key]) for key in file}

    def float_model(self, seed: int) -> nn.Module:
        """The trained float network; one for each seed, or with ``shared_float_model`` one for all."""
        seed = 0 if self.shared_float_model else seed
        torch.manual_seed(seed)
        model = self.network()
        path = self.cache / f"{self.name}_float{seed}.pt"
        if not path.exists():
            for number, phase in enumerate(self.float_training):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(not name.startswith(phase.frozen))
                train(model, self, Budget(phase.steps, phase.lr, self.budget.batch), 1000 + seed + number)
            torch.save(model.state_dict(), path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The score in evaluation mode; batches are all of the budget's size, for exported graphs take no other."""
        model.eval()
        full = [x for x in self.test_x.split(self.budget.batch) if len(x) == self.budget.batch]
        return self.score(torch.cat([model(x) for x in full]))
