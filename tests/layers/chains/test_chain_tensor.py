"""BatchNorm, activation function, addition and quantisation in one pass: the values and gradients of separate ops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checks.chains import assert_same, run
from support.models.chain_nets import Block, ChainNet, compressed_pair, random_net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import amct_ext
from amct_ext.layers.chains import chain_tensor
from amct_ext.layers.chains.chain_values import ChainTensorBase


@pytest.fixture
def pair(tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The same compressed model twice, calibrated: fused, and not."""
    return compressed_pair(ChainNet(), torch.randn(4, 3, 16, 16), tmp_path)


# Torch's kernels for channels last add up in float32.
@pytest.mark.parametrize(("layout", "tolerance"), [(torch.contiguous_format, 1e-6), (torch.channels_last, 1e-5)])
def test_values_and_gradients_are_those_of_separate_ops(
    pair: tuple[nn.Module, nn.Module], layout: torch.memory_format, tolerance: float
) -> None:
    x = torch.randn(4, 3, 16, 16).to(memory_format=layout)
    for _ in range(3):
        assert_same(*pair, x, tolerance=tolerance)
    for model in pair:
        model.eval()
    assert_same(*pair, x, tolerance=tolerance)  # running statistics, with gradients
    with torch.no_grad():
        assert torch.equal(pair[0](x), pair[1](x))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_random_chains(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 5, 9, 9)
    fused, separate = compressed_pair(random_net(5, seed), x, tmp_path / str(seed))
    # Channels that hardly vary multiply rounding: some networks differ as much from float64, fused or not.
    assert_same(fused, separate, x, tolerance=1e-4)


def test_only_the_convolutions_outputs_are_kept(pair: tuple[nn.Module, nn.Module]) -> None:
    kept: list[dict[int, int]] = []
    for model in pair:
        storages: dict[int, int] = {}

        def pack(value: Tensor, storages: dict[int, int] = storages) -> Tensor:
            whole = value.chain_values.stored if isinstance(value, ChainTensorBase) else value
            storages[whole.untyped_storage().data_ptr()] = whole.untyped_storage().nbytes()
            return value

        x = torch.randn(4, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(x)
        kept.append(storages)
    assert sum(kept[0].values()) <= 0.85 * sum(kept[1].values())


@pytest.mark.parametrize("name", ["stem", "stem.bn", "stem.act", "first", "first.bn", "second.conv"])
def test_hooks_see_values(pair: tuple[nn.Module, nn.Module], name: str) -> None:
    seen: list[list[Tensor]] = [[], []]
    for model, values in zip(pair, seen, strict=True):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, values=values: values.append(o * 2))
        module.register_full_backward_hook(lambda m, i, o, values=values: values.extend(g + 0 for g in (*i, *o)))
    assert_same(*pair, torch.randn(4, 3, 16, 16))
    assert torch.equal(seen[0][0], seen[1][0])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)


def test_hooks_that_replace_outputs(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.get_submodule("stem.bn").register_forward_hook(lambda m, i, o: o.clamp(-1, 1) + 0.5)
    assert_same(*pair, torch.randn(4, 3, 16, 16))


def test_values_kept_by_a_hook_stay(pair: tuple[nn.Module, nn.Module]) -> None:
    """What a hook keeps is read after the parameters and the running statistics have changed."""
    kept: list[Tensor] = []
    for model in pair:
        model.get_submodule("stem.bn").register_forward_hook(lambda m, i, o: kept.append(o.detach()))
        for mode in (True, False):
            model.train(mode)
            with torch.no_grad():
                model(torch.ones(4, 3, 16, 16).cumsum(3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
            for norm in model.modules():
                if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                    norm.running_mean.add_(3)
    for a, b in zip(kept[:2], kept[2:], strict=True):
        assert torch.equal(a + 0, b + 0)


def assigned(z: Tensor) -> Tensor:
    """With other values in its place, as hooks of experiments do."""
    z.data = z.data.clamp(-1, 1)
    return z.relu()


COMPILED = torch.compile(lambda z: z * 2 + 1, backend="eager")
WAYS: dict[str, Callable[[ChainNet, Tensor], Tensor]] = {
    "in place on BatchNorm's output": lambda m, y: m.norm(y).mul_(2),
    "in place on the convolution's output before": lambda m, y: m.norm(y.mul(1).add_(1)),
    "in place by a view before": lambda m, y: (y[:, 0].detach().mul_(2), m.norm(y))[1],
    "a view of BatchNorm's output": lambda m, y: m.norm(y)[:, :, 1:, 1:],
    "read twice": lambda m, y: m.norm(y) + m.other(y),
    "the convolution's output beside": lambda m, y: m.norm(y) * y.sigmoid(),
    "control flow": lambda m, y: m.norm(y).relu() if float(m.norm(y).mean()) < 9 else y,
    "relu twice": lambda m, y: torch.relu(torch.relu(m.norm(y))),
    "a threshold": lambda m, y: nn.functional.threshold(m.norm(y), 0.7, 0.0),
    "a threshold behind a sum": lambda m, y: nn.functional.threshold(torch.relu(m.norm(y) + y), 0.7, 0.0),
    "a copy": lambda m, y: m.norm(y).clone().relu_(),
    "a clone changed": lambda m, y: m.norm(y).clone().add_(1),
    "padding": lambda m, y: nn.functional.pad(m.norm(y).relu(), (1, 0, 2, 1)),
    "no padding": lambda m, y: nn.functional.pad(m.norm(y).relu(), (0, 0, 0, 0)),
    "bounds behind padding": lambda m, y: nn.functional.hardtanh(nn.functional.pad(m.norm(y), (1, 1, 1, 1)), 0.5, 2.0),
    "two activation functions": lambda m, y: nn.functional.hardswish(nn.functional.hardtanh(m.norm(y), -1.0, 1.5)),
    "data assigned": lambda m, y: assigned(m.norm(y)),
    "an alias of other sizes": lambda m, y: (lambda z: (z.detach().unsqueeze_(0), z)[1])(m.norm(y)),
    "padding with ones": lambda m, y: nn.functional.pad(m.norm(y), (1, 1, 1, 1), value=1.0),
    "cropping": lambda m, y: nn.functional.pad(m.norm(y).relu(), (-1, -1, -1, -1)),
    "added to itself": lambda m, y: (lambda z: z + z)(m.norm(y)),
    "added in place to its alias": lambda m, y: (lambda z: z.add_(z.detach()))(m.norm(y)),
    "broadcast addition": lambda m, y: m.norm(y) + y.mean((2, 3), keepdim=True),
    "addition in place": lambda m, y: m.norm(y).add_(y),
    "added in place to another": lambda m, y: (y * 2).add_(m.norm(y)),
    "weighted addition": lambda m, y: torch.add(m.norm(y), y, alpha=2),
    "a result changed behind an addition": lambda m, y: (lambda r: (m.norm(y) + r, r.mul_(0))[0])(y * 2),
    "memory written through numpy": lambda m, y: (y.detach().numpy().fill(2.0), m.norm(y))[1],
    "memory written later": lambda m, y: (lambda z: (y.detach().numpy().fill(2.0), z)[1])(m.norm(y)),
    "data": lambda m, y: (y.data.mul_(2), m.norm(y))[1],
    "a compiled function": lambda m, y: COMPILED(m.norm(y)),
    "numpy": lambda m, y: m.norm(y) * float(m.norm(y).detach().numpy().max() > -1e9),
    "float64": lambda m, y: m.norm(y).double().relu().float(),
}


@pytest.mark.parametrize("way", WAYS)
def test_any_use(way: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 12, 12)
    pair = compressed_pair(ChainNet(), x, tmp_path)
    for model in pair:
        model.between = WAYS[way]  # type: ignore[assignment]
    assert_same(*pair, x)


def test_frozen_batch_norm(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.get_submodule("stem.bn").eval()
        model.get_submodule("first.bn").requires_grad_(False)
    assert_same(*pair, torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(pair: tuple[nn.Module, nn.Module], reentrant: bool) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return output

    assert_same(*pair, torch.randn(4, 3, 16, 16), step)


def test_offloaded_tensors(pair: tuple[nn.Module, nn.Module]) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            output: Tensor = model(x)
        return output

    assert_same(*pair, torch.randn(4, 3, 16, 16), step)


def test_autocast_is_left_alone(pair: tuple[nn.Module, nn.Module]) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, x)

    assert_same(*pair, torch.randn(4, 3, 16, 16), step)


def test_copies_and_functional_calls(pair: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(4, 3, 16, 16)
    assert_same(copy.deepcopy(pair[0]), copy.deepcopy(pair[1]), x)

    def step(model: nn.Module, x: Tensor) -> Tensor:
        parameters = {name: p * 1 for name, p in model.named_parameters() if "clip" not in name}
        output: Tensor = torch.func.functional_call(model, parameters, (x,))
        return output

    assert_same(*pair, x, step)


def test_outputs_of_the_model_are_plain(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    fused, separate = compressed_pair(Block(3, 6, nn.ReLU()), x, tmp_path)
    assert_same(fused, separate, x)
    assert type(fused(x)) is Tensor


def test_addresses_taken_without_the_dispatcher_raise(pair: tuple[nn.Module, nn.Module]) -> None:
    addresses: list[object] = []

    def take(module: nn.Module, inputs: object, output: Tensor) -> None:
        with pytest.raises(RuntimeError, match="data pointer"):
            addresses.append(Tensor.data_ptr(output))  # what a function of C++ does that is no operator

    pair[0].get_submodule("stem.bn").register_forward_hook(take)
    pair[0](torch.randn(2, 3, 16, 16))
    assert addresses == []


def test_configure(pair: tuple[nn.Module, nn.Module]) -> None:
    x, kinds = torch.randn(2, 3, 16, 16), []
    pair[0].get_submodule("stem.bn").register_forward_hook(lambda m, i, o: kinds.append(type(o)))
    pair[0](x)
    amct_ext.configure(pair[0], fuse="off")
    pair[0](x)
    amct_ext.configure(pair[0], fuse="auto")
    pair[0](x)
    assert [issubclass(kind, ChainTensorBase) for kind in kinds] == [True, False, True]
    with pytest.raises(ValueError, match="fuse must be"):
        amct_ext.configure(pair[0], fuse="on")  # type: ignore[arg-type]


def test_only_large_outputs_begin_a_chain(pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair
    kinds: list[bool] = []
    model.stem.conv.register_forward_hook(lambda m, i, y: kinds.append(isinstance(y, ChainTensorBase)))  # type: ignore[union-attr]
    x = torch.randn(4, 3, 16, 16)  # the stem makes 8 channels of it
    for least in (4 * 8 * 16 * 16, 4 * 8 * 16 * 16 + 1):
        monkeypatch.setattr(chain_tensor, "_MIN_VALUES", least)
        model(x)
    assert kinds == [True, False]
