"""A saved ONNX file under onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch


def run_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
