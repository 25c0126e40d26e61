"""DistributedDataParallel on two processes (gloo): equal clips and weights on every rank, one writer, restore."""

from __future__ import annotations

from pathlib import Path

import small_models as small
import torch
import torch.multiprocessing as multiprocessing
from test_restore import Job, assert_same_state, evaluate, optimizer_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import amct_ext

WORLD = 2


def work(rank: int, folder: str) -> None:
    """One rank: create, train on data of its own, save its state; rank 0's checkpoint is the job's."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    mine = Path(folder) / f"rank{rank}"
    mine.mkdir()
    # A record file of its own shows which rank writes.
    model = amct_ext.create_compressed_retrain_model(
        DistributedDataParallel(small.build()), small.SAMPLE, f"{folder}/compress.cfg", str(mine / "record.txt")
    )
    model.module.drop.p = 0.0
    model.train()
    optimizer = optimizer_of(model)
    for i in range(4):
        x, y = small.batch(10 * rank + i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), mine / "state.pth")
    out = evaluate(model)
    torch.save(out, mine / "out.pth")
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    job = Job(tmp_path, small.CONFIGS["mixed_quant"])
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=WORLD, start_method="spawn")
    first, second = (torch.load(tmp_path / f"rank{rank}" / "state.pth") for rank in range(WORLD))
    local = ("running_mean", "running_var", ".scale", ".offset")  # of the rank's last batch
    for key, value in first.items():
        if not key.endswith(local):
            assert torch.equal(value, second[key]), key
    assert (tmp_path / "rank0" / "record.txt").exists()
    assert not (tmp_path / "rank1" / "record.txt").exists()
    job.record = tmp_path / "rank0" / "record.txt"
    restored = job.restore(tmp_path / "rank0" / "state.pth", None)
    assert torch.equal(evaluate(restored), torch.load(tmp_path / "rank0" / "out.pth"))
    again = job.restore(tmp_path / "rank0" / "state.pth", None)
    evaluate(again)
    assert_same_state(restored, again)
