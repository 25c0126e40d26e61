"""Time series: which exercise a smart watch feels; convolutions and a GRU on seglearn's recordings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.datasets.packages import watch_recordings
from benchmarks.accuracy.tasks.base import Phase
from benchmarks.accuracy.tasks.image import Classification
from benchmarks.accuracy.training import Budget

_WINDOW, _TEST_STEP = 128, 64  # samples at 50 Hz
_TEST_PERSONS = (8, 9, 10)


class ConvGru(nn.Module):
    """(batch, 6, 128) to logits (batch, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(6, 32, 5, 2, 2, bias=False), nn.BatchNorm1d(32)
        self.conv2, self.bn2 = nn.Conv1d(32, 64, 5, 2, 2, bias=False), nn.BatchNorm1d(64)
        self.conv3, self.bn3 = nn.Conv1d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm1d(64)
        self.gru = nn.GRU(64, 64)
        self.classifier = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        states, _ = self.gru(x.permute(2, 0, 1))
        return self.classifier(states.mean(0))


class Watch(Classification):
    name = "watch"
    about = (
        "3 Conv1d with BatchNorm, GRU, Linear, trained here for 500 steps on seglearn's smart watch recordings "
        "(6 channels, 7 exercises, 7 persons); test on 3 other persons"
    )
    budget = Budget(steps=60, lr=5e-4, batch=32)
    float_training = (Phase(500, 3e-3),)
    keep_8_bits = ("conv1",)

    def load(self) -> None:
        recordings = watch_recordings()
        train = [(x.T, y) for x, y, person in recordings if person not in _TEST_PERSONS]
        together = torch.cat([x for x, _ in train], 1)
        self.mean, self.deviation = together.mean(1, keepdim=True), together.std(1, keepdim=True)
        self.train = [((x - self.mean) / self.deviation, y) for x, y in train]
        windows, labels = [], []
        for x, y, person in recordings:
            if person in _TEST_PERSONS:
                cut = ((x.T - self.mean) / self.deviation).unfold(1, _WINDOW, _TEST_STEP).transpose(0, 1)
                windows.append(cut)
                labels += [y] * len(cut)
        # Every batch has windows of every exercise.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        whole = len(labels) // self.budget.batch * self.budget.batch
        self.test_x, self.test_y = torch.cat(windows)[order][:whole], torch.tensor(labels)[order][:whole]

    def network(self) -> nn.Module:
        return ConvGru()

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Windows from anywhere in the recordings, louder or softer, under noise."""
        chosen, generator = self.sample_indices(len(self.train), step, seed)
        offsets = torch.rand(len(chosen), generator=generator).tolist()
        windows, labels = [], []
        for i, offset in zip(chosen.tolist(), offsets, strict=True):
            x, y = self.train[i]
            begin = int(offset * (x.shape[1] - _WINDOW))
            windows.append(x[:, begin : begin + _WINDOW])
            labels.append(y)
        x = torch.stack(windows) * (1 + 0.2 * torch.randn(len(chosen), 1, 1, generator=generator))
        return x + 0.1 * torch.randn(x.shape, generator=generator), torch.tensor(labels)
