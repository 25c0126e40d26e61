"""searchN: shifts against the definition, when they are searched, when they are recorded."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.jobs.retrain_job import Job, evaluate, optimizer_of, train
from support.models import small

import amct_ext
from amct_ext.model_surgery.lookup import compressed_layers
from amct_ext.record.text import read_record


def numpy_shift(x: np.ndarray, deq: np.ndarray) -> np.ndarray:
    """searchN by its definition, channels on axis 1."""
    s = np.clip(np.round(x.astype(np.float64) / deq.astype(np.float64)[None, :, None, None]), -(2**31), 2**31 - 1)
    errors = []
    for n in range(1, 17):
        squeezed = np.clip(np.floor(s / 2**n), -32768, 32767) * 2**n
        errors.append(((squeezed - s) ** 2).sum((0, 2, 3)))
    return np.stack(errors, 1)


def test_search_n(tmp_path: Path) -> None:
    model = Job(tmp_path, "batch_num: 2\n" + small.QUANT).create()
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
    model = Job(tmp_path, small.QUANT).create()
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


def test_a_batch_that_is_not_finite_is_forgotten_with_the_next_search(tmp_path: Path) -> None:
    model = Job(tmp_path, small.QUANT).create()
    train(model, optimizer_of(model), range(2))
    twin = copy.deepcopy(model)
    search = model.conv1.search_n.eval()
    search.observe(torch.full((2, 16, 4, 4), torch.nan), model.conv1.deq_scale(), 1)
    search.reset()
    found = []
    for each in (model, twin):
        evaluate(each)
        found.append(amct_ext.shift_bits(each))
    assert found[0] == found[1]
