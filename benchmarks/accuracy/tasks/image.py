"""Images: small MobileNetV2 networks on distorted MNIST and on scikit-learn's digits."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.datasets.images import distort
from benchmarks.accuracy.datasets.packages import mnist_5k, sklearn_digits
from benchmarks.accuracy.tasks.base import Phase, Task
from benchmarks.accuracy.training import Budget

_WIDTHS = (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)  # inputs, outputs, stride


class Inverted(nn.Module):
    """MobileNetV2's inverted bottleneck."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int = 3) -> None:
        super().__init__()
        hidden = inputs * factor
        self.same = stride == 1 and inputs == outputs
        self.expand, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.expand(x)))
        y = F.relu(self.bn2(self.depth(y)))
        y = self.bn3(self.project(y))
        return x + y if self.same else y


class MobileNet(nn.Module):
    """(batch, 1, size, size) to logits (batch, 10); ``top`` is the width of the last 1 x 1 convolution, 0: none."""

    def __init__(self, stem_stride: int, top: int) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Inverted(*widths) for widths in _WIDTHS))
        last = _WIDTHS[-1][1]
        self.has_top = top > 0
        if self.has_top:
            self.top, self.bn_top = nn.Conv2d(last, top, 1, bias=False), nn.BatchNorm2d(top)
        self.classifier = nn.Linear(top or last, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        if self.has_top:
            x = F.relu(self.bn_top(self.top(x)))
        return self.classifier(x.mean((2, 3)))


class Classification(Task):
    """Classes by cross entropy; distillation at temperature 2."""

    score_name = "accuracy, %"
    classifier = "classifier"

    @abstractmethod
    def load(self) -> None: ...

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        likely, target = F.log_softmax(output / 2, 1), F.softmax(teacher / 2, 1)
        return 4 * F.kl_div(likely, target, reduction="batchmean")

    def score(self, output: Tensor) -> float:
        return 100 * float((output.argmax(1) == self.test_y[: len(output)]).float().mean())


class Mobile(Classification):
    name = "mobile"
    about = (
        "small MobileNetV2 (5 blocks), trained here on 4,000 MNIST digits, turned, sheared, dimmed, under noise; "
        "test on 1,000 others, 4 times each"
    )
    budget = Budget(steps=200, lr=1e-3, batch=64)
    float_training = (Phase(900, 4e-3),)
    keep_8_bits = ("stem",)

    def load(self) -> None:
        x, y = mnist_5k()
        self.x, self.y = x[:4000], y[:4000]
        generator = torch.Generator().manual_seed(1)
        self.test_x = torch.cat([distort(x[4000:], generator) for _ in range(4)])[: 62 * 64]
        self.test_y = y[4000:].repeat(4)[: 62 * 64]

    def network(self) -> nn.Module:
        return MobileNet(stem_stride=2, top=96)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen, generator = self.sample_indices(len(self.x), step, seed)
        return distort(self.x[chosen], generator), self.y[chosen]


class Digits(Classification):
    name = "digits"
    about = (
        "the same kind of network on scikit-learn's digits of 8 x 8 pixels, moved by a pixel, under noise; trained "
        "here for 300 steps; test on 500 others, 4 times each"
    )
    budget = Budget(steps=40, lr=1e-3, batch=64)
    float_training = (Phase(300, 4e-3),)
    keep_8_bits = ("stem",)

    def load(self) -> None:
        x, y = sklearn_digits()
        self.x, self.y = x[:1297], y[:1297]
        noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(5))
        self.test_x = (x[1297:].repeat(4, 1, 1, 1) + 0.3 * noise)[: 31 * 64]
        self.test_y = y[1297:].repeat(4)[: 31 * 64]

    def network(self) -> nn.Module:
        return MobileNet(stem_stride=1, top=0)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen, generator = self.sample_indices(len(self.x), step, seed)
        down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
        moved = torch.roll(self.x[chosen], (down, right), (2, 3))
        return moved + 0.3 * torch.randn(moved.shape, generator=generator), self.y[chosen]
