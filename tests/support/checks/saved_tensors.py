"""What autograd keeps for a backward pass, how long it lives, and whether gradients agree without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import amct_ext


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().float().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """Of the model with the stash on and of a copy with it off."""
    other = copy.deepcopy(model)
    amct_ext.configure(other, stash="off")
    one, two = gradients(model, lambda: run(model)), gradients(other, lambda: run(other))
    assert one.keys() == two.keys() and one
    for name in one:
        assert torch.equal(one[name], two[name]), name


@contextmanager
def saved_bytes(held: list[int]) -> Iterator[None]:
    """Adds up what the graph holds, every storage once."""
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield
    held.append(sum(x.untyped_storage().nbytes() for x in storages.values()))


class Watch:
    """Whether the memory of a tensor has been freed."""

    def __init__(self, x: Tensor) -> None:
        self.ref = torch.multiprocessing.reductions.StorageWeakRef(x.untyped_storage())

    @property
    def freed(self) -> bool:
        return self.ref.expired()
