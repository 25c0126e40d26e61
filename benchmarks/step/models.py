"""The networks of the step benchmark and their batches: from transformers by their own classes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step.resnet import small_resnet


class Logits(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@dataclass(frozen=True)
class Job:
    """A network and how its batches look."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]  # of so many samples: inputs and labels
    samples: int = 8

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig()))


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return Logits(MobileNetV2ForImageClassification(MobileNetV2Config()))


def vit_small() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size: Any = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
    return Logits(ViTForImageClassification(ViTConfig(**size)))


def bert_small() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size: Any = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 4}
    return Logits(BertForSequenceClassification(BertConfig(**size)))


def images(pixels: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, 3, pixels, pixels), torch.randint(classes, (count,)))


def tokens(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1, 30000, (count, 128)), torch.randint(2, (count,))


JOBS = {
    "ResNet-50": Job(resnet50, images(224, 2)),
    "MobileNetV2": Job(mobilenet_v2, images(224, 2)),
    "ViT-small": Job(vit_small, images(224, 2)),
    "BERT-small": Job(bert_small, tokens),
    "small ResNet": Job(small_resnet, images(32, 10), 32),
}
