"""A job of the pruning flow."""

from __future__ import annotations

from pathlib import Path

from support.models import small
from torch import nn

import amct_ext


class Job:
    """One job of the pruning flow in a folder of its own."""

    def __init__(self, folder: Path, text: str) -> None:
        self.folder = folder
        self.config, self.record = str(folder / "prune.cfg"), str(folder / "record.txt")
        Path(self.config).write_text(text)

    def create(self, model: nn.Module | None = None) -> nn.Module:
        return amct_ext.create_prune_retrain_model(model or small.build(), small.SAMPLE, self.config, self.record)

    def restore(self, checkpoint: Path) -> nn.Module:
        return amct_ext.restore_prune_retrain_model(
            small.build(), small.SAMPLE, self.record, self.config, str(checkpoint)
        )

    def save(self, model: nn.Module) -> None:
        amct_ext.save_prune_retrain_model(model, str(self.folder / "out" / "net"), small.SAMPLE)
