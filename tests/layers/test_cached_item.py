"""Numbers in buffers that Python branches on: when they are read again."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from amct_ext.layers.cached_item import CachedItem, VersionGuard
from amct_ext.layers.forward_context import no_state_updates


class Elsewhere(Tensor):
    """A tensor that claims to be on another device, and counts how often it is read."""

    reads = 0

    is_cpu = False

    def item(self) -> float:  # type: ignore[override]
        Elsewhere.reads += 1
        return self.as_subclass(Tensor).item()


def test_another_device_is_read_once_for_each_foreign_write() -> None:
    Elsewhere.reads = 0
    buffer, value = torch.tensor(3).as_subclass(Elsewhere), CachedItem(0)
    assert [value.read(buffer) for _ in range(3)] == [3, 3, 3] and Elsewhere.reads == 1
    buffer.add_(1)
    value.update(buffer, 4)
    assert value.read(buffer) == 4 and Elsewhere.reads == 1
    buffer.copy_(torch.tensor(7))
    assert [value.read(buffer) for _ in range(3)] == [7, 7, 7] and Elsewhere.reads == 2
    assert value.read(torch.tensor(9).as_subclass(Elsewhere)) == 9 and Elsewhere.reads == 3
    assert copy.deepcopy(value).value == 9


def test_on_the_cpu_a_write_through_data_is_seen_until_the_number_is_stable() -> None:
    buffer, value = torch.tensor(1.0), CachedItem(0, stable_from=2)
    assert value.read(buffer) == 1
    buffer.data.fill_(2)
    assert value.read(buffer) == 2
    buffer.data.fill_(3)  # no branch depends on it any more
    assert value.read(buffer) == 2
    buffer.fill_(0)
    assert value.read(buffer) == 0


def test_forwards_that_change_no_state_do_not_read() -> None:
    buffer, value = torch.tensor(5.0), CachedItem(1)
    with no_state_updates():
        assert value.read(buffer) == 1
    assert value.read(buffer.to("meta")) == 1 and value.read(buffer) == 5


def test_a_guard_knows_the_tensor_and_its_version() -> None:
    tensor, guard = torch.zeros(2), VersionGuard()
    assert not guard.unchanged(tensor)
    guard.remember(tensor)
    assert guard.unchanged(tensor) and not guard.unchanged(tensor.clone())
    tensor.add_(1)
    assert not guard.unchanged(tensor)


def test_copies_pickles_and_inference_tensors_are_not_remembered() -> None:
    tensor, guard = torch.zeros(2), VersionGuard()
    guard.remember(tensor)
    assert not copy.deepcopy(guard).unchanged(tensor)
    assert not pickle.loads(pickle.dumps(guard)).unchanged(tensor)
    with torch.inference_mode():
        made = torch.zeros(2)
    guard.remember(made)
    assert not guard.unchanged(tensor)
