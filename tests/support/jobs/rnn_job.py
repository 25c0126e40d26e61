"""A retraining job on a small recurrent model, shared by the tests of LSTM and GRU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small
from torch import Tensor, nn

import amct_ext

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU}
PER_TENSOR = small.QUANT.replace("arq_retrain { }", "arq_retrain { channel_wise: false }")
LEARNED_PER_TENSOR = small.LEARNED.replace("ulq_retrain { }", "ulq_retrain { channel_wise: false }")
INT4 = small.QUANT.replace("arq_retrain { }", "arq_retrain { dst_type: INT4 }")
SETTINGS = {
    "quant": small.QUANT,
    "per_tensor": PER_TENSOR,
    "learned": small.LEARNED,
    "learned_per_tensor": LEARNED_PER_TENSOR,
    "int4": INT4,
    "two_batches": "batch_num: 2\n" + small.QUANT,
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_setting = pytest.mark.parametrize("setting", list(SETTINGS))


class Net(nn.Module):
    """A recurrent layer whose last output is classified."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = KINDS[kind](6, 8, **options)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        y, _ = self.rnn(x, state)
        return self.fc(y[:, -1] if self.rnn.batch_first else y[-1])


def batch(i: int, steps: int = 5, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(steps, size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


class Job:
    """One job in a folder of its own."""

    def __init__(self, folder: Path, kind: str, setting: str = "quant", **options: Any) -> None:
        torch.manual_seed(0)
        self.folder, self.net = folder, Net(kind, **options)
        self.config, self.record = folder / "c.cfg", folder / "record.txt"
        self.config.write_text(SETTINGS.get(setting, setting))
        x = batch(-1)[0]
        self.sample = x.transpose(0, 1) if self.net.rnn.batch_first else x

    def create(self) -> nn.Module:
        return amct_ext.create_compressed_retrain_model(self.net, self.sample, str(self.config), str(self.record))

    def restore(self, state: Any) -> nn.Module:
        torch.save(state, self.folder / "state.pth")
        return amct_ext.restore_compressed_retrain_model(
            self.net, self.sample, str(self.config), str(self.record), str(self.folder / "state.pth")
        )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    scales = [value for name, value in named.items() if name.endswith("weight_quant.scale")]
    others = [value for name, value in named.items() if not name.endswith("weight_quant.scale")]
    return torch.optim.SGD([{"params": others}, {"params": scales, "lr": 1e-4}], lr=0.02, momentum=0.9)


def train(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    optimizer = optimizer or optimizer_of(model)
    model.train()
    losses = []
    for i in steps:
        x, y = batch(i % 3)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def evaluate(model: nn.Module, x: Tensor | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch(50)[0] if x is None else x)
