"""Gradients of fused ops that are read, changed, differentiated again, or handed on by the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checks.chains import assert_same, gradients
from support.models.chain_nets import ChainNet, compressed_pair
from torch import Tensor, nn


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The same compressed model twice, calibrated: fused, and not."""
    return compressed_pair(ChainNet(), torch.randn(4, 3, 16, 16), tmp_path)


def output_gradients(model: nn.Module, *names: str) -> tuple[Tensor, ...]:
    """The gradients of these modules' outputs in a step."""
    outputs: list[Tensor] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, i, o: outputs.append(o))
    y = model(torch.ones(4, 3, 16, 16).cumsum(2))
    return torch.autograd.grad(y.square().sum(), outputs)


def test_gradients_of_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(2, 3, 8, 8)
    found = []
    for model in pair:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [p for p in model.parameters() if p.dim() == 4]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_intermediate_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    found = []
    for model in pair:
        found.append(output_gradients(model, "stem.bn", "first.act"))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a + 0, b + 0, rtol=1e-4, atol=1e-5)


def test_gradients_that_are_changed(pair: tuple[nn.Module, nn.Module]) -> None:
    """Gradients of two tensors of one chain: a change of one, made before the other is read, does not reach it."""
    found = []
    for model in pair:
        of_bn, of_act = output_gradients(model, "stem.bn", "stem.act")
        of_act.mul_(2)
        found.append((of_bn + 0, of_act + 0))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class _Routed(torch.autograd.Function):
    """The first of two values, with the gradient given to the second as it is."""

    @staticmethod
    def forward(ctx: object, first: Tensor, second: Tensor) -> Tensor:
        return first * 1

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def test_a_gradient_given_to_another_batch_norm(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.between = lambda m, y: _Routed.apply(m.norm(y), m.other(y)).relu()
    assert_same(*pair, torch.randn(4, 3, 16, 16))


def test_written_memory_behind_a_frozen_batch_norm(pair: tuple[nn.Module, nn.Module]) -> None:
    def between(m: ChainNet, y: Tensor) -> Tensor:
        z = torch.relu(m.norm(y))
        y.detach().numpy()[...] *= -1
        return z

    for model in pair:
        model.get_submodule("norm").eval()
        model.between = between
    (_, fused), (_, separate) = (gradients(model, torch.ones(4, 3, 16, 16).cumsum(3)) for model in pair)
    torch.testing.assert_close(fused["stem.conv.weight"], separate["stem.conv.weight"], rtol=1e-4, atol=1e-4)
