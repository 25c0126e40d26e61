"""Speech or not in each chunk: Silero VAD on espeak-ng's voices under noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.datasets.packages import silero_weights
from benchmarks.accuracy.datasets.speech import spectrum, speech
from benchmarks.accuracy.statistics import area_under_curve
from benchmarks.accuracy.tasks.base import Phase, Task
from benchmarks.accuracy.training import Budget

_STFT = "stft_conv.weight"


class SileroVad(nn.Module):
    """Silero VAD behind its spectrum: (batch, chunks, 129, 4) to logits (batch, chunks)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, chunks = x.shape[:2]
        x = x.flatten(0, 1)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        x, _ = self.lstm(x.squeeze(-1).unflatten(0, (batch, chunks)).transpose(0, 1))
        return self.final_conv(F.relu(x).permute(1, 2, 0)).squeeze(1)


class Vad(Task):
    name = "vad"
    about = (
        "Silero VAD (4 Conv1d, LSTM, Conv1d) with the weights of its package, adapted here; 60 espeak-ng voices in "
        "8 languages under 7 kinds of noise, test on 24 others"
    )
    score_name = "area under the ROC curve over chunks, %"
    decimals = 3
    budget = Budget(steps=100, lr=2e-4, batch=16)
    # The convolutions stay still at first: it is the shipped ones whose outputs have heavy tails.
    float_training = (Phase(400, 1e-3, ("conv",)), Phase(250, 3e-4))
    shared_float_model = True
    heavy_tails = True  # the LSTM's input: 99.9 % below 10, single values in the hundreds

    def load(self) -> None:
        self.weights = silero_weights()
        data = self.cached(lambda: speech(self.cache))
        kernel = self.weights[_STFT]
        self.x, self.y = spectrum(data["x"].float(), kernel), data["y"]
        self.test_x, self.test_y = spectrum(data["xt"].float(), kernel), data["yt"]

    def network(self) -> nn.Module:
        model = SileroVad()
        state = {}
        for name, value in self.weights.items():
            if name.startswith("lstm"):
                name = name.replace("lstm_cell", "lstm") + "_l0"
            if name != _STFT:
                state[name] = value
        model.load_state_dict(state)
        return model

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        chosen, _ = self.sample_indices(len(self.x), step, seed)
        return self.x[chosen], self.y[chosen]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target)

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(output, torch.sigmoid(teacher))

    def score(self, output: Tensor) -> float:
        return 100 * area_under_curve(output.flatten(), self.test_y[: len(output)].flatten() > 0.5)
