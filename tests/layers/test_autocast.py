"""Mixed precision: autocast to bfloat16 and float16, loss scaling; clips and scales stay float32."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.jobs.retrain_job import Job, optimizer_of
from support.models import small
from torch import nn

import amct_ext

LOW = (torch.bfloat16, torch.float16)
MARGIN = 0.02  # of test accuracy, against float32: 11 of 540 digits


def step(
    model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, dtype: torch.dtype, x: torch.Tensor, y: torch.Tensor
) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def scaler_for(dtype: torch.dtype, **settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, **settings)


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_what_the_quantisers_keep_is_float32(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS[name]).create().train()
    optimizer, scaler = optimizer_of(model), scaler_for(dtype)
    for i in range(3):
        step(model, optimizer, scaler, dtype, *small.batch(i))
    for key, value in model.state_dict().items():
        assert not value.is_floating_point() or value.dtype in (torch.float32, torch.float64), key
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all(), key


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_codes_are_those_of_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Only the products are rounded: what a layer multiplies are its float32 codes and scales, rounded once."""
    model = Job(tmp_path, small.QUANT).create().train()
    x = small.batch(0)[0]
    model(x)
    seen: list[torch.Tensor] = []
    model.stem.act_quant.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    model(x)
    with torch.autocast("cpu", dtype):
        model(x)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


def test_a_step_with_infinite_gradients_is_skipped(tmp_path: Path) -> None:
    model = Job(tmp_path, small.LEARNED).create().train()
    model(small.batch(0)[0])
    optimizer, scaler = optimizer_of(model), scaler_for(torch.float16, init_scale=2.0**60, growth_interval=1000)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, scaler, torch.float16, *small.batch(1))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() < 2.0**60
    for _ in range(60):  # the scale is halved until the gradients fit
        step(model, optimizer, scaler, torch.float16, *small.batch(1))
    for name in ("stem.weight", "stem.act_quant.clip_max", "stem.weight_quant.scale"):
        assert not torch.equal(model.get_parameter(name), before[name]), name


@pytest.fixture(scope="module")
def digits() -> tuple[Callable[[], nn.Module], Any]:
    """The demo's network after some epochs in float32, and its data."""
    pytest.importorskip("sklearn", reason="the demo's extra is not installed: pip install -e .[demo]")
    folder = str(Path(__file__).resolve().parents[2] / "examples" / "digits")
    sys.path.insert(0, folder)
    try:
        from data import load_data
        from model import DigitsNet
    finally:
        sys.path.remove(folder)
    torch.manual_seed(0)
    data, model = load_data(), DigitsNet(width=16)
    run_epochs(model, data, torch.float32, 6)
    state = model.state_dict()

    def build() -> nn.Module:
        fresh = DigitsNet(width=16)
        fresh.load_state_dict(state)
        return fresh

    return build, data


def run_epochs(model: nn.Module, data: Any, dtype: torch.dtype, epochs: int) -> float:
    """Train; returns the accuracy on the test images, in the same precision."""
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), scaler_for(dtype, init_scale=1024.0)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64)[:-1]:
            step(model, optimizer, scaler, dtype, data.train_x[rows], data.train_y[rows])
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["quant", "sparse_learned"])
def test_digits_are_learned_as_well(config: str, digits: Any, tmp_path: Path) -> None:
    build, data = digits
    text = small.CONFIGS[config]
    (tmp_path / "c.cfg").write_text(text)
    accuracy = {}
    for dtype in (torch.float32, *LOW):
        record = str(tmp_path / f"{dtype}.txt".replace("torch.", ""))
        model = amct_ext.create_compressed_retrain_model(build(), data.test_x[:2], str(tmp_path / "c.cfg"), record)
        accuracy[dtype] = run_epochs(model, data, dtype, 5)
    assert accuracy[torch.float32] > 0.9
    for dtype in LOW:
        assert accuracy[dtype] >= accuracy[torch.float32] - MARGIN, accuracy
