"""A small trained model to save, and what its file computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.checks.onnx_run import onnx_outputs
from torch import Tensor, nn

import amct_ext

X = torch.randn(4, 4, 6, 6)


class Net(nn.Module):
    """`ones` and `tensor` take the default type."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.b(torch.relu(self.bn(self.a(x))) + torch.ones(8, 1, 1))
        return self.fc(x.mean((2, 3)) * torch.tensor(0.5))


def trained(folder: Path, net: nn.Module, config: str, x: Any = X) -> tuple[nn.Module, str]:
    (folder / "c.cfg").write_text(config)
    record = str(folder / "r.txt")
    model = amct_ext.create_compressed_retrain_model(net, x, str(folder / "c.cfg"), record)
    arguments = x if isinstance(x, tuple) else (x,)
    model.train()(*arguments)
    model.eval()(*arguments)
    return model, record


def outputs(folder: Path, x: Tensor = X) -> list[Tensor]:
    return onnx_outputs(folder / "m_fake_quant_model.onnx", x)
