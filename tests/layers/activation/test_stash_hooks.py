"""The stash of quantised layers among hooks: checkpointing, hooks for saved tensors, hooks of modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.saved_tensors import Watch, assert_same_gradients, gradients, saved_bytes
from support.jobs.retrain_job import Job
from support.models import small
from support.models.single_layer import Chain, compressed
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0
    x = small.batch(0)[0].requires_grad_()
    model(x)
    plain = gradients(model, lambda: model(x))
    again = gradients(model, lambda: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert_same_gradients(model, lambda m: checkpoint(m, x, use_reentrant=reentrant))


def test_checkpointing_keeps_no_activation(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    held: list[int] = []
    alive: list[Any] = []
    model.layer.register_forward_pre_hook(lambda m, args: alive.append(Watch(args[0])))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with saved_bytes(held):
        y = checkpoint(model, x, use_reentrant=False)
    assert alive[0].freed
    y.sum().backward()
    assert held == [x.nbytes]


def test_hooks_around_the_model(tmp_path: Path) -> None:
    """They see every tensor that is kept, and what they give back is used, in whatever layout."""
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0
    x = small.batch(0)[0].to(memory_format=torch.channels_last)
    model(x)

    def contiguous(m: nn.Module) -> Tensor:
        with saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
            return m(x)

    def offloaded(m: nn.Module) -> Tensor:
        with save_on_cpu():
            return m(x)

    plain = gradients(model, lambda: model(x))
    for run in (contiguous, offloaded):
        for name, value in gradients(model, lambda run=run: run(model)).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)


def test_where_hooks_are_forbidden_nothing_changes(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(7, 4)), torch.randn(5, 7), tmp_path)
    x = torch.randn(5, 7)

    def run() -> Tensor:
        with disable_saved_tensors_hooks("no hooks here"):
            return model(x)

    allowed, forbidden = gradients(model, lambda: model(x)), gradients(model, run)
    assert all(torch.equal(allowed[name], forbidden[name]) for name in allowed)


def test_hooks_of_the_user_at_the_quantiser(tmp_path: Path) -> None:
    """What a layer computes with is what its backward gets, whoever had a hand in it."""
    model = compressed(Chain(nn.Linear(7, 4)), torch.randn(5, 7), tmp_path)
    quantizer, x = model.layer.act_quant, torch.randn(5, 7)

    def in_place(module: nn.Module, args: Any, y: Tensor) -> None:
        with torch.no_grad():
            y.mul_(1.5)

    for register, hook in (
        (nn.Module.register_forward_pre_hook, lambda m, args: (args[0] * 0.5, *args[1:])),
        (nn.Module.register_forward_hook, lambda m, args, y: y + 1),
        (nn.Module.register_forward_hook, in_place),
        (nn.Module.register_full_backward_hook, lambda m, given, grads: None),
    ):
        handle = register(quantizer, hook)
        assert_same_gradients(model, lambda m: m(x))
        handle.remove()
