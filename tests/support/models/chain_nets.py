"""Networks with BatchNorms behind convolutions, compressed twice: fused, and not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import amct_ext

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    lambda: nn.ReLU6(inplace=True),
    nn.Hardswish,
    lambda: nn.Hardswish(inplace=True),
    lambda: nn.Hardtanh(-0.5, 2.0),
    nn.SiLU,
    nn.Identity,
)


class Block(nn.Module):
    """Convolution, BatchNorm, activation function; with the input added where ``residual``."""

    def __init__(
        self, inputs: int, outputs: int, act: nn.Module, kernel: int = 3, groups: int = 1, residual: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.residual:
            y = y + x
        output: Tensor = self.act(y)
        return output


class ChainNet(nn.Module):
    """Blocks of several kinds; ``between`` is what stands between a convolution and the next, in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 8, nn.ReLU())
        self.first = Block(8, 8, nn.ReLU6(), groups=8)
        self.second = Block(8, 8, nn.ReLU(inplace=True), residual=True)
        self.third = Block(8, 12, nn.Hardswish(inplace=True), kernel=1)
        self.conv, self.norm, self.other = nn.Conv2d(12, 10, 3), nn.BatchNorm2d(10), nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 4, 1)
        self.between: Callable[[ChainNet, Tensor], Tensor] = lambda m, y: torch.relu(m.norm(y))

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.second(self.first(self.stem(x))))
        output: Tensor = self.last(self.between(self, self.conv(y))).mean((2, 3))
        return output


def random_net(channels: int, seed: int) -> nn.Module:
    """A few blocks with random activation functions, groups, kernels and residual additions."""
    draw = random.Random(seed)
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(2, 4)):
        outputs = draw.choice([channels, channels, 2 * channels])
        groups = channels if draw.random() < 0.3 else 1
        act = draw.choice(ACTIVATIONS)()
        residual = outputs == channels and draw.random() < 0.5
        blocks.append(Block(channels, outputs, act, draw.choice([1, 3]), groups, residual))
        channels = outputs
    return nn.Sequential(*blocks, nn.Conv2d(channels, 3, 1))


def compressed_pair(model: nn.Module, x: Tensor, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The compressed model twice, in training mode and calibrated on ``x``: fused, and not."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.cfg"
    config.write_text(
        "batch_num: 1 retrain_data_quant_config { ulq_quantize { } } retrain_weight_quant_config { arq_retrain { } }"
    )
    made = amct_ext.create_compressed_retrain_model(model, x, str(config), str(folder / "record.txt"))
    made.train()(x)
    fused, separate = made, copy.deepcopy(made)
    amct_ext.configure(separate, fuse="off")
    return fused, separate
