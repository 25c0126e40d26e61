"""A retraining job on the small residual model: files in a folder, training steps, evaluation, equal states."""

from __future__ import annotations

from pathlib import Path

import torch
from support.models import small
from torch import nn

import amct_ext


class Job:
    """One retraining job: configuration, record and checkpoint in a folder of its own."""

    def __init__(self, folder: Path, config: str) -> None:
        self.config, self.record = folder / "compress.cfg", folder / "record.txt"
        self.config.write_text(config)
        self.folder = folder

    def create(self) -> nn.Module:
        return amct_ext.create_compressed_retrain_model(small.build(), small.SAMPLE, str(self.config), str(self.record))

    def restore(self, checkpoint: Path, name: str | None = "model", model: nn.Module | None = None) -> nn.Module:
        model = small.build() if model is None else model
        return amct_ext.restore_compressed_retrain_model(
            model, small.SAMPLE, str(self.config), str(self.record), str(checkpoint), name
        )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for i in steps:
        torch.manual_seed(i)  # dropout
        x, y = small.batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def train_and_save(job: Job, checkpoint: Path, steps: range) -> nn.Module:
    """A new model of the job, trained, its state and the optimizer's in a file."""
    model = job.create()
    train(model, (optimizer := optimizer_of(model)), steps)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    return model


def resume(job: Job, checkpoint: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and the optimizer of such a file."""
    model = job.restore(checkpoint)
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(torch.load(checkpoint, weights_only=True)["optimizer"])
    return model, optimizer


def evaluate(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(small.batch(50)[0])


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for key in one:
        assert torch.equal(one[key].nan_to_num(7), two[key].nan_to_num(7)), key
