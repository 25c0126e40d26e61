"""What the report says about a model besides its training: time per step, stored bytes, channels and zeros."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime
import torch
from data import Digits
from onnx import numpy_helper
from torch import Tensor, nn
from train import BATCH, make_optimizer, train_step


def step_times(models: Mapping[str, nn.Module], data: Digits, rounds: int = 15, steps: int = 4) -> dict[str, float]:
    """Median milliseconds of one training step. The models take turns, so a busy moment hits them all."""
    optimizers = {name: make_optimizer(model.train()) for name, model in models.items()}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work, but the models stay what they are
    images, labels = data.train_x[:BATCH], data.train_y[:BATCH]
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            for _ in range(steps):
                train_step(model, optimizers[name], images, labels)
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - started) / steps * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def weight_count(model: nn.Module) -> int:
    """Weights of convolutions and linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def packed_bytes(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Bytes of the INT8 weights of a compressed model. A 2:4 weight stores the kept half and a 2-bit place for each."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            kept = int(masks[name].sum()) if name in masks else module.weight.numel()
            total += kept + ((2 * kept + 7) // 8 if kept < module.weight.numel() else 0)
    return total


def channels(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def onnx_scores(path: Path, images: Tensor, threads: int) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(answers)


def int8_initializers(path: Path) -> int:
    """Bytes of INT8 weights in a deploy model."""
    tensors = onnx.load(path).graph.initializer
    return sum(numpy_helper.to_array(t).size for t in tensors if t.data_type == onnx.TensorProto.INT8)
