"""Models of one compressed layer: a sample of each layer type, and a model calibrated on one input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from support import small_models as small
from torch import Tensor, nn

import amct_ext

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


def compressed(model: nn.Module, sample: Tensor, folder: Path, config: str = small.QUANT) -> nn.Module:
    (folder / "c.cfg").write_text(config)
    made = amct_ext.create_compressed_retrain_model(model, sample, str(folder / "c.cfg"), str(folder / "r.txt"))
    made.train()(sample)  # calibrates
    return made
