"""A saved ONNX file under onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor


def onnx_outputs(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feeds)]


def run_onnx(path: Path, *inputs: Tensor) -> Tensor:
    """The first output."""
    return onnx_outputs(path, *inputs)[0]
