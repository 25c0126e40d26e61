"""FSDP2 (`fully_shard`) on two processes (gloo): trains as one process on both batches, checkpoints, records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, evaluate
from support.models import small
from support.processes.ranks import LOCAL, WORLD, Ranks, own_folder
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import amct_ext

CONFIGS = ("sparse_quant", "learned")


def work(rank: int, folder: Path) -> None:
    """One rank: create, shard, train on data of its own, gather the checkpoint, evaluate."""
    mine = own_folder(rank, folder)
    model = amct_ext.create_compressed_retrain_model(
        small.build(), small.SAMPLE, str(folder / "compress.cfg"), str(folder / "record.txt")
    )
    model.drop.p = 0.0
    replicated = amct_ext.replicated_parameters(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model.conv1, model.conv2):
        fully_shard(layer, mesh=mesh, ignored_params=set(replicated))
    fully_shard(model, mesh=mesh, ignored_params=set(replicated))
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) + len(replicated) == len(list(model.parameters()))
    optimizer = torch.optim.SGD([{"params": sharded}, {"params": replicated}], lr=0.01)
    model.train()
    for i in range(3):
        x, y = small.batch(10 * rank + i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        amct_ext.average_gradients(model)
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(state, folder / "state.pth")
    torch.save({k: v.clone() for k, v in model.state_dict().items() if not isinstance(v, DTensor)}, mine / "own.pth")
    torch.save(evaluate(model), mine / "out.pth")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks(name: str, tmp_path: Path, ranks: Ranks) -> None:
    job = Job(tmp_path, small.CONFIGS[name])
    ranks.run(work, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}" / "own.pth") for rank in range(WORLD))
    for key, value in first.items():
        if not key.endswith(LOCAL):
            assert torch.equal(value, second[key]), key
    assert job.record.exists()
    restored = job.restore(tmp_path / "state.pth", None)  # one process takes up what two have trained
    start = dict(small.build().named_parameters())
    assert any(not torch.equal(p, start[n]) for n, p in restored.named_parameters() if n in start)
    torch.testing.assert_close(evaluate(restored), torch.load(tmp_path / "rank0" / "out.pth"))
