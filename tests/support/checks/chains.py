"""Whether a model whose ops are fused computes what it computes otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[nn.Module, Tensor], Tensor]


def run(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output


def gradients(model: nn.Module, x: Tensor, step: Step = run) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a step, and all gradients, that of the input too."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = step(model, leaf)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return y.detach(), {**found, "input": leaf.grad.clone()}


def assert_same(fused: nn.Module, separate: nn.Module, x: Tensor, step: Step = run, tolerance: float = 1e-6) -> None:
    """Equal outputs, running statistics within rounding, all gradients together within the tolerance."""
    (y, found), (expected, wanted) = gradients(fused, x, step), gradients(separate, x, step)
    assert torch.equal(y, expected)
    assert found.keys() == wanted.keys()
    ours, theirs = (torch.cat([g[name].flatten() for name in sorted(g)]).double() for g in (found, wanted))
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    for a, b in zip(fused.buffers(), separate.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
