"""What the ranks of a distributed job do together; with one process, nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several of a distributed job."""
    return _is_initialized() and torch.distributed.get_world_size() > 1


def is_rank_zero() -> bool:
    """Whether this process is the one that writes files: rank 0, or the only one."""
    return not _is_initialized() or torch.distributed.get_rank() == 0


def _is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.no_grad()
def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors (any shapes, one device) by their mean over all ranks: one collective, in the widest dtype."""
    if not tensors or not is_distributed():
        return
    flat = torch.cat([x.reshape(-1) for x in tensors])
    all_reduce_sum_(flat)
    parts = torch.split(flat / torch.distributed.get_world_size(), [x.numel() for x in tensors])
    for x, mean in zip(tensors, parts, strict=True):
        x.copy_(mean.view_as(x))


def all_reduce_sum_(x: Tensor) -> None:
    """Replace a tensor by its sum over all ranks: one collective."""
    if is_distributed():
        torch.distributed.all_reduce(x)


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor (DTensor) put together, which all ranks must ask for at once; any other as it is."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()
