"""State is all that decides: what was copied or loaded counts, whichever way it came."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, train
from support.jobs.rnn_job import Job as RnnJob
from support.jobs.rnn_job import every_kind
from support.jobs.state_job import CONFIGS, clips, copied, floats_only, quantizing, steps
from support.models import small
from torch import nn

import amct_ext
from amct_ext.layers.activation.quantizer import ActivationQuantizer
from amct_ext.layers.shift_search import ShiftSearch


@pytest.fixture
def job(tmp_path: Path, name: str) -> Job:
    return Job(tmp_path, CONFIGS[name])


def test_a_mask_set_by_hand_stays(tmp_path: Path) -> None:
    model = Job(tmp_path, small.CONFIGS["sparse"]).create()
    steps(model, 2)
    wanted = model.conv2.sparsity.mask.logical_not()
    model.conv2.sparsity.mask.copy_(wanted)
    evaluate(model)
    steps(model, 2)
    assert torch.equal(model.conv2.sparsity.mask, wanted)


# -- values copied in place


@pytest.mark.parametrize(
    ("name", "through_data"), [(name, name in ("two_batches", "sparse_learned")) for name in CONFIGS]
)
def test_values_copied_in_place_are_a_load(job: Job, name: str, through_data: bool) -> None:
    """Into a model that never ran, and into one that has been somewhere else; both evaluate and train on alike."""
    trained, fresh, other = job.create(), job.create(), job.create()
    steps(trained, 3)
    evaluate(trained)
    steps(other, 1)
    evaluate(other)
    want = None
    for model in (fresh, other):
        copied(trained, model, through_data)
        assert_same_state(trained, model)
        want = evaluate(trained) if want is None else want
        assert torch.equal(evaluate(model), want)
    for model in (trained, fresh, other):
        train(model, optimizer_of(model), range(5, 8))
    for model in (fresh, other):
        assert_same_state(trained, model)


def test_shifts_come_with_the_values(tmp_path: Path) -> None:
    job = Job(tmp_path, small.QUANT)
    trained = job.create()
    steps(trained, 2)
    evaluate(trained)
    wanted = amct_ext.shift_bits(trained)
    assert amct_ext.shift_bits(copied(trained, job.create())) == wanted
    train(trained, optimizer_of(trained), range(1))  # stale from here on, wherever the values go
    with pytest.raises(amct_ext.AmctError, match="no shift yet"):
        amct_ext.shift_bits(copied(trained, job.create()))


@every_kind
def test_recurrent_layers_too(tmp_path: Path, kind: str) -> None:
    job = RnnJob(tmp_path, kind)
    trained, average = job.create(), job.create()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    for _ in range(4):
        trained.train()(job.sample).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            floats_only(average, trained)
    before = clips(average)
    with torch.no_grad():
        average.eval()(3 * job.sample)
        fresh = copied(trained, job.create())
        assert torch.equal(fresh.eval()(job.sample), trained.eval()(job.sample))
    assert {k: v for k, v in clips(average).items() if "max" in k} == {k: v for k, v in before.items() if "max" in k}


# -- types and empty batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant"])
def test_the_default_dtype_is_nothing_to_the_state(job: Job, name: str, dtype: torch.dtype) -> None:
    net = small.build()
    torch.set_default_dtype(dtype)
    try:
        model = amct_ext.create_compressed_retrain_model(net, small.SAMPLE, str(job.config), str(job.record))
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in job.create().state_dict().items():
        if "_quant" in key or "search_n" in key:
            assert model.state_dict()[key].dtype == value.dtype, key


@quantizing
def test_an_empty_batch_is_none(job: Job, name: str) -> None:
    model, twin = job.create(), job.create()
    empty = small.SAMPLE[:0]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # torch's own refuses to train on nothing
    assert model(empty).shape == (0, 5)
    assert model.eval()(empty).shape == (0, 5)
    for each in (model, twin):
        each.load_state_dict({k: v for k, v in twin.state_dict().items() if k.endswith("sparsity.step")}, strict=False)
        steps(each, 3)
    assert_same_state(model, twin)
    before = clips(model)
    model.eval()(empty)
    assert clips(model) == before
    assert all(q.calibrated for q in model.modules() if isinstance(q, ActivationQuantizer))


# -- what only parameters, or a write in eval mode, tells


@quantizing
def test_torch_func_sees_values_copied_in_place(job: Job, name: str) -> None:
    trained = job.create()
    steps(trained, 3)
    x = small.batch(50)[0]
    want = evaluate(trained)
    seen = torch.func.vmap(copied(trained, job.create()).eval(), randomness="same")(x[None])[0]
    torch.testing.assert_close(seen, want)


def test_shifts_follow_every_change_in_eval_mode(tmp_path: Path) -> None:
    """A changed layer changes what the layers behind it see; a loop may train in eval mode all along."""
    job = Job(tmp_path, "write_shift_bit: true\n" + small.QUANT)
    model = job.create()
    steps(model, 2)
    evaluate(model)
    first = next(m for m in model.modules() if isinstance(m, ActivationQuantizer))
    for change in (lambda: first.clip_max.mul_(4), lambda: next(model.parameters()).mul_(8)):
        with torch.no_grad():
            change()
        evaluate(model)
        loaded = copied(model, job.create())
        for search in (m for m in loaded.modules() if isinstance(m, ShiftSearch)):
            search.reset()
        evaluate(loaded)
        assert amct_ext.shift_bits(model) == amct_ext.shift_bits(loaded)
    average = copy.deepcopy(model)  # has no record file, but shifts
    evaluate(average)
    with torch.no_grad():
        first_of_average = next(m for m in average.modules() if isinstance(m, ActivationQuantizer))
        first_of_average.clip_max.mul_(2)
    evaluate(average)
    amct_ext.update_record(average, str(tmp_path / "average.txt"))


def test_a_model_without_memory_gives_shapes(tmp_path: Path) -> None:
    job = Job(tmp_path, small.LEARNED)
    for before in (0, 2):
        model = job.create()
        steps(model, before)
        if before:
            evaluate(model)
        model.to("meta")
        for mode in (False, True):
            assert model.train(mode)(small.SAMPLE.to("meta")).shape == small.build()(small.SAMPLE).shape
        assert all(value.is_meta for value in model.state_dict().values())
