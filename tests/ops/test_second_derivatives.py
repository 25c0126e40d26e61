"""Gradients of gradients: straight-through rules differentiated again, as in plain torch; ops, layers and models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import rnn_job
from support.models import small
from support.models.single_layer import LAYERS, Chain, can_be_sparse, compressed
from support.ops.straight_through import PlainOps
from torch import Tensor, nn

import amct_ext
from amct_ext import ops
from amct_ext.layers.activation import quantizer as activation_quantizer
from amct_ext.layers.weight import quantizer as weight_quantizer
from amct_ext.layers.weight import sparsity

PLAIN = PlainOps()
_NAN = torch.tensor(math.nan)
_MASK = torch.arange(48).reshape(6, 8) % 3 > 0
CALLS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "ulq": lambda o, x, a, b: o.ulq_fake_quantize(x, a, b, _NAN, _NAN)[0],
    "ulq, 4 bits, clips of one dimension": lambda o, x, a, b: o.ulq_fake_quantize(x, a[None], b, _NAN, _NAN, 4)[0],
    "arq": lambda o, x, a, b: o.arq_fake_quantize(x, 8, 0)[0],
    "lsq": lambda o, x, a, b: o.lsq_fake_quantize(x, a / 100, 8),
    "lsq, channels": lambda o, x, a, b: o.lsq_fake_quantize(x, (a - b * torch.arange(8)) / 20, 4, -1, 0.5),
    "mask": lambda o, x, a, b: o.apply_mask(x, _MASK),
    "sparsify": lambda o, x, a, b: o.sparsify_2to4(x)[0],
    "sparse arq": lambda o, x, a, b: o.sparse_arq_fake_quantize(x, _MASK, 8, 0)[0],
    "sparse arq, 2:4": lambda o, x, a, b: o.sparse_arq_fake_quantize_2to4(x, 1, 8, 0)[0],
    "sr-ste": lambda o, x, a, b: o.apply_mask_sr_ste(x, _MASK, 0.0),
    "sr-ste arq": lambda o, x, a, b: o.sparse_arq_fake_quantize_sr_ste(x, _MASK, 8, 0, 0.0)[0],
    "arq, many": lambda o, x, a, b: torch.stack(o.arq_fake_quantize_many([x, 2 * x], 8, [0, -1])[0]).sum(0),
}


PAIRS = [
    (kind, config)
    for kind in LAYERS
    for config in ("quant", "learned", "sparse_quant", "sparse_learned", "sparse")
    if "sparse" not in config or can_be_sparse(kind)
]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).double()
    return x, torch.tensor(1.1).double(), torch.tensor(-0.8).double()


def value(call: Any, o: Any, *inputs: Tensor) -> Tensor:
    """A scalar whose derivatives of every order depend on the inputs."""
    return (call(o, *inputs) * inputs[0].cos()).sin().sum() + inputs[1].sin() * inputs[2]


def penalty(grads: Any) -> Tensor:
    return sum(g.sin().square().sum() for g in grads)


def eager(call: Any, o: Any) -> tuple[Tensor, ...]:
    """Gradients, gradients of a penalty on them, and of a penalty on those."""
    inputs = tuple(t.clone().requires_grad_() for t in leaves())
    first = torch.autograd.grad(value(call, o, *inputs), inputs, create_graph=True)
    second = torch.autograd.grad(penalty(first), inputs, create_graph=True)
    return (*first, *second, *torch.autograd.grad(penalty(second), inputs))


def transformed(call: Any, o: Any) -> tuple[Tensor, ...]:
    """The same by torch.func."""
    every = (0, 1, 2)
    first = torch.func.grad(lambda *t: value(call, o, *t), every)
    second = torch.func.grad(lambda *t: penalty(first(*t)), every)
    third = torch.func.grad(lambda *t: penalty(second(*t)), every)
    return (*first(*leaves()), *second(*leaves()), *third(*leaves()))


def products(call: Any, o: Any) -> tuple[Tensor, ...]:
    """Hessian-vector products both ways, and a forward derivative."""
    x, a, b = leaves()

    def function(t: Tensor) -> Tensor:
        return value(call, o, t, a, b)

    hvp = torch.autograd.functional.hvp(function, x, x.cos())[1]
    return (
        hvp,
        torch.func.jvp(torch.func.grad(function), (x,), (x.cos(),))[1],
        torch.func.jvp(function, (x,), (x.cos(),))[1],
    )


@pytest.mark.parametrize("way", [eager, transformed, products], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", CALLS)
def test_ops_differentiate_any_number_of_times(kind: str, way: Any) -> None:
    seen, want = way(CALLS[kind], ops), eager(CALLS[kind], PLAIN)
    if way is products:
        want = products(CALLS[kind], PLAIN)
        torch.testing.assert_close(seen[0], seen[1])
    for a, b in zip(seen, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", CALLS)
def test_torch_func_leaves_values_their_bits(kind: str) -> None:
    inputs = tuple(t.float() for t in leaves())
    inputs[0][0, :3] = torch.tensor([0.0, -0.0, -1e-9])

    def with_value(*t: Tensor) -> tuple[Tensor, Tensor]:
        y = CALLS[kind](ops, *t)
        return y.sum(), y

    _, y = torch.func.grad(with_value, (0, 1, 2), has_aux=True)(*inputs)
    want = CALLS[kind](ops, *inputs)
    assert torch.equal(y, want) and torch.equal(y.signbit(), want.signbit())


@pytest.mark.parametrize("kind", CALLS)
def test_first_gradients_have_the_same_bits_with_a_graph(kind: str) -> None:
    results = []
    for graph in (False, True):
        inputs = tuple(t.float().requires_grad_() for t in leaves())
        y = CALLS[kind](ops, *inputs).square().sum() + sum(inputs[1:])
        results.append(torch.autograd.grad(y, inputs, create_graph=graph))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def plain_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for module in (activation_quantizer, weight_quantizer, sparsity):
            patch.setattr(module, "ops", PLAIN)
        yield


def penalised(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that holds the norm of the input's gradient."""
    model.zero_grad()
    inner = x.clone().requires_grad_()
    y = model(inner)
    (gradient,) = torch.autograd.grad(y.sin().sum(), inner, create_graph=True)
    assert gradient.requires_grad
    (y.square().mean() + (gradient.square().sum() - 1).square()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": inner.grad}


def assert_as_in_plain_torch(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-6
) -> None:
    other = copy.deepcopy(model)
    amct_ext.configure(other, stash="off", forward="float")
    with plain_rules(monkeypatch):
        want = penalised(other, x)
    seen = penalised(model, x)
    assert seen.keys() == want.keys() and len(want) > 1
    for name, expected in want.items():
        torch.testing.assert_close(
            seen[name], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1), msg=name
        )


@pytest.mark.parametrize("setting", ["rebuild", "off"])
@pytest.mark.parametrize(("kind", "config"), PAIRS)
def test_a_gradient_penalty_through_a_layer(
    kind: str, config: str, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = LAYERS[kind]
    model = compressed(Chain(build()), torch.randn(shape), tmp_path, small.CONFIGS[config]).double()
    amct_ext.configure(model, stash=setting)
    assert_as_in_plain_torch(model, torch.randn(shape).double(), monkeypatch)


@pytest.mark.parametrize("kind", rnn_job.KINDS)
def test_a_gradient_penalty_through_recurrent_layers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = rnn_job.Job(tmp_path, kind)
    model = job.create().train()
    model(rnn_job.batch(0)[0])
    assert_as_in_plain_torch(model.double(), rnn_job.batch(1)[0].double(), monkeypatch)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 4, 9, 9)], ids=["linear", "conv"])
def test_a_gradient_penalty_on_integers(
    shape: tuple[int, ...], frozen: bool, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The integer forward rounds sums once, so tolerances are those of float32."""
    layers = [nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)]
    if len(shape) == 4:
        layers = [nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 3, stride=2, bias=False)]
    model = compressed(nn.Sequential(*layers), torch.randn(shape), tmp_path)
    if frozen:
        model[2].weight.requires_grad_(False)
    amct_ext.configure(model, forward="integer")
    assert_as_in_plain_torch(model.train(mode == "train"), torch.randn(shape), monkeypatch, 1e-3)
    assert set(amct_ext.forward_choices(model).values()) == {"integer"}


def test_a_model_by_torch_func(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-parameter gradients of a penalised loss, by functional_call."""
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    model = compressed(net, torch.randn(5, 7), tmp_path, small.LEARNED).double().eval()
    x = torch.randn(5, 7).double()
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        def output(inner: Tensor) -> Tensor:
            state = {**{k: v.clone() for k, v in parameters.items()}, **{k: v.clone() for k, v in buffers.items()}}
            return torch.func.functional_call(model, state, inner).sin().sum()

        return torch.func.grad(output)(x).square().sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    seen = torch.func.grad(loss)(parameters)
    inner = x.clone().requires_grad_()
    with plain_rules(monkeypatch):
        amct_ext.configure(model, stash="off")
        (gradient,) = torch.autograd.grad(model(inner).sin().sum(), inner, create_graph=True)
        gradient.square().sum().backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(seen[name], expected, msg=name)
