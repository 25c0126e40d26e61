"""Compressed layers one by one: structure, sharing, searchN, what an evaluation does, torch.compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_models as small
from support.retrain_job import Job, evaluate, optimizer_of, train
from torch import nn

import amct_ext
from amct_ext import ops
from amct_ext.layers.compressed import CompressedLayer
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.model_surgery.swap import fold_layers
from amct_ext.record.text import read_record


def make(folder: Path, config: str) -> nn.Module:
    return Job(folder, config).create()


def test_structure(tmp_path: Path) -> None:
    """Names, classes and float parameters stay; what is new hangs below; BatchNorm stays where it was."""
    original = small.build()
    model = make(tmp_path, small.CONFIGS["sparse_quant"])
    assert isinstance(model, small.Residual) and isinstance(model.conv1, nn.Conv2d) and isinstance(model.fc, nn.Linear)
    assert type(model.bn1) is nn.BatchNorm2d
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert {n for n, _ in model.conv1.named_children()} == {"sparsity", "weight_quant", "act_quant", "search_n"}
    # Only what is trained is a Parameter.
    new = {n for n, _ in model.named_parameters()} - {n for n, _ in original.named_parameters()}
    assert new and all(n.endswith(("clip_max", "clip_min")) for n in new)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_original_are_kept(tmp_path: Path, training: bool) -> None:
    original = small.build().train(training)
    original.bn1.eval()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    job = Job(tmp_path, small.CONFIGS["mixed_quant"])
    model = amct_ext.create_compressed_retrain_model(original, small.SAMPLE, str(job.config), str(job.record))
    assert all(m.training is training for n, m in model.named_modules() if n != "bn1") and not model.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert not any(isinstance(m, CompressedLayer) for m in original.modules())


def test_shared_input_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path, small.QUANT)
    assert model.down.act_quant is None and model.down.activation is model.conv1.act_quant
    assert not any(k.startswith("down.act_quant") for k in model.state_dict())
    calls = []
    real = ops.ulq_fake_quantize_
    monkeypatch.setattr(ops, "ulq_fake_quantize_", lambda x, *args: calls.append(x.numel()) or real(x, *args))
    model.train()(small.batch(0)[0])
    assert len([n for n in calls if n]) == 4  # stem, conv1 = down, conv2, fc
    assert model.conv1.act_quant.shared.empty  # nothing outlives the forward


def test_shared_clips_get_the_gradient_of_all_readers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make(tmp_path, small.QUANT)
    train(model, optimizer_of(model), range(1))
    x = torch.randn(2, 8, 6, 6) * 3
    quantiser = model.conv1.act_quant
    model.zero_grad()
    (model.conv1(x).sum() + model.down(x).sum() * 2).backward()
    both = quantiser.clip_max.grad.clone()
    quantiser.clip_max.grad = None
    y = quantiser._quantize(x)[0]
    weights = (model.conv1.compressed_weight(), model.down.compressed_weight())
    one = nn.functional.conv2d(y, weights[0], None, 2, 1).sum()
    (one + nn.functional.conv2d(y, weights[1], model.down.bias, 2).sum() * 2).backward()
    torch.testing.assert_close(both, quantiser.clip_max.grad)


def test_reader_without_the_owner(tmp_path: Path) -> None:
    """A reader whose input is not the one that was quantised last computes its own, with the shared clips."""
    model = make(tmp_path, small.QUANT)
    train(model, optimizer_of(model), range(1))
    x = torch.randn(2, 8, 6, 6)
    alone = model.down(x)
    model.conv1(x)
    assert torch.equal(model.down(x), alone)


def numpy_shift(x: np.ndarray, deq: np.ndarray) -> np.ndarray:
    """searchN by its definition, channels on axis 1."""
    s = np.clip(np.round(x.astype(np.float64) / deq.astype(np.float64)[None, :, None, None]), -(2**31), 2**31 - 1)
    errors = []
    for n in range(1, 17):
        squeezed = np.clip(np.floor(s / 2**n), -32768, 32767) * 2**n
        errors.append(((squeezed - s) ** 2).sum((0, 2, 3)))
    return np.stack(errors, 1)


def test_search_n(tmp_path: Path) -> None:
    model = make(tmp_path, "batch_num: 2\n" + small.QUANT)
    train(model, optimizer_of(model), range(3))
    with pytest.raises(RuntimeError, match="eval"):
        amct_ext.shift_bits(model)
    seen: dict[str, list[torch.Tensor]] = {"bn1": [], "down": []}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: seen[n].append(y.detach().clone()))
        for n in seen
    ]
    model.eval()
    with torch.no_grad():
        for i in range(3):  # the third batch is not needed any more
            model(small.batch(i)[0] * 50)
    for hook in hooks:
        hook.remove()
    found = amct_ext.shift_bits(model)
    assert set(found) == {n for n, _ in compressed_layers(model)}
    for layer, source in (("conv1", "bn1"), ("down", "down")):
        deq = model.get_submodule(layer).deq_scale().numpy()
        expected = sum(numpy_shift(y.numpy(), deq) for y in seen[source][:2])
        assert found[layer] == (expected.argmin(1) + 1).tolist()
        np.testing.assert_allclose(model.get_submodule(layer).search_n.errors.numpy(), expected, rtol=1e-9)
    train(model, optimizer_of(model), range(1))
    with pytest.raises(RuntimeError, match="eval"):
        amct_ext.shift_bits(model)
    evaluate(model)
    assert amct_ext.shift_bits(model).keys() == found.keys()


def test_search_n_identity_and_first_layers_only_in_eval(tmp_path: Path) -> None:
    model = make(tmp_path, small.QUANT)
    train(model, optimizer_of(model), range(2))
    assert all(int(layer.search_n.batches) == 0 for _, layer in compressed_layers(model))
    first = evaluate(model)
    assert torch.equal(first, evaluate(model))
    assert all(int(layer.search_n.batches) == 1 for _, layer in compressed_layers(model))


def test_shift_bit_in_the_record_only_when_asked(tmp_path: Path) -> None:
    for name, config, expected in (("no", small.QUANT, False), ("yes", "write_shift_bit: true\n" + small.QUANT, True)):
        (tmp_path / name).mkdir()
        job = Job(tmp_path / name, config)
        model = job.create()
        train(model, optimizer_of(model), range(1))
        evaluate(model)
        record = read_record(str(job.record))
        assert [bool(entry.shift_bit) for entry in record.quant] == [expected] * 5
        if expected:
            assert {e.key: list(e.shift_bit) for e in record.quant} == amct_ext.shift_bits(model)
            assert all(len(e.shift_bit) == len(e.scale_w) for e in record.quant)


def test_first_forward_in_eval_mode_works(tmp_path: Path) -> None:
    """The reference raises there and hangs at the next call."""
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    before = {key: value.clone() for key, value in model.state_dict().items() if not key.endswith("weight_quant.scale")}
    out = evaluate(model)
    assert torch.nn.functional.cosine_similarity(out, evaluate(small.build()), dim=1).min() > 0.99
    assert len(read_record(str(job.record)).quant) == 5  # of what was evaluated
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key].nan_to_num(7), value.nan_to_num(7)), key
    train(model, optimizer_of(model), range(1))
    evaluate(model)
    assert len(read_record(str(job.record)).quant) == 5


def test_record_follows_every_evaluation(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    model = job.create()
    train(model, optimizer_of(model), range(2))
    evaluate(model)
    first = job.record.read_text()
    written = job.record.stat().st_mtime_ns
    evaluate(model)
    assert job.record.stat().st_mtime_ns == written  # not once per evaluation forward
    train(model, optimizer_of(model), range(2, 4))
    assert job.record.read_text() == first  # nor by training
    evaluate(model)
    assert job.record.read_text() != first


def test_a_training_step_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_quant"])  # masks are renewed every second step
    optimizer = optimizer_of(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"file access in a training step: {args}")

    for name in ("builtins.open", "os.open", "io.open", "pathlib.Path.open"):
        monkeypatch.setattr(name, refuse)
    train(model, optimizer, range(3))


def test_evaluation_does_not_touch_masks_or_their_counter(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_refreshed"])
    train(model, optimizer_of(model), range(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randn_like(model.conv1.weight))
    evaluate(model)
    for key, value in model.state_dict().items():
        if "sparsity" in key:
            assert torch.equal(value, before[key]), key
    assert int(model.conv1.sparsity.step) == 3
    train(model, optimizer_of(model), range(3, 4))  # step 3 of a refresh every 2: not due
    assert torch.equal(model.conv1.sparsity.mask, before["conv1.sparsity.mask"])
    weight = model.conv1.weight.detach().clone()
    train(model, optimizer_of(model), range(4, 5))  # step 4: due
    assert torch.equal(model.conv1.sparsity.mask, ops.mask_2to4(weight, 1))


def test_masked_elements_get_no_gradient(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_quant"])
    model.train()(small.batch(0)[0]).sum().backward()
    mask = model.conv1.sparsity.mask
    assert (model.conv1.weight.grad[~mask] == 0).all() and (model.conv1.weight.grad[mask] != 0).any()


def test_no_graph_under_no_grad(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_learned"])
    with torch.no_grad():
        assert model.train()(small.batch(0)[0]).grad_fn is None
    assert model(small.batch(0)[0]).grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["quant", "sparse_learned"])
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """A cast model trains and evaluates; clips, scales and search errors keep their precision."""
    model = make(tmp_path, small.CONFIGS[name]).to(dtype).train()
    assert model.conv1.weight.dtype == dtype
    assert model.conv1.search_n.errors.dtype == torch.float64
    low = {n for n, v in model.state_dict().items() if v.dtype in (torch.bfloat16, torch.float16)}
    assert not [n for n in low if "quant" in n or "search_n" in n]
    optimizer = optimizer_of(model)
    for i in range(2):
        x, y = small.batch(i)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(dtype)), y)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x.to(dtype))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(tmp_path, small.CONFIGS["sparse_quant"]).train()
    optimizer = optimizer_of(model)
    for i in range(2):
        x, y = small.batch(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_calibration_under_inference_mode(tmp_path: Path) -> None:
    model = make(tmp_path, small.CONFIGS["two_batches"])
    with torch.inference_mode():
        for i in range(3):
            model.eval()(small.batch(i)[0])
    train(model, optimizer_of(model), range(2))


def test_fold_gives_the_float_layers_back(tmp_path: Path) -> None:
    job = Job(tmp_path, small.CONFIGS["sparse"])
    model = job.create()
    train(model, optimizer_of(model), range(2))
    expected = evaluate(model)
    plain = fold_layers(model)
    assert type(plain.conv1) is nn.Conv2d and type(plain.fc) is nn.Linear
    assert set(plain.state_dict()) == set(small.build().state_dict())
    assert torch.equal(evaluate_plain(plain), expected)


def evaluate_plain(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(small.batch(50)[0])


def test_circular_padding_is_honoured(tmp_path: Path) -> None:
    """2:4 keeps the padding mode (AMCT pads with zeros); quantisation leaves the layer float and says why."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
            self.b = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    (tmp_path / "c.cfg").write_text(small.CONFIGS["sparse_quant"])
    x = torch.randn(2, 4, 6, 6)
    model = amct_ext.create_compressed_retrain_model(Net(), x, str(tmp_path / "c.cfg"), str(tmp_path / "r.txt"))
    assert model.a.weight_quant is None and model.a.sparsity is not None and model.b.weight_quant is not None
    plain = nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    expected = nn.functional.conv2d(plain, model.a.masked_weight(), model.a.bias)
    torch.testing.assert_close(model.a(x), expected)


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant", "filter_quant"])
def test_compiled_model_agrees(tmp_path: Path, name: str) -> None:
    """fullgraph, training and evaluation, against the eager model."""
    job = Job(tmp_path, small.CONFIGS[name])
    eager = job.create()
    eager.drop.p = 0.0
    train(eager, optimizer_of(eager), range(1))  # calibrate
    torch.save(eager.state_dict(), tmp_path / "state.pth")
    other = job.restore(tmp_path / "state.pth", None)
    other.drop.p = 0.0
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for model, run in ((eager, eager), (other, compiled)):
        optimizer = optimizer_of(model)
        train(run, optimizer, range(1, 4))
    for (key, a), b in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(evaluate(eager), evaluate(compiled), rtol=1e-4, atol=1e-4)
