"""What a quantised layer keeps for backward: the same gradients, bit for bit, without the quantised input."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checks.saved_tensors import Watch, assert_same_gradients, gradients, saved_bytes
from support.jobs.retrain_job import Job, optimizer_of, train
from support.models import small
from support.models.single_layer import LAYERS, Chain, compressed
from torch import Tensor, nn

import amct_ext
from amct_ext import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIGS = ("quant", "learned", "sparse_quant")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_get_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, shape = LAYERS[kind]
    model = compressed(Chain(build()), torch.randn(shape), tmp_path).to(dtype)
    x = torch.randn(shape).to(dtype)
    inputs = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    if x.dim() == 4:
        inputs += [x.to(memory_format=torch.channels_last), torch.cat([x, x], 2)[:, :, ::2]]
    for value in inputs:
        assert_same_gradients(model, lambda m, value=value: m(value))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_get_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Shared inputs, 2:4 sparsity, learned scales, autocast."""
    model = Job(tmp_path, small.CONFIGS[name]).create()
    model.drop.p = 0.0
    train(model, optimizer_of(model), range(1))
    model = model.to(dtype).train()
    x = small.batch(5)[0].to(dtype)
    assert_same_gradients(model, lambda m: m(x))
    assert_same_gradients(model, lambda m: m(x.to(memory_format=torch.channels_last)))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_gradients(model, lambda m: m(x))


def test_first_forward_and_several_batches(tmp_path: Path) -> None:
    """While a calibration still runs the clips change between forwards."""
    model = Job(tmp_path, small.CONFIGS["two_batches"]).create().train()
    model.drop.p = 0.0
    for i in range(3):
        assert_same_gradients(model, lambda m, i=i: m(small.batch(i)[0]))


def test_two_forwards_before_one_backward(tmp_path: Path) -> None:
    """Each is undone with the clips it ran with, though the second one overwrote them."""
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0

    def run(m: nn.Module) -> Tensor:
        first = m(small.batch(0)[0])
        with torch.no_grad():
            for p in m.parameters():
                if p.dim() == 0:  # clips, which no backward of a float layer keeps
                    p.mul_(0.5)
        return first + m(small.batch(1)[0])

    model(small.batch(2)[0])
    assert_same_gradients(model, run)


def test_the_quantised_input_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    model(small.batch(0)[0])
    made: list[Watch] = []
    real = ops.ulq_fake_quantize_

    def watched(*args: Any) -> tuple[Tensor, ...]:
        result = real(*args)
        made.append(Watch(result[0]))
        return result

    monkeypatch.setattr(ops, "ulq_fake_quantize_", watched)
    for stash, expected in (("rebuild", True), ("off", False)):
        amct_ext.configure(model, stash=stash)
        made.clear()
        y = model(small.batch(1)[0])
        assert len(made) == 4 and all(w.freed is expected for w in made)
        y.sum().backward()
        del y
        assert all(w.freed for w in made)


def test_saved_bytes(tmp_path: Path) -> None:
    """No more than the float model's but for the compressed weights; without the stash, half as much again."""
    sizes: list[int] = []
    plain = small.build().train()
    model = Job(tmp_path, small.QUANT).create().train()
    x = torch.randn(16, 3, 24, 24)
    model(x)
    for run, setting in ((plain, None), (model, "rebuild"), (model, "off")):
        if setting is not None:
            amct_ext.configure(model, stash=setting)
        with saved_bytes(sizes):
            run(x)
    weights = sum(p.nbytes for p in plain.parameters() if p.dim() > 1)
    assert sizes[1] <= sizes[0] + weights + 1024
    assert sizes[2] > 1.3 * sizes[0]


def test_compiled_and_eager_keep_the_same_results(tmp_path: Path) -> None:
    """The setting changes nothing in a compiled graph, forward and backward in one piece."""
    torch.compiler.reset()
    model = compressed(Chain(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    x = torch.randn(2, 4, 8, 8)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for setting in ("rebuild", "off"):
        amct_ext.configure(model, stash=setting)
        eager, compiled = gradients(model, lambda: model(x)), gradients(model, lambda: run(x))
        for name, value in eager.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


def test_an_input_changed_in_place_is_noticed(tmp_path: Path) -> None:
    model = compressed(nn.Sequential(nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8), tmp_path)
    for setting in ("rebuild", "off"):
        amct_ext.configure(model, stash=setting)
        x = torch.randn(2, 4, 8, 8)
        y = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an in"):
            y.sum().backward()


def test_second_backward_and_gradient_of_the_gradient(tmp_path: Path) -> None:
    model = compressed(Chain(nn.Linear(7, 4)), torch.randn(5, 7), tmp_path)
    y = model(torch.randn(5, 7)).square().sum()
    y.backward(retain_graph=True)
    once = model.layer.weight.grad.clone()
    y.backward()
    assert torch.equal(model.layer.weight.grad, once * 2)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    x = torch.randn(5, 7)
    grad = torch.autograd.grad(model(x).pow(3).sum(), model.layer.weight, create_graph=True)[0]
    assert_same_gradients(model, lambda m: m(x))
    grad.sum().backward()
    assert torch.isfinite(model.layer.weight.grad).all()


@pytest.mark.parametrize("frozen", ["weight", "clips"])
def test_frozen_parameters(frozen: str, tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    model.drop.p = 0.0
    model(small.batch(0)[0])
    for name, p in model.named_parameters():
        p.requires_grad_(("clip_" in name) != (frozen == "clips") or name == "fc.bias")
    assert_same_gradients(model, lambda m: m(small.batch(1)[0]))


def test_copies_keep_the_setting(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create().train()
    model(small.batch(0)[0])
    for setting in ("off", "rebuild"):
        amct_ext.configure(model, stash=setting)
        amct_ext.configure(model, validation="eager")  # leaves the other setting alone
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {other.conv1.act_quant.stash, other.down.input_quantizer.stash} == {setting == "rebuild"}
            assert other.conv1.act_quant.validate_now


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stash must be 'rebuild' or 'off', not 'int4'"):
        amct_ext.configure(Job(tmp_path, small.QUANT).create(), stash="int4")
    with pytest.raises(RuntimeError, match="not made by"):
        amct_ext.configure(small.build(), stash="off")
