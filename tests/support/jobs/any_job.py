"""A compression job for whatever model a test brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import amct_ext

PER_TENSOR = """
retrain_data_quant_config { ulq_quantize { } }
retrain_weight_quant_config { arq_retrain { channel_wise: false } }
"""


class AnyJob:
    """Configuration, record and files in a folder of their own."""

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config, self.record = folder, str(folder / "job.cfg"), str(folder / "record.txt")
        Path(self.config).write_text(config)

    def create(self, net: nn.Module, x: Any) -> nn.Module:
        return amct_ext.create_compressed_retrain_model(net, x, self.config, self.record)

    def calibrated(self, net: nn.Module, x: Any) -> nn.Module:
        """Created and calibrated by one training forward; BatchNorm statistics stay as they were."""
        model = self.create(net, x)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        model.train()
        for norm in norms:
            norm.eval()
        with torch.no_grad():
            model(*(x if isinstance(x, tuple) else (x,)))
        return model

    def save(self, model: nn.Module, x: Any) -> tuple[Path, Path]:
        out = self.folder / "out"
        amct_ext.save_compressed_retrain_model(model, self.record, str(out / "net"), x)
        return out / "net_fake_quant_model.onnx", out / "net_deploy_model.onnx"


def off(seen: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value expected."""
    seen, expected = seen.detach(), expected.detach()
    return float((seen - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
