"""One model of the list."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A model: how it is built, and its arguments. `package`: what must be installed (its import name)."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]


def images(size: int, channels: int = 3, batch: int = 2, dims: int = 2) -> Callable[[], tuple[Any, ...]]:
    """A batch of square images or of cubes."""
    return lambda: (torch.rand(batch, channels, *[size] * dims),)


def member(package: str, path: str) -> Any:
    """`member("timm", "models.resnet.ResNet")`, imported when it is asked for."""
    module, _, name = f"{package}.{path}".rpartition(".")
    return getattr(importlib.import_module(module), name)


def tokens(batch: int = 2, length: int = 16, vocabulary: int = 200) -> Callable[[], tuple[Any, ...]]:
    """Token numbers."""

    def make() -> tuple[Tensor, ...]:
        return (torch.randint(3, vocabulary, (batch, length)),)

    return make
