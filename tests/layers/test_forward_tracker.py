"""Whether a model's forward is under way, however the one before ended: results wait only there."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models.deferred_model import Net, evaluated
from torch import Tensor, nn

import amct_ext
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.products.deferred_tensor import DeferredTensor
from amct_ext.model_surgery.session import session_of

ENDS = (RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit)


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    return evaluated(Net(), tmp_path, X)


X = torch.randn(2, 3, 16, 16)
MODULES = ("stem.0", "stem.1", "inner.0", "inner.3", "branch.1", "head")


def raising(end: type[BaseException]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise end

    return hook


def assert_plain(model: nn.Module, x: Tensor, want: Tensor) -> None:
    """A layer called by itself gives a plain tensor, whatever happens to its input and weight afterwards."""
    layer = model.get_submodule("stem.0")
    x = x.clone()
    seen = layer(x)
    assert type(seen) is Tensor
    x.zero_()
    kept = layer.weight.detach().clone()
    layer.weight.zero_()
    assert torch.equal(seen, want)
    layer.weight.copy_(kept)


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
def test_an_interrupted_forward_is_not_under_way(model: nn.Module, end: type[BaseException]) -> None:
    want, alone = model(X), model.get_submodule("stem.0")(X)
    for module_name in MODULES:
        for register in ("register_forward_pre_hook", "register_forward_hook"):
            handle = getattr(model.get_submodule(module_name), register)(raising(end))
            try:
                model(X)
            except end:
                handle.remove()
                assert_plain(model, X, alone)  # its frames are still there, in the traceback
            else:
                pytest.fail("nothing was raised")
            assert_plain(model, X, alone)
            assert torch.equal(model(X), want)


@torch.no_grad()
@pytest.mark.parametrize("end", ENDS)
def test_hooks_of_the_model_that_raise(model: nn.Module, end: type[BaseException]) -> None:
    want, alone = model(X), model.get_submodule("stem.0")(X)
    for handle in (
        model.register_forward_pre_hook(raising(end)),
        model.register_forward_hook(raising(end)),
        model.register_forward_hook(raising(end), prepend=True),
    ):
        with pytest.raises(end):
            model(X)
        handle.remove()
        assert_plain(model, X, alone)
    assert torch.equal(model(X), want)


@torch.no_grad()
def test_what_is_caught_within_the_model_leaves_it_under_way(tmp_path: Path) -> None:
    class Tried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.types: list[type] = []

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.first(x[:, :1])
            y = self.first(x)
            self.types.append(type(y))
            return self.second(y)

    model = evaluated(Tried(), tmp_path, X)
    model(X)
    assert model.types[-1] is DeferredTensor


@torch.no_grad()
def test_a_generator_left_open_is_not_under_way(model: nn.Module) -> None:
    def outputs() -> Iterator[Tensor]:
        while True:
            yield model(X)

    stream, alone = outputs(), model.get_submodule("stem.0")(X)
    next(stream)
    assert_plain(model, X, alone)


@torch.no_grad()
def test_a_model_within_a_model_and_within_itself(tmp_path: Path) -> None:
    """Hooks of an inner forward do not end the outer one, whose results go on waiting."""
    model = evaluated(Net(), tmp_path, X)
    want, types = model(X), []
    busy: list[bool] = []

    def again(_: nn.Module, args: Any, output: Any) -> None:
        types.append(type(output))
        if not busy:
            busy.append(True)
            assert torch.equal(model(X), want)
            busy.pop()

    for module_name in ("stem.0", "inner.3"):
        model.get_submodule(module_name).register_forward_hook(again)
    assert torch.equal(nn.Sequential(model)(X), want)
    assert set(types) == {DeferredTensor}
    assert session_of(model).tracker.forward_id is None


@torch.no_grad()
def test_threads_do_not_see_each_others_forwards(model: nn.Module) -> None:
    alone = model.get_submodule("stem.0")(X)
    inside, done, types = threading.Event(), threading.Event(), []

    def wait(_: nn.Module, args: Any, output: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            types.append(type(output))
            inside.set()
            done.wait(10)

    handle = model.get_submodule("stem.0").register_forward_hook(wait)
    other = threading.Thread(target=torch.no_grad()(lambda: model(X)))
    other.start()
    assert inside.wait(10)
    seen = model.get_submodule("stem.0")(X)
    done.set()
    other.join()
    handle.remove()
    assert type(seen) is Tensor and torch.equal(seen, alone)
    assert types == [DeferredTensor]


@torch.no_grad()
def test_replicas_in_threads(model: nn.Module) -> None:
    """As DataParallel calls them: copies that share the attributes, each in a thread of its own."""
    want = model(X)
    replicas = [model._replicate_for_data_parallel() for _ in range(3)]
    for replica in replicas:
        replica._modules = dict(model._modules)
    results: list[Tensor] = []
    threads = [threading.Thread(target=torch.no_grad()(lambda r=r: results.append(r(X)))) for r in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(type(y) is Tensor and torch.equal(y, want) for y in results)
    assert_plain(model, X, model.get_submodule("stem.0")(X))


def test_forwards_have_numbers() -> None:
    tracker, seen = ForwardTracker(), []

    def forward(depth: int, end: bool = False) -> None:
        frame = sys._getframe()
        tracker.enter(frame)
        seen.append(tracker.forward_id)
        if end:
            raise KeyboardInterrupt
        if depth:
            forward(depth - 1)
            seen.append(tracker.forward_id)
        tracker.exit(frame)

    forward(0)
    forward(2)
    with pytest.raises(KeyboardInterrupt):
        forward(0, end=True)
    assert tracker.forward_id is None
    forward(0)
    assert seen == [1, 2, 2, 2, 2, 2, 3, 4]
    assert copy.deepcopy(tracker).forward_id is None


def test_a_failed_training_forward(tmp_path: Path) -> None:
    """Gradients are recorded: nothing waits, and the next forward is as the first."""
    model = evaluated(Net(), tmp_path, X).train()
    handle = model.head.register_forward_pre_hook(raising(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    assert session_of(model).tracker.forward_id is None
    model(X).sum().backward()
    assert all(way == "integer" for way in amct_ext.forward_choices(model).values())
