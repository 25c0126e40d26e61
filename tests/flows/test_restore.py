"""Restore is exact: what was saved comes back bit for bit, and training goes on as if it had never stopped."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from support.jobs.retrain_job import Job, assert_same_state, evaluate, optimizer_of, resume, train, train_and_save
from support.models import small
from torch import nn

import amct_ext

every_config = pytest.mark.parametrize("name", list(small.CONFIGS))


@pytest.fixture
def job(tmp_path: Path, name: str) -> Job:
    return Job(tmp_path, small.CONFIGS[name])


@every_config
def test_train_restore_train_equals_train(job: Job, name: str, tmp_path: Path) -> None:
    whole = job.create()
    train(whole, optimizer_of(whole), range(6))

    first = train_and_save(job, tmp_path / "half.pth", range(3))
    second, optimizer = resume(job, tmp_path / "half.pth")
    assert_same_state(first, second)
    train(second, optimizer, range(3, 6))

    assert_same_state(whole, second)
    assert torch.equal(evaluate(whole), evaluate(second))


@every_config
def test_restored_evaluation_is_bit_equal(job: Job, name: str, tmp_path: Path) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(3))
    torch.save(model.state_dict(), tmp_path / "state.pth")
    expected = evaluate(model)
    record = job.record.read_text()
    restored = job.restore(tmp_path / "state.pth", None)
    assert torch.equal(evaluate(restored), expected)
    assert job.record.read_text() == record  # the restored model records the same factors


def test_the_checkpoints_mask_wins_over_the_records(tmp_path: Path) -> None:
    job = Job(tmp_path, small.CONFIGS["sparse_refreshed"])
    model = job.create()
    old = job.record.read_text()
    train(model, optimizer_of(model), range(2))
    with torch.no_grad():
        model.conv2.weight.copy_(torch.randn_like(model.conv2.weight))
    train(model, optimizer_of(model), range(2, 3))  # renews the masks
    torch.save(model.state_dict(), tmp_path / "state.pth")
    job.record.write_text(old)
    restored = job.restore(tmp_path / "state.pth", None)
    assert torch.equal(restored.conv2.sparsity.mask, model.conv2.sparsity.mask)
    fresh = job.create()
    assert not torch.equal(fresh.conv2.sparsity.mask, model.conv2.sparsity.mask)


def test_restore_in_mid_calibration(tmp_path: Path) -> None:
    job = Job(tmp_path, "batch_num: 3\n" + small.QUANT)
    whole = job.create()
    train(whole, optimizer_of(whole), range(1))
    torch.save(whole.state_dict(), tmp_path / "state.pth")
    restored = job.restore(tmp_path / "state.pth", None)
    assert_same_state(whole, restored)
    assert torch.equal(evaluate(whole), evaluate(restored))
    train(restored, optimizer_of(restored), range(1, 5))  # its first batch is not there: the calibration starts over
    twin = job.create()
    twin.load_state_dict({k: v for k, v in whole.state_dict().items() if "act_quant" not in k}, strict=False)
    train(twin, optimizer_of(twin), range(1, 5))
    assert_same_state(twin, restored)


@pytest.mark.parametrize("name", ["sparse_quant", "filter_quant"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixed_checkpoint(job: Job, name: str, prefix: str, tmp_path: Path) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(2))
    torch.save({"model": {prefix + k: v for k, v in model.state_dict().items()}}, tmp_path / "state.pth")
    assert_same_state(job.restore(tmp_path / "state.pth"), model)


@pytest.mark.parametrize("name", ["filter_quant", "sparse_quant"])
def test_distributed_wrapper_stays(job: Job, name: str, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel
        model = amct_ext.create_compressed_retrain_model(
            ddp(small.build()), small.SAMPLE, str(job.config), str(job.record)
        )
        assert isinstance(model, ddp)
        train(model, optimizer_of(model), range(2))
        torch.save({"model": model.state_dict()}, tmp_path / "state.pth")
        restored = job.restore(tmp_path / "state.pth", model=ddp(small.build()))
        assert isinstance(restored, ddp)
        assert_same_state(model, restored)
        plain = job.restore(tmp_path / "state.pth")
        assert torch.equal(evaluate(plain), evaluate(model))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["quant", "learned", "sparse_quant", "mixed_quant"])
def test_through_amct_names_and_back(job: Job, name: str, tmp_path: Path) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(3))
    torch.save(amct_ext.to_amct_state_dict(model), tmp_path / "amct.pth")
    expected = evaluate(model)
    assert torch.equal(evaluate(job.restore(tmp_path / "amct.pth", None)), expected)


@pytest.mark.parametrize("name", ["quant", "filter_quant", "sparse_quant", "learned"])
def test_copies_and_pickles_are_whole(job: Job, name: str) -> None:
    model = job.create()
    train(model, optimizer_of(model), range(2))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    copied = copy.deepcopy(model)
    for other in (copied, pickled):
        assert_same_state(model, other)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        train(other, optimizer_of(other), range(2, 4))
    assert_same_state(copied, pickled)
    train(model, optimizer_of(model), range(2, 4))
    assert_same_state(model, copied)


def test_two_models_in_one_process_do_not_meet(tmp_path: Path) -> None:
    names = ("sparse_quant", "filter_quant")
    alone = []
    for name in names:
        (tmp_path / name).mkdir()
        model = Job(tmp_path / name, small.CONFIGS[name]).create()
        train(model, optimizer_of(model), range(4))
        alone.append((model, evaluate(model), (tmp_path / name / "record.txt").read_text()))
    together = []
    for name in names:
        (tmp_path / name / "again").mkdir()
        together.append(Job(tmp_path / name / "again", small.CONFIGS[name]).create())
    optimizers = [optimizer_of(model) for model in together]
    for i in range(4):
        for model, optimizer in zip(together, optimizers, strict=True):
            train(model, optimizer, range(i, i + 1))
    for model, name, (_, expected, record) in zip(together, names, alone, strict=True):
        assert torch.equal(evaluate(model), expected)
        assert (tmp_path / name / "again" / "record.txt").read_text() == record
