"""The integer forward against the float path: results up to its rounding, gradients bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checks.integer_forward import both, output_and_gradients, took_integers
from support.checks.saved_tensors import saved_bytes
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from support.models.single_layer import Chain, compressed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import amct_ext
from amct_ext.layers.products.path_choice import PathChoice
from amct_ext.model_surgery.lookup import compressed_layers

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(5, 20, 3, stride=2, padding=1), (3, 5, 7, 9)),
    "without bias": (lambda: nn.Conv2d(5, 4, (3, 2), padding=(2, 0), dilation=(1, 2), bias=False), (3, 5, 7, 9)),
    "pointwise": (lambda: nn.Conv2d(16, 33, 1), (2, 16, 5, 5)),
    "same padding": (lambda: nn.Conv2d(5, 4, 3, padding="same"), (2, 5, 7, 7)),
    "valid": (lambda: nn.Conv2d(5, 4, 3, padding="valid"), (2, 5, 7, 7)),
    "linear": (lambda: nn.Linear(7, 4), (5, 7)),
    "linear on a sequence": (lambda: nn.Linear(7, 40, bias=False), (3, 5, 7)),
    "linear on one vector": (lambda: nn.Linear(7, 4), (7,)),
}


@pytest.mark.parametrize("config", ["quant", "learned", "sparse_quant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, config: str, tmp_path: Path) -> None:
    build, shape = LAYERS[kind]
    plain, model = both(compressed(Chain(build()), torch.randn(shape), tmp_path, small.CONFIGS[config]))
    values = [torch.randn(shape)]
    if len(shape) == 4:
        values += [values[0].to(memory_format=torch.channels_last), torch.cat([values[0]] * 2, 3)[..., ::2]]
    for x in values:
        factors = torch.randn((plain(x) - model(x)).shape)  # both, so that their states advance alike
        (expected, floats), (y, grads) = (
            output_and_gradients(plain, x, factors),
            output_and_gradients(model, x, factors),
        )
        assert took_integers(model)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert (
            y.is_contiguous(memory_format=torch.channels_last)
            == expected.is_contiguous(memory_format=torch.channels_last)
            or len(shape) != 4
        )
        assert floats.keys() == grads.keys()
        for name, grad in floats.items():
            assert torch.equal(grad, grads[name]), name
        for name, value in plain.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant", "sparse_learned", "mixed_quant", "two_batches"])
def test_models(name: str, tmp_path: Path) -> None:
    """Shared inputs, BatchNorm, 2:4, learned scales, calibration over batches: one step after the other."""
    model = Job(tmp_path, small.CONFIGS[name]).create().train()
    model.drop.p = 0.0
    plain, model = both(model)
    for i in range(3):
        x = small.batch(i)[0]
        factors = torch.randn(plain(x).shape)  # advances both states, as the forward of the other below
        model(x)
        (expected, floats), (y, grads) = (
            output_and_gradients(plain, x, factors),
            output_and_gradients(model, x, factors),
        )
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        for key, grad in floats.items():
            torch.testing.assert_close(grads[key], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()) + 1e-6)
    assert took_integers(model)
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_readers_that_differ(tmp_path: Path) -> None:
    """One reader of a shared input on floats, the other on integers, either way round."""
    job = Job(tmp_path, small.QUANT).create().train()
    job.drop.p = 0.0
    x = small.batch(0)[0]
    job(x)
    factors = torch.randn(job(x).shape)
    shared = [name for name, layer in compressed_layers(job) if layer.input_quantizer.num_readers > 1]
    assert len(shared) == 2
    for name in shared:
        plain, mixed = copy.deepcopy(job), copy.deepcopy(job)
        amct_ext.configure(mixed, forward={name: "integer"})
        (expected, floats), (y, grads) = (
            output_and_gradients(plain, x, factors),
            output_and_gradients(mixed, x, factors),
        )
        assert [n for n, c in amct_ext.forward_choices(mixed).items() if c == "integer"] == [name]
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        for key, grad in floats.items():
            torch.testing.assert_close(grads[key], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()) + 1e-6)


def test_graph_holds_no_more_than_that_of_the_float_model(tmp_path: Path) -> None:
    sizes: list[int] = []
    plain = small.build().train()
    model = Job(tmp_path, small.QUANT).create().train()
    amct_ext.configure(model, forward="integer")
    x = torch.randn(16, 3, 24, 24)
    model(x)
    for each in (plain, model):
        with saved_bytes(sizes):
            each(x)
    weights = sum(p.nbytes for p in plain.parameters() if p.dim() > 1)
    assert sizes[1] <= sizes[0] + weights + 1024


def test_a_changed_input_is_an_error(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path).layer
    model.product_choice = PathChoice("integer")
    x = torch.randn(3, 8)
    y = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("frozen", ["weight", "bias", "clips"])
def test_frozen_parameters(frozen: str, tmp_path: Path) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    for name, parameter in model.named_parameters():
        if frozen in name or (frozen == "clips" and "clip_" in name):
            parameter.requires_grad_(False)
    plain, model = both(model)
    x, factors = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 6)
    floats, grads = output_and_gradients(plain, x, factors)[1], output_and_gradients(model, x, factors)[1]
    assert floats.keys() == grads.keys() and all(torch.equal(floats[k], grads[k]) for k in floats)


def test_inside_checkpointing(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(model, forward="integer")
    x, factors = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 6)
    other = copy.deepcopy(model)
    expected = output_and_gradients(model, x, factors)[1]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = other

        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(self.inner, value, use_reentrant=False)

    for name, grad in output_and_gradients(Checkpointed(), x, factors)[1].items():
        assert torch.equal(grad, expected[name.removeprefix("inner.")]), name


def test_a_few_steps_train_alike(tmp_path: Path) -> None:
    """Both paths leave the same model behind, up to the rounding of the float sums."""
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0
    for each in (models := both(model)):
        train(each, optimizer_of(each), range(5))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=5e-2, atol=5e-2, msg=name)
