"""A retraining job on the device that `AMCT_TEST_DEVICE` names, and how its results are compared with the CPU's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.models import small
from support.ops.samples import same_bits
from support.processes import standin
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import amct_ext
from amct_ext import backends, ops

NAME = os.environ.get("AMCT_TEST_DEVICE", "")
EXACT = NAME == standin.NAME
DEVICE = torch.device(NAME or "cpu")
CPU = torch.device("cpu")


def agree(actual: Any, expected: Any) -> None:
    """Compare two trees of tensors: bit for bit on the stand-in device, within a tolerance elsewhere."""
    for a, b in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        if not isinstance(b, Tensor):
            assert a == b
        elif EXACT:
            assert same_bits(a.detach().cpu(), b.detach())
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


@contextmanager
def references_on_the_cpu() -> Iterator[None]:
    """The CPU's kernels set aside: they sum in another order than the references."""
    library = torch.library.Library("amct_ext", "IMPL")
    for op in ops.__all__:
        library.impl(op, backends.reference(op), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


class Net(nn.Module):
    """Convolutions, BatchNorm, a shared input, a Linear; no dropout, whose random numbers belong to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 1)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.norm(self.left(x)) + self.right(x))
        return self.fc(x.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


class Job:
    """A retraining job on a device, with files of its own."""

    def __init__(self, folder: Path, config: str, device: torch.device) -> None:
        folder.mkdir(exist_ok=True)
        self.device, self.folder, self.record = device, folder, folder / "record.txt"
        self.config = folder / "compress.cfg"
        self.config.write_text(small.CONFIGS[config])
        self.sample = small.SAMPLE.to(device)

    def create(self) -> nn.Module:
        model = net().to(self.device)
        return amct_ext.create_compressed_retrain_model(model, self.sample, str(self.config), str(self.record))

    def restore(self, checkpoint: Path) -> nn.Module:
        return amct_ext.restore_compressed_retrain_model(
            net().to(self.device), self.sample, str(self.config), str(self.record), str(checkpoint), "model"
        )

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        losses = []
        model.train()
        for i in steps:
            x, y = (t.to(self.device) for t in small.batch(i))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def evaluate(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(small.batch(50)[0].to(self.device))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def run(job: Job) -> tuple[nn.Module, list[Tensor], Tensor]:
    model = job.create()
    amct_ext.configure(model, fuse="off")  # so that gradients are added up in one order on every device
    losses = job.train(model, optimizer_of(model), range(5))
    return model, losses, job.evaluate(model)


def host_syncs_in_training(job: Job) -> list[str]:
    """The host syncs of three training steps after calibration."""
    model = job.create()
    optimizer = optimizer_of(model)
    job.train(model, optimizer, range(2))
    batches = [tuple(t.to(DEVICE) for t in small.batch(i)) for i in range(3)]
    standin.host_syncs()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return standin.host_syncs()
