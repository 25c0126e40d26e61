"""A distributed job of two processes on this machine (gloo)."""

from __future__ import annotations

from pathlib import Path

import torch

WORLD = 2
LOCAL = ("running_mean", "running_var", "act_quant.scale", "act_quant.offset")  # of the rank's last batch


def start(rank: int, folder: str) -> Path:
    """Join the job; returns the rank's own folder."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mine = Path(folder) / f"rank{rank}"
    mine.mkdir()
    return mine
