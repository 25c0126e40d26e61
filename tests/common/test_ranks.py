"""Collectives of one process, without a group and in a group of one; several ranks: frameworks/test_distributed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from amct_ext.common import ranks


@pytest.fixture(params=[False, True], ids=["no group", "group of one"])
def _group(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    if request.param:
        distributed.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_one_process_is_the_first_rank_and_shares_nothing() -> None:
    assert ranks.is_rank_zero() and not ranks.is_distributed()
    x, y = torch.tensor([1.0, 2.0]), torch.tensor(3.0, dtype=torch.float64)
    ranks.all_reduce_mean_([x, y])
    ranks.all_reduce_sum_(x)
    assert x.tolist() == [1.0, 2.0] and y.item() == 3.0


def test_a_sharded_tensor_is_gathered() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert ranks.full_tensor(x) is x
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])
        gathered = ranks.full_tensor(sharded)
        assert type(gathered) is torch.Tensor and torch.equal(gathered, x)
    finally:
        distributed.destroy_process_group()
