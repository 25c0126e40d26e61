"""Inputs of the ops on a BatchNorm: shapes, layouts, activation functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Name and bounds, as the ops take them.
ACTIVATIONS: tuple[tuple[str, float | None, float | None], ...] = (
    ("none", None, None),
    ("none", 0.0, None),
    ("none", 0.0, 6.0),
    ("none", -1.0, 1.0),
    ("hardswish", None, None),
)
SHAPES = ((0, 3, 4), (3, 5, 7, 9), (4, 40), (65, 3, 11), (7, 17, 1, 1), (2, 33, 17, 17), (1, 3, 4, 5, 6), (1, 2, 65537))


def layouts_of(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Normal data away from zero, contiguous; of images also channels last and with holes."""
    x = torch.randn(shape) * 2 + 0.5
    yield x
    if x.dim() == 4:
        yield x.to(memory_format=torch.channels_last)
        yield (torch.randn(2 * shape[0], *shape[1:]) * 2 + 0.5)[::2]


@dataclass(frozen=True)
class Sample:
    """A BatchNorm's input with its statistics, parameters, and an activation function."""

    x: Tensor
    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bias: Tensor
    activation: tuple[str, float | None, float | None]

    @staticmethod
    def of(x: Tensor, activation: tuple[str, float | None, float | None]) -> Sample:
        channels = x.shape[1]
        mean, invstd = torch.zeros(channels), torch.ones(channels)
        if x.numel():
            mean, variance = torch.batch_norm_update_stats(x, None, None, 0.1)
            invstd = (variance.double() + 1e-5).sqrt().reciprocal().float()
        return Sample(x, mean, invstd, torch.rand(channels) + 0.5, torch.randn(channels), activation)

    @property
    def arguments(self) -> tuple[object, ...]:
        return self.x, self.mean, self.invstd, self.weight, self.bias, *self.activation


def apply_activation(z: Tensor, activation: tuple[str, float | None, float | None]) -> Tensor:
    """By torch's own function."""
    name, lowest, highest = activation
    if name == "hardswish":
        return functional.hardswish(z)
    if lowest is None:
        return z
    return functional.relu(z) if highest is None else functional.hardtanh(z, lowest, highest)
