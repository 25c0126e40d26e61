"""Models of one compressed layer: a sample of each layer type, and a model calibrated on one input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.models import small
from torch import Tensor, nn

import amct_ext
from amct_ext.common.layer_kinds import kind_of


@dataclass(frozen=True)
class Sample:
    """A layer of 8 channels, a shape of its input, and the rest of a call, positional and by keyword."""

    cls: type[nn.Module]
    arguments: tuple[int, ...]
    shape: tuple[int, ...]
    rest: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    settings: str = ""  # that its type takes to be quantised, in front of a configuration

    def build(self) -> nn.Module:
        return self.cls(*self.arguments)


STATES = (torch.full((1, 2, 8), 3.0), torch.zeros(1, 2, 8))
# One for each layer type that is quantised; tests/common/test_layer_kinds.py says where one is missing.
SAMPLES = {
    "Conv1d": Sample(nn.Conv1d, (8, 8, 3), (2, 8, 9)),
    "Conv2d": Sample(nn.Conv2d, (8, 8, 3), (2, 8, 6, 6)),
    "Conv3d": Sample(nn.Conv3d, (8, 8, 3), (2, 8, 4, 4, 4)),
    "Linear": Sample(nn.Linear, (8, 8), (4, 8)),
    "ConvTranspose1d": Sample(nn.ConvTranspose1d, (8, 8, 3, 2), (2, 8, 5), ([12],), {"output_size": [12]}),
    "ConvTranspose2d": Sample(nn.ConvTranspose2d, (8, 8, 3, 2), (2, 8, 5, 5), ([12, 11],), {"output_size": [12, 11]}),
    "ConvTranspose3d": Sample(
        nn.ConvTranspose3d, (8, 8, 3, 2), (2, 8, 3, 3, 3), ([8, 7, 8],), {"output_size": [8, 7, 8]}, "profile: BEST\n"
    ),
    "LSTM": Sample(nn.LSTM, (8, 8), (5, 2, 8), (STATES,), {"hx": STATES}),
    "GRU": Sample(nn.GRU, (8, 8), (5, 2, 8), (STATES[0],), {"hx": STATES[0]}),
}
# Variants of the layers without a state; these are also differentiated twice.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(5, 4, 3, padding=1), (2, 5, 9)),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3, stride=2, padding=1, bias=False), (3, 5, 7, 9)),
    "pointwise": (lambda: nn.Conv2d(5, 4, 1), (2, 5, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 5)),
    "same padding": (lambda: nn.Conv2d(5, 4, 2, padding="same"), (2, 5, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 2), (2, 4, 3, 5, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 4, 3, stride=2), (2, 5, 4, 3)),
    "linear": (lambda: nn.Linear(7, 4), (5, 7)),
    "linear on a sequence": (lambda: nn.Linear(7, 4, bias=False), (3, 5, 7)),
    "linear on one vector": (lambda: nn.Linear(7, 4), (7,)),
}


class Chain(nn.Module):
    """A layer behind a ReLU, so that its input is kept by others too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(x) - 0.2)


def can_be_sparse(kind: str) -> bool:
    """Whether the layer of this name in `LAYERS` takes 2:4 sparsity."""
    found = kind_of(LAYERS[kind][0]())
    return found is not None and found.sparse_prunable


def compressed(model: nn.Module, sample: Tensor, folder: Path, config: str = small.QUANT) -> nn.Module:
    (folder / "c.cfg").write_text(config)
    made = amct_ext.create_compressed_retrain_model(model, sample, str(folder / "c.cfg"), str(folder / "r.txt"))
    made.train()(sample)  # calibrates
    return made
