"""DistributedDataParallel on two processes (gloo): equal clips and weights on every rank, one writer, restore."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of
from support.models import small
from support.processes.ranks import LOCAL, WORLD, Ranks, own_folder
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import amct_ext

TWO_BATCHES = "batch_num: 2\n" + small.SPARSE % 2 + small.LEARNED
CONFIGS = {"mixed": small.CONFIGS["mixed_quant"], "two batches": TWO_BATCHES, "histogram": TWO_BATCHES}


def work(rank: int, folder: Path, calibration: Literal["exact", "histogram"]) -> None:
    """One rank: create, train on data of its own, save its state; rank 0's checkpoint is the job's."""
    mine = own_folder(rank, folder)
    # A record file of its own shows which rank writes.
    model = amct_ext.create_compressed_retrain_model(
        DistributedDataParallel(small.build()), small.SAMPLE, str(folder / "compress.cfg"), str(mine / "record.txt")
    )
    amct_ext.configure(model, calibration=calibration)
    model.module.drop.p = 0.0
    model.train()
    optimizer = optimizer_of(model)
    collectives: list[int] = []
    real = torch.distributed.all_reduce

    def counted(x: torch.Tensor, *args: Any) -> None:
        collectives[-1] += 1
        real(x, *args)

    torch.distributed.all_reduce = counted
    for i in range(4):
        collectives.append(0)
        x, y = small.batch(10 * rank + i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.distributed.all_reduce = real
    torch.save(collectives, mine / "collectives.pth")
    torch.save(model.state_dict(), mine / "state.pth")
    torch.save(evaluate(model), mine / "out.pth")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks(name: str, tmp_path: Path, ranks: Ranks) -> None:
    job = Job(tmp_path, CONFIGS[name])
    calibration = "histogram" if name == "histogram" else "exact"
    ranks.run(work, tmp_path, calibration)
    first, second = (torch.load(tmp_path / f"rank{rank}" / "state.pth") for rank in range(WORLD))
    for key, value in first.items():
        if not key.endswith(LOCAL):
            assert torch.equal(value, second[key]), key
    for rank in range(WORLD):  # one for all layers in a forward that calibrates, none after
        counts = torch.load(tmp_path / f"rank{rank}" / "collectives.pth")
        assert counts == ([1, 0, 0, 0] if name == "mixed" else [1, 1, 0, 0])
    assert (tmp_path / "rank0" / "record.txt").exists()
    assert not (tmp_path / "rank1" / "record.txt").exists()
    job.record = tmp_path / "rank0" / "record.txt"
    restored = job.restore(tmp_path / "rank0" / "state.pth", None)
    assert torch.equal(evaluate(restored), torch.load(tmp_path / "rank0" / "out.pth"))
    again = job.restore(tmp_path / "rank0" / "state.pth", None)
    evaluate(again)
    assert_same_state(restored, again)


def resume(rank: int, folder: Path) -> None:
    """One rank of a job that takes up the checkpoint of a single process; rank 1 meets NaN."""
    mine = own_folder(rank, folder)
    model = amct_ext.restore_compressed_retrain_model(
        DistributedDataParallel(small.build()),
        small.SAMPLE,
        str(folder / "compress.cfg"),
        str(folder / "record.txt"),
        str(folder / "one.pth"),
    )
    torch.save(model.state_dict(), mine / "state.pth")
    model.train()
    for i in range(2):  # the flag must outlive the broadcast of buffers in the next forward
        x = small.batch(i)[0]
        model(x if i or rank == 0 else x * float("nan"))
    flagged = any(layer.act_quant.invalid for layer in (model.module.stem, model.module.conv1))
    torch.save(bool(flagged), mine / "flagged.pth")


def test_a_checkpoint_of_one_process_restores_on_two(tmp_path: Path, ranks: Ranks) -> None:
    job = Job(tmp_path, small.CONFIGS["sparse_quant"])
    model = job.create().train()
    model(small.batch(0)[0])
    evaluate(model)
    torch.save(model.state_dict(), tmp_path / "one.pth")
    ranks.run(resume, tmp_path)
    for rank in range(WORLD):
        state = torch.load(tmp_path / f"rank{rank}" / "state.pth")
        for key, value in model.state_dict().items():
            assert torch.equal(state["module." + key], value), key
        assert torch.load(tmp_path / f"rank{rank}" / "flagged.pth") is (rank == 1)


class Heads(nn.Module):
    """Each rank trains one head at a time; their inputs are a hundredfold apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, which: int | None = None) -> torch.Tensor:
        if which is None:
            return self.a(x) + self.b(100 * x)
        return self.b(100 * x) if which else self.a(x)


def heads(rank: int, folder: Path, order: tuple[tuple[int, int], ...]) -> None:
    """One rank: in each step the head that ``order`` names for it."""
    mine = own_folder(rank, folder)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(rank))
    model = amct_ext.create_compressed_retrain_model(
        Heads(), x, str(folder / "compress.cfg"), str(mine / "record.txt")
    ).train()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for which in order:
        parallel(x, which[rank]).square().mean().backward()
    torch.save({k: v for k, v in model.state_dict().items() if "act_quant" in k}, mine / "state.pth")


@pytest.mark.parametrize(
    ("batches", "order"),
    [
        (1, ((0, 1), (1, 0))),
        (1, ((0, 1), (0, 1))),
        (2, ((0, 1), (1, 0), (0, 1))),
        (2, ((0, 0), (0, 1), (1, 1), (1, 0))),
    ],
)
def test_ranks_on_different_heads(
    tmp_path: Path, ranks: Ranks, batches: int, order: tuple[tuple[int, int], ...]
) -> None:
    """What is averaged does not depend on what a rank ran: no clips of other layers, no lists of unequal length."""
    (tmp_path / "compress.cfg").write_text(f"batch_num: {batches}\n" + small.QUANT)
    ranks.run(heads, tmp_path, order)
    first, second = (torch.load(tmp_path / f"rank{rank}" / "state.pth") for rank in range(WORLD))
    for key, value in first.items():
        if "clip_m" in key or "batches_seen" in key:
            assert torch.equal(value, second[key]), key
    assert 2 < first["a.act_quant.clip_max"] < 5 and 200 < first["b.act_quant.clip_max"] < 500
    assert first["a.act_quant.batches_seen"] == first["b.act_quant.batches_seen"] == batches


def tails(rank: int, folder: Path, search: str) -> None:
    """One rank; only rank 1 meets outliers."""
    mine = own_folder(rank, folder)
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        x[:4, 0] = torch.tensor([4000.0, -3000.0, 2000.0, 1000.0])
    model = amct_ext.create_compressed_retrain_model(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), x, str(folder / "compress.cfg"), str(mine / "r.txt")
    ).train()
    DistributedDataParallel(model)(x).square().mean().backward()
    torch.save({k: v for k, v in model.state_dict().items() if "act_quant" in k}, mine / "state.pth")


@pytest.mark.parametrize("search", ["", "range_search: PERCENTILE", "range_search: OUTPUT"])
def test_ranks_agree_on_a_robust_range(tmp_path: Path, ranks: Ranks, search: str) -> None:
    (tmp_path / "compress.cfg").write_text(small.QUANT.replace("ulq_quantize {", f"ulq_quantize {{ {search}", 1))
    ranks.run(tails, tmp_path, search)
    first, second = (torch.load(tmp_path / f"rank{rank}" / "state.pth") for rank in range(WORLD))
    for key, value in first.items():
        if "clip_m" in key or "batches_seen" in key:
            assert torch.equal(value, second[key]), key
    assert search.endswith("OUTPUT") or 2 < first["0.act_quant.clip_max"] < 10
