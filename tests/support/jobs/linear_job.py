"""A job on two linear layers, and what its saved file computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.checks.onnx_run import run_onnx
from support.models import small
from torch import Tensor, nn

import amct_ext

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


Change = Callable[[nn.Module], Any]


class Job:
    def __init__(self, folder: Path, config: str = small.QUANT) -> None:
        self.config, self.record, self.out = str(folder / "c.cfg"), str(folder / "r.txt"), str(folder / "net")
        (folder / "c.cfg").write_text(config)

    def create(self, net: nn.Module) -> Any:
        return amct_ext.create_compressed_retrain_model(net, X, self.config, self.record)

    def save(self, model: nn.Module) -> Tensor:
        """Save, and what the fake-quant file computes."""
        amct_ext.save_compressed_retrain_model(model, self.record, self.out, X)
        return run_onnx(Path(f"{self.out}_fake_quant_model.onnx"), X)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(X).pow(2).mean().backward()
        optimizer.step()


def close(seen: Tensor, want: Tensor) -> bool:
    return bool((seen - want).abs().max() < 0.02 * want.abs().max())
