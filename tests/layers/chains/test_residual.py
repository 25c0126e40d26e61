"""Residual additions with a ReLU behind: the sum waits for the ReLU, the gradient of its result for the ReLU's node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checks.chains import assert_same, gradients
from support.models.chain_nets import compressed_pair
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import amct_ext


class Residual(nn.Module):
    """Two convolutions and an addition; ``merge`` makes the block's output of its last BatchNorm and its input."""

    def __init__(self, inputs: int, outputs: int, merge: Callable[[Residual, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )  # fmt: skip
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.merge(self, y, self.shortcut(x))


class ResidualNet(nn.Module):
    def __init__(self, merge: Callable[[Residual, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(*(Residual(i, o, merge) for i, o in ((8, 8), (8, 12), (12, 12), (12, 12))))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return output


def in_place(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    y += x
    result: Tensor = block.relu(y)
    return result


def changed_before(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    x = x * 1.0
    total = y + x
    x.mul_(3.0)  # of which the sum must not know
    return torch.relu(total)


def written_through_a_view(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    x = x + 0.0
    part = x[:, :2]
    total = y + x
    part.fill_(9.0)
    return torch.relu(total)


def convolution_changed(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    total = torch.relu(x + y)
    y.detach().zero_()
    return total


def sum_read_too(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    total = y + x
    return torch.relu(total) + 0.1 * total.sigmoid()


def added_twice(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    return torch.relu(y + x + x)


def result_read_too(block: Residual, y: Tensor, x: Tensor) -> Tensor:
    result = torch.relu(y + x)
    return result + result.sigmoid()


MERGES: dict[str, Callable[[Residual, Tensor, Tensor], Tensor]] = {
    "in place": in_place,
    "out of place": lambda block, y, x: torch.relu(x + y),
    "in place addition": lambda block, y, x: torch.relu(y.add_(x)),
    "in place relu": lambda block, y, x: (y + x).relu_(),
    "other activation": lambda block, y, x: nn.functional.hardtanh(y + x, -0.5, 2.0),
    "no activation": lambda block, y, x: y + x,
    "scaled": lambda block, y, x: torch.relu(torch.add(y, x, alpha=2)),
    "broadcast": lambda block, y, x: torch.relu(y + x.mean((2, 3), keepdim=True)),
    "addend changed": changed_before,
    "addend written through a view": written_through_a_view,
    "summand changed": convolution_changed,
    "sum read too": sum_read_too,
    "added twice": added_twice,
    "result read too": result_read_too,
    "padded": lambda block, y, x: nn.functional.pad(torch.relu(y + x), (1, 1, 0, 1)),
    "cloned": lambda block, y, x: torch.relu((y + x).clone()),
}


@pytest.mark.parametrize("merge", MERGES)
def test_any_merge(merge: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 14, 14)
    fused, separate = compressed_pair(ResidualNet(MERGES[merge]), x, tmp_path)
    for _ in range(2):
        assert_same(fused, separate, x)
    assert_same(fused.eval(), separate.eval(), x)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return compressed_pair(ResidualNet(in_place), torch.randn(4, 3, 14, 14), tmp_path)


def counted(model: nn.Module, x: Tensor) -> Counter[str]:
    """How often ops ran in a step."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        gradients(model, x)
    return Counter({event.key: event.count for event in found.key_averages()})


def test_sums_are_not_written_twice(pair: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(4, 3, 14, 14)
    fused, separate = (counted(model, x) for model in pair)
    # The first block's input is a max pool's plain result, the last block's result is read by the head alone.
    assert fused["amct_ext::ulq_relu_backward"] == 3 and separate["amct_ext::ulq_relu_backward"] == 0


def test_hooks_on_the_result(pair: tuple[nn.Module, nn.Module]) -> None:
    seen: list[list[Tensor]] = []
    for model in pair:
        gradients_seen: list[Tensor] = []
        for block in model.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(lambda m, a, y, seen=gradients_seen: y.register_hook(seen.append) and None)
        gradients(model, torch.linspace(-1, 1, 4 * 3 * 14 * 14).view(4, 3, 14, 14))
        seen.append(gradients_seen)
    assert len(seen[0]) == 4
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours + 0, theirs, rtol=1e-4, atol=1e-6)


def test_hooks_that_change_the_gradient(pair: tuple[nn.Module, nn.Module]) -> None:
    def change(module: nn.Module, arguments: object, y: Tensor) -> None:
        y.register_hook(lambda grad: grad * 0.5)

    for model in pair:
        model.blocks[1].register_forward_hook(change)  # type: ignore[index]
    assert_same(*pair, torch.randn(4, 3, 14, 14))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(pair: tuple[nn.Module, nn.Module], reentrant: bool) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        y = model.stem(x)  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            y = checkpoint(block, y, use_reentrant=reentrant)
        output: Tensor = model.head(y.mean((2, 3)))  # type: ignore[operator]
        return output

    assert_same(*pair, torch.randn(4, 3, 14, 14), step)


def test_gradients_of_gradients(pair: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(4, 3, 14, 14)
    found = []
    for model in pair:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append((first.detach(), second))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_memory_of_the_shortcut_is_freed(pair: tuple[nn.Module, nn.Module]) -> None:
    """What a shortcut's BatchNorm gave is needed by nothing once the sum is there."""
    fused, _ = pair
    kept: list[Tensor] = []
    fused.blocks[1].register_forward_hook(lambda m, a, y: kept.append(y))  # type: ignore[index]
    fused(torch.randn(4, 3, 14, 14))
    chain = kept[0].chain_values.chain  # type: ignore[attr-defined]
    assert chain.is_sum_with_relu and chain.addend is None


def test_off(pair: tuple[nn.Module, nn.Module]) -> None:
    fused, separate = pair
    amct_ext.configure(fused, fuse="off")
    x = torch.randn(4, 3, 14, 14)
    (y, ours), (expected, theirs) = gradients(fused, x), gradients(separate, x)
    assert torch.equal(y, expected) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
