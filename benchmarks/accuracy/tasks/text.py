"""The next byte of torch's docstrings: a small transformer."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.datasets.packages import docstrings
from benchmarks.accuracy.tasks.base import Phase, Task
from benchmarks.accuracy.training import Budget

_BYTES, _LENGTH, _TEST_TEXTS, _TRAINING_SHARE = 128, 96, 384, 0.94


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class ByteTransformer(nn.Module):
    """(batch, 96) bytes to logits (batch, 96, 128)."""

    def __init__(self, width: int = 128, blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(_BYTES, width), nn.Parameter(torch.zeros(_LENGTH, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.ln, self.to_bytes = nn.LayerNorm(width), nn.Linear(width, _BYTES)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.to_bytes(self.ln(x))


class Lm(Task):
    name = "lm"
    about = "byte transformer (3 blocks of 128), trained here on 3.2 MB of torch's docstrings; test on the last 6 %"
    score_name = "bits per byte"
    higher_is_better = False
    decimals = 4
    budget = Budget(steps=80, lr=1.5e-4, batch=16)
    float_training = (Phase(1500, 3e-3),)
    shared_float_model = True

    def load(self) -> None:
        text = self.cached(lambda: {"text": np.frombuffer("\n\n".join(docstrings()).encode(), np.uint8)})["text"].long()
        cut, long = int(len(text) * _TRAINING_SHARE), _LENGTH + 1
        self.text = text[:cut]
        test = text[cut : cut + _TEST_TEXTS * long].reshape(_TEST_TEXTS, long)
        self.test_x, self.test_y = test[:, :-1], test[:, 1:]

    def network(self) -> nn.Module:
        return ByteTransformer()

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen, _ = self.sample_indices(len(self.text) - _LENGTH - 2, step, seed)
        rows = torch.stack([self.text[i : i + _LENGTH + 1] for i in chosen.tolist()])
        return rows[:, :-1], rows[:, 1:]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        likely = F.log_softmax(output, -1).flatten(0, 1)
        return F.kl_div(likely, F.softmax(teacher, -1).flatten(0, 1), reduction="batchmean")

    def score(self, output: Tensor) -> float:
        return float(self.loss(output, self.test_y[: len(output)])) / math.log(2)


class LmSmall(Lm):
    """For a quick check: one block of 64, trained for 200 steps."""

    name = "lm-small"
    about = "byte transformer (1 block of 64), trained here for 200 steps on torch's docstrings"
    budget = Budget(steps=30, lr=3e-4, batch=16)
    float_training = (Phase(200, 5e-3),)

    def network(self) -> nn.Module:
        return ByteTransformer(width=64, blocks=1)
