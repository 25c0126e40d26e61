"""Layers that multiply integers: the float path's results up to its rounding, and its gradients bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import small_models as small
from support.integer_forward import both, took_integers
from support.retrain_job import Job, optimizer_of, train
from support.saved_tensors import Watch, saved_bytes
from support.single_layer import Chain, compressed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import amct_ext
from amct_ext import ops
from amct_ext.layers import timing
from amct_ext.layers.fingerprint import fingerprint
from amct_ext.layers.integer import IntegerForward
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
ON_FLOATS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 5)),
    "uneven padding": (lambda: nn.Conv2d(5, 4, 2, padding="same"), (2, 5, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(5, 4, 3), (2, 5, 7, 7)),
    "one axis": (lambda: nn.Conv1d(5, 4, 3), (2, 5, 7)),
}


def run(model: nn.Module, x: Tensor, factors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients for an upstream gradient that does not depend on it."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.backward(factors.to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), {"input": leaf.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


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
        (expected, floats), (y, grads) = run(plain, x, factors), run(model, x, factors)
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


@pytest.mark.parametrize("kind", ON_FLOATS)
def test_layers_without_an_integer_kernel_stay_on_floats(kind: str, tmp_path: Path) -> None:
    build, shape = ON_FLOATS[kind]
    plain, model = both(compressed(Chain(build()), torch.randn(shape), tmp_path))
    x = torch.randn(shape)
    assert torch.equal(plain(x), model(x))
    assert amct_ext.forward_choices(model) == {"layer": "float"}


def test_an_image_without_a_batch_stays_on_floats(tmp_path: Path) -> None:
    plain, model = both(compressed(Chain(nn.Conv2d(5, 4, 3)), torch.randn(2, 5, 7, 7), tmp_path))
    x = torch.randn(5, 7, 7)
    assert torch.equal(plain(x), model(x)) and not took_integers(model)


def test_other_dtypes_and_autocast_stay_on_floats(tmp_path: Path) -> None:
    plain, model = both(compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x), model(x))
    assert not took_integers(model)
    assert torch.equal(plain.double()(x.double()), model.double()(x.double()))
    assert not took_integers(model)


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
        (expected, floats), (y, grads) = run(plain, x, factors), run(model, x, factors)
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        for key, grad in floats.items():
            torch.testing.assert_close(grads[key], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()) + 1e-6)
    assert took_integers(model)
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_a_shared_input_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    amct_ext.configure(model, forward="integer")
    model(small.batch(0)[0])
    made: list[Watch] = []
    real = ops.ulq_quantize

    def watched(*args: object) -> tuple[Tensor, ...]:
        result = real(*args)
        made.append(Watch(result[0]))
        return result

    monkeypatch.setattr(ops, "ulq_quantize", watched)
    y = model(small.batch(1)[0])
    layers = [layer for _, layer in compressed_layers(model)]
    assert len(made) == sum(layer.act_quant is not None for layer in layers) < len(layers)
    assert all(w.gone for w in made)  # nothing in the graph holds the codes
    y.sum().backward()


def test_readers_that_differ(tmp_path: Path) -> None:
    """One reader of a shared input on floats, the other on integers, either way round."""
    job = Job(tmp_path, small.QUANT).create().train()
    job.drop.p = 0.0
    x = small.batch(0)[0]
    job(x)
    factors = torch.randn(job(x).shape)
    shared = [name for name, layer in compressed_layers(job) if layer.activation.num_readers > 1]
    assert len(shared) == 2
    for name in shared:
        plain, mixed = copy.deepcopy(job), copy.deepcopy(job)
        amct_ext.configure(mixed, forward={name: "integer"})
        (expected, floats), (y, grads) = run(plain, x, factors), run(mixed, x, factors)
        assert [n for n, c in amct_ext.forward_choices(mixed).items() if c == "integer"] == [name]
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        for key, grad in floats.items():
            torch.testing.assert_close(grads[key], grad, rtol=2e-2, atol=2e-2 * float(grad.abs().max()) + 1e-6)


def test_the_result_is_the_exact_one(tmp_path: Path) -> None:
    """Against float64 on the codes; the float path is off by its rounding, the integer path is not."""
    model = compressed(nn.Sequential(nn.Conv2d(30, 40, 3, padding=1)), torch.randn(2, 30, 9, 9), tmp_path)
    amct_ext.configure(model, forward="integer")
    layer, x = model[0], torch.randn(2, 30, 9, 9)
    y = model(x)
    scale, offset = layer.act_quant.scale, layer.act_quant.offset
    codes = torch.clamp(torch.round(x / scale + offset), -128, 127).double() - offset
    weight = ops.quantize_weight(layer.weight.detach(), layer.weight_quant.scale, 8, 0).double()
    sums = F.conv2d(codes, weight, None, padding=1)
    factors = scale.double() * layer.weight_quant.scale.double()
    exact = sums * factors.view(-1, 1, 1) + layer.bias.detach().double().view(-1, 1, 1)
    assert torch.equal(y, exact.float())


def test_evaluation_keeps_the_weight_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.CONFIGS["sparse_quant"]).create()
    train(model, optimizer_of(model), range(1))
    amct_ext.configure(model, forward="integer")
    model.eval()
    packed: list[tuple[int, ...]] = []
    real = ops.pack_weight
    monkeypatch.setattr(ops, "pack_weight", lambda *a: packed.append(a[0].shape) or real(*a))
    x, layers = small.batch(3)[0], len(list(compressed_layers(model)))

    def evaluated() -> tuple[Tensor, int]:
        packed.clear()
        with torch.no_grad():
            return model(x), len(packed)

    first, count = evaluated()
    assert count == layers
    assert evaluated()[1] == 0
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copied(x), first)
        model.conv1.weight[0] *= 2
    changed, count = evaluated()
    assert count == 1 and not torch.equal(changed, first)
    model.load_state_dict(copied.state_dict())
    again, count = evaluated()
    assert count == layers and torch.equal(again, first)
    model.conv1.sparsity.mask.logical_not_()
    assert evaluated()[1] == 1
    model.conv1.weight.data.mul_(2)  # as averaged weights are swapped in; no version tells
    assert model.eval() is model and evaluated()[1] == layers
    train(model, optimizer_of(model), range(1, 2))
    model.eval()
    assert evaluated()[1] == layers


def test_auto_measures_once_per_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(model, forward="auto")
    clock = iter(range(10**6))
    measured: list[str] = []
    slow = "on_integers"

    def seconds(call: Callable[[], None]) -> float:
        call()
        measured.append(call.__name__)
        return next(clock) * 0 + (2.0 if call.__name__ == slow else 1.0)

    monkeypatch.setattr(timing, "_seconds", seconds)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 4, 8, 8))
    assert measured and amct_ext.forward_choices(model) == {"layer": "float"}
    count = len(measured)
    model(torch.randn(5, 4, 8, 8))
    assert len(measured) == count
    slow = "on_floats"
    model(torch.randn(2, 4, 9, 8))
    assert len(measured) == 2 * count and took_integers(model)
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8))
    assert len(measured) == 3 * count and took_integers(model)
    assert before.keys() == model.state_dict().keys()
    chosen = amct_ext.forward_choices(model)
    other = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(other, forward=chosen)
    other(torch.randn(2, 4, 8, 8))
    assert amct_ext.forward_choices(other) == chosen and len(measured) == 3 * count


def test_settings(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    with pytest.raises(ValueError, match="'float', 'auto' or 'integer'"):
        amct_ext.configure(model, forward="fast")
    with pytest.raises(ValueError, match="no compressed layer 'nowhere'"):
        amct_ext.configure(model, forward={"nowhere": "integer"})
    amct_ext.configure(model, forward="integer")
    model(small.batch(0)[0])
    assert took_integers(model)
    amct_ext.configure(model, validation="deferred")
    model(small.batch(0)[0])
    assert took_integers(model)
    amct_ext.configure(model, forward="float")
    model(small.batch(0)[0])
    assert set(amct_ext.forward_choices(model).values()) == {"float"}


def test_bits_beyond_eight_stay_on_floats(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path)
    model.layer.act_quant.num_bits = 16
    amct_ext.configure(model, forward="integer")
    model(torch.randn(3, 8))
    assert not took_integers(model)


def test_nan_is_noticed(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(8, 4)), torch.randn(3, 8), tmp_path)
    amct_ext.configure(model, forward="integer", validation="eager")
    with pytest.raises(amct_ext.AmctError, match="NaN or Inf"):
        model(torch.full((3, 8), math.nan))


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
    model.integer = IntegerForward("integer")
    x = torch.randn(3, 8)
    y = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


EXCHANGES: dict[str, Callable[[Tensor], object]] = {
    "copied": lambda p: p.data.copy_(torch.randn_like(p) * 0.3),
    "scaled": lambda p: p.data.mul_(-0.5),
    "moved": lambda p: p.data.add_(0.1),
    "reversed": lambda p: p.data.copy_(p.data.flip(-1)),
    "exchanged": lambda p: setattr(p, "data", p.data.roll(1, 0) * 1.5),
    "by numpy": lambda p: np.negative(p.detach().numpy(), out=p.detach().numpy()),
    "one value": lambda p: p.data.view(-1)[-1].add_(2.0),
    "by another tensor": lambda p: torch.from_dlpack(p.detach()).mul_(3.0),
}


class Exchanged(nn.Module):
    """Whatever an evaluation reads."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, channels, 3), nn.BatchNorm2d(channels)
        self.second, self.head = nn.Conv2d(channels, channels, 3), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("config", ["quant", "learned", "sparse_quant"])
@pytest.mark.parametrize("way", EXCHANGES)
def test_weights_written_through_data(way: str, config: str, tmp_path: Path) -> None:
    """No version is raised, and the next evaluation uses what was written, as that on floats does."""
    x = torch.randn(2, 4, 8, 8)
    model = compressed(Exchanged(), x, tmp_path, small.CONFIGS[config]).eval()
    plain, model = both(model)
    with torch.no_grad():
        model(x)
        for name, parameter in model.named_parameters():
            if "clip" in name or ("scale" in name and way not in ("scaled", "one value")):
                continue
            before, versions = model(x), parameter._version
            EXCHANGES[way](parameter)
            assert parameter._version == versions
            if "scale" in name:
                parameter.data.abs_()
            plain.get_parameter(name).data.copy_(parameter)
            y, want = model(x), plain(x)
            torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()), msg=f"{name}, {way}")
            if name in ("first.weight", "head.weight", "head.bias") and (way, config) != ("one value", "sparse_quant"):
                assert not torch.equal(y, before), name
    assert took_integers(model)


@pytest.mark.parametrize("key", ["norm.running_mean", "norm.running_var", "second.act_quant.clip_max"])
def test_statistics_and_clips_written_through_data(key: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    plain, model = both(compressed(Exchanged(), x, tmp_path).eval())
    with torch.no_grad():
        before = model(x)
        for each in (plain, model):
            dict([*each.named_parameters(), *each.named_buffers()])[key].data.mul_(2.5)
        y, want = model(x), plain(x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert not torch.equal(y, before)


def test_masks_written_through_data(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 8)
    plain, model = both(compressed(Exchanged(), x, tmp_path, small.CONFIGS["sparse_quant"]).eval())
    with torch.no_grad():
        before = model(x)
        for each in (plain, model):
            mask = each.second.sparsity.mask
            mask.data.copy_(ops.mask_2to4(torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))))
        y, want = model(x), plain(x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02 * float(want.abs().max()))
    assert not torch.equal(y, before)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "with holes"])
def test_large_weights_written_through_data(layout: str, tmp_path: Path) -> None:
    """Of which a sample is looked at; a row in a matrix of such size shows in it."""
    shapes = {
        "contiguous": (512, 96),
        "transposed": (512, 96),
        "with holes": (96, 512),
        "channels last": (64, 32, 3, 3),
    }
    w = torch.randn(shapes[layout])
    if layout == "channels last":
        w = w.to(memory_format=torch.channels_last)
    if layout == "transposed":
        w = w.t()
    if layout == "with holes":
        w = torch.cat([w, w], 1)[:, ::2]
    seen = {fingerprint(w, 64)}
    assert fingerprint(w, 64) in seen
    for write in (lambda: w.data.neg_(), lambda: w.data.copy_(w.flip(0)), lambda: w.data.mul_(1.0001)):
        write()
        assert fingerprint(w, 64) not in seen
        seen.add(fingerprint(w, 64))
    for value in w.data.view(-1)[:: w.numel() // 50] if w.is_contiguous() else []:
        value.add_(1.0)
        assert fingerprint(w) not in seen
        seen.add(fingerprint(w))


def test_evaluations_keep_packed_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = compressed(Exchanged(80), x, tmp_path).eval()
    amct_ext.configure(model, forward="integer")
    with torch.no_grad():
        y = model(x)
        monkeypatch.setattr(ops, "pack_weight", None)
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("frozen", ["weight", "bias", "clips"])
def test_frozen_parameters(frozen: str, tmp_path: Path) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    for name, parameter in model.named_parameters():
        if frozen in name or (frozen == "clips" and "clip_" in name):
            parameter.requires_grad_(False)
    plain, model = both(model)
    x, factors = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 6)
    floats, grads = run(plain, x, factors)[1], run(model, x, factors)[1]
    assert floats.keys() == grads.keys() and all(torch.equal(floats[k], grads[k]) for k in floats)


def test_inside_checkpointing(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    amct_ext.configure(model, forward="integer")
    x, factors = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 6)
    other = copy.deepcopy(model)
    expected = run(model, x, factors)[1]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = other

        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(self.inner, value, use_reentrant=False)

    for name, grad in run(Checkpointed(), x, factors)[1].items():
        assert torch.equal(grad, expected[name.removeprefix("inner.")]), name


def test_compiled_graphs_multiply_floats(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    x = torch.randn(2, 4, 8, 8)
    expected = model(x)
    amct_ext.configure(model, forward="integer")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_evaluation_gathers_shifts(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(1))
    plain, model = both(model)
    x = small.batch(1)[0]
    for each in (plain, model):
        each.eval()
        with torch.no_grad():
            each(x)
    assert took_integers(model)
    assert amct_ext.shift_bits(model).keys() == amct_ext.shift_bits(plain).keys()


def test_a_few_steps_train_alike(tmp_path: Path) -> None:
    """Both paths leave the same model behind, up to the rounding of the float sums."""
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0
    for each in (models := both(model)):
        train(each, optimizer_of(each), range(5))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=5e-2, atol=5e-2, msg=name)
