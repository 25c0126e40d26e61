"""Wall time of what surrounds training: create, checkpoint, restore, record, save."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import amct_ext as amct
from benchmarks.step.models import Job
from benchmarks.step.variants import BOTH

NAMES = ("create", "restore", "record", "save")


def times(job: Job) -> dict[str, float]:
    """Seconds of each function of the flow on the model with 2:4 sparsity and INT8."""
    torch.manual_seed(0)
    x, _ = job.batch(2)
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - started
        return result

    with tempfile.TemporaryDirectory() as folder:
        config, record, checkpoint = (str(Path(folder) / name) for name in ("compress.cfg", "record.txt", "state.pth"))
        Path(config).write_text(BOTH)
        plain = job.model()
        made = timed("create", lambda: amct.create_compressed_retrain_model(plain, x, config, record))
        assert isinstance(made, torch.nn.Module)
        made.train()(x)
        made.eval()(x)
        torch.save(made.state_dict(), checkpoint)
        restored = timed("restore", lambda: amct.restore_compressed_retrain_model(plain, x, config, record, checkpoint))
        assert isinstance(restored, torch.nn.Module)
        restored.eval()(x)
        timed("record", lambda: amct.update_record(restored))
        timed("save", lambda: amct.save_compressed_retrain_model(restored, record, str(Path(folder) / "out"), x))
    return seconds
