"""Two processes that take the ranks of one distributed job after another (gloo)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

WORLD = 2
LOCAL = ("running_mean", "running_var", "act_quant.scale", "act_quant.offset")  # of the rank's last batch


class Ranks:
    """The processes. Each imports torch once, however many jobs follow."""

    def __init__(self, executors: list[ProcessPoolExecutor]) -> None:
        self._executors = executors

    def run(self, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
        """Call `work(rank, folder, *arguments)` in both; raises what a rank raised."""
        futures = [
            executor.submit(_job, work, rank, str(folder), *arguments) for rank, executor in enumerate(self._executors)
        ]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]


@contextmanager
def two_ranks() -> Iterator[Ranks]:
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        yield Ranks([stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for _ in range(WORLD)])


def _job(work: Callable[..., None], rank: int, folder: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    # The limit ends a rank that waits for one that has raised.
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=240)
    )
    try:
        work(rank, Path(folder), *arguments)
    finally:
        torch.distributed.destroy_process_group()


def own_folder(rank: int, folder: Path) -> Path:
    """A folder that only this rank writes to."""
    mine = folder / f"rank{rank}"
    mine.mkdir()
    return mine
