"""Importance by the loss (GATE_TAYLOR): its gradient with respect to gates, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks.pruning_check import plan_for, randomize_norms
from support.models.net_of_function import Net, conv, image
from torch import Tensor, nn

from amct_ext.common.layer_kinds import BATCH_NORMS, is_depthwise, kind_of
from amct_ext.errors import InputDataError, InvalidDataError
from amct_ext.graph.trace import trace
from amct_ext.prune.gate_taylor import gate_taylor
from amct_ext.prune.groups import ChannelGroup, Member
from amct_ext.prune.walk import discover


def groups_of(net: nn.Module, data: Tensor) -> tuple[ChannelGroup, ...]:
    graph = trace(net, data)
    return discover(graph, plan_for(graph, net), net).prunable


def gates_in_front_of_readers(net: nn.Module, groups: tuple[ChannelGroup, ...], loss: Callable[..., Tensor]) -> Any:
    """The definition, spelled out: a factor of one on every channel before each layer that it ends in."""
    gates = [torch.ones(group.count, requires_grad=True) for group in groups]
    members = [(gate, member) for gate, group in zip(gates, groups, strict=True) for member in group.consumers]
    handles = []
    for gate, member in members:
        module = dict(net.named_modules()).get(member.name)
        kind = None if module is None else kind_of(module)
        if kind is None or kind.name in BATCH_NORMS or is_depthwise(module):
            continue

        def switch(
            module: nn.Module, args: tuple[Tensor], gate: Tensor = gate, member: Member = member,
            axis: int = kind.channel_axis,
        ) -> Tensor:  # fmt: skip
            factors = gate.repeat_interleave(member.repeat)
            before, after = torch.ones(member.begin), torch.ones(args[0].shape[axis] - member.begin - len(factors))
            shape = [1] * args[0].dim()
            shape[axis] = -1
            return args[0] * torch.cat([before, factors, after]).reshape(shape)

        handles.append(module.register_forward_pre_hook(switch))
    gradients = torch.autograd.grad(loss(net), gates)
    for handle in handles:
        handle.remove()
    return gradients


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 8), nn.BatchNorm2d(8)
        self.a, self.deep, self.b = conv(8, 12), conv(12, 24, groups=12), conv(24, 8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.grouped, self.up = conv(8, 12, groups=4), nn.ConvTranspose2d(12, 6, 2, 2)
        self.fc = nn.Linear(6 * 144 + 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.silu(self.deep(self.a(x))))
        x = x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        y = self.up(F.gelu(self.grouped(x)))
        return self.fc(torch.cat([y.flatten(1), x.amax((2, 3))], 1))


NETWORKS = {
    "gates, residual, depthwise, grouped, transposed, flatten": (Gated, image()),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 8), nn.Linear(8, 2)),
               torch.randn(2, 5, 6)),
    "a channel read twice": (
        lambda: Net(lambda m, x: m.c(torch.cat([x, y := m.a(x), y], 1)), a=conv(3, 4), c=conv(11, 2)), image(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_gradient_of_gates_in_front_of_all_readers(name: str) -> None:
    build, data = NETWORKS[name]
    net = randomize_norms(build())
    groups = groups_of(net, data)
    batches = [torch.randn_like(data) for _ in range(3)]
    found = gate_taylor(net, groups, lambda m: (m(x).square().mean() for x in batches))
    samples = [x[i : i + 1] for x in batches for i in range(len(x))]
    each = [gates_in_front_of_readers(net, groups, lambda m, x=x: m(x).square().mean()) for x in samples]
    for scores, gradients in zip(found, zip(*each, strict=True), strict=True):
        expected = torch.stack(gradients).double().abs().mean(0)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert all(len(scores) == group.count for scores, group in zip(found, groups, strict=True)) and len(groups) > 0


def test_a_small_gate_changes_the_loss_as_predicted() -> None:
    net = randomize_norms(
        nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 4), nn.Flatten(), nn.Linear(144, 2))
    )
    net, data = net.double(), torch.randn(1, 3, 6, 6).double()
    (first, *_) = groups_of(net, data)
    work = copy.deepcopy(net)
    (scores,) = gate_taylor(work, [first], lambda m: [m(data).square().mean()])
    with torch.no_grad():
        whole = net(data).square().mean()
        for channel in range(5):
            less = copy.deepcopy(net)
            less[3].weight[:, channel] *= 1 - 1e-6
            change = float(less(data).square().mean() - whole) / 1e-6
            assert abs(change) == pytest.approx(float(scores[channel]), rel=1e-3)


def tiny() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval()


def test_frozen_weights_are_measured_and_no_grad_is_written() -> None:
    net = tiny().requires_grad_(False)
    groups = groups_of(net, image())
    (scores,) = gate_taylor(net, groups, lambda m: (m(image()).mean() for _ in range(2)))
    assert bool((scores > 0).all()) and all(p.grad is None for p in net.parameters())


def test_losses_may_come_in_a_list_and_beside_forwards_that_do_not_count() -> None:
    net, batches = tiny(), [image() for _ in range(3)]
    groups = groups_of(net, image())

    def beside(model: nn.Module) -> Any:
        for x in batches:
            with torch.no_grad():
                teacher = model(x)
            model(x + 1)
            yield (model(x) - 2 * teacher).square().mean()

    (one,) = gate_taylor(net, groups, beside)
    (other,) = gate_taylor(net, groups, lambda m: [(m(x) - 2 * m(x).detach()).square().mean() for x in batches])
    torch.testing.assert_close(one, other)


def test_readers_that_see_different_numbers_of_samples_share_one_gate() -> None:
    net = Net(
        lambda m, x: [m.b(y := m.a(x)), m.c(y.flatten(0, 1))], a=nn.Linear(6, 5), b=nn.Linear(5, 2), c=nn.Linear(5, 3)
    )
    data = torch.randn(4, 3, 6)
    groups = groups_of(net, data)

    def loss(model: nn.Module) -> Tensor:
        one, two = model(data)
        return one.square().mean() + two.abs().mean()

    (found,) = gate_taylor(net, groups, lambda m: [loss(m)])
    (gradient,) = gates_in_front_of_readers(net, groups, loss)
    torch.testing.assert_close(found, gradient.double().abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (lambda m: [], "there is no loss"),
        (lambda m: m(image()).mean(), "one by one, from a generator or list, not as Tensor"),
        (lambda m: 3, "not as int"),
        (lambda m: [3.0], "loss 1 must be a tensor with one number, not float"),
        (lambda m: [m(image())], "not a tensor of shape"),
        (lambda m: (m(image()).mean().detach() for _ in range(2)), "loss 1 has no gradient"),
        (lambda m: [m(image()).mean(), m(image() * torch.inf).mean()], "loss 2 is NaN or Inf"),
        (lambda m: [torch.ones((), requires_grad=True) * 2], "depends on no layer that is pruned"),
        (
            lambda m: (lambda loss: [loss, loss])(m(image()).mean()),
            "loss 2 depends on no layer that is pruned: compute it by a forward of its own",
        ),
    ],
)
def test_losses_that_cannot_be_used(losses: Callable[[nn.Module], Any], says: str) -> None:
    net = tiny()
    groups = groups_of(net, image())
    net.requires_grad_()
    with pytest.raises(InputDataError, match=says):
        gate_taylor(net, groups, losses)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    net = tiny()
    groups = groups_of(net, image())
    with pytest.raises(InvalidDataError, match="0: the loss's gradient holds NaN or Inf"):
        gate_taylor(net, groups, lambda m: [(m(image()).mean() * 0).sqrt()])
