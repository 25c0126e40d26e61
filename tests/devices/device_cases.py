"""Every op and whole jobs on a device other than CPU and CUDA: the results of the CPU, no host syncs.

    AMCT_TEST_DEVICE=npu python -m pytest tests/devices/device_cases.py

`test_plugin_device.py` runs this file on the stand-in device, in a child process. The stand-in computes with the CPU's
kernels, so its results are compared bit for bit; those of another device within a tolerance.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import rnn_job
from support.jobs.device_job import (
    CPU,
    DEVICE,
    EXACT,
    NAME,
    Job,
    agree,
    host_syncs_in_training,
    optimizer_of,
    references_on_the_cpu,
    run,
)
from support.models import small
from support.ops.arguments import arguments
from support.processes import standin
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import amct_ext
from amct_ext import backends, ops

JOBS = ("quant", "learned", "two_batches", "filter_quant", "sparse_quant", "sparse_learned", "mixed_quant")
differentiable = pytest.mark.parametrize("op", [
    "ulq_fake_quantize", "arq_fake_quantize", "lsq_fake_quantize", "arq_fake_quantize_many", "apply_mask",
    "sparsify_2to4", "sparse_arq_fake_quantize", "sparse_arq_fake_quantize_2to4",
])  # fmt: skip

if not NAME:
    pytest.skip("AMCT_TEST_DEVICE names no device", allow_module_level=True)


def moved(values: Any, device: torch.device) -> Any:
    """A copy on a device; what requires a gradient is a leaf again."""
    return tree_map(
        lambda v: v.detach().to(device, copy=True).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v,
        values,
    )


def with_defaults(op: str, sample: tuple[Any, ...]) -> list[Any]:
    """The sample with the defaults of the schema."""
    schema = getattr(torch.ops.amct_ext, op).default._schema
    return [*sample, *(argument.default_value for argument in schema.arguments[len(sample) :])]


def test_the_device_has_no_kernels() -> None:
    assert not EXACT or backends.kernels(NAME) == ()


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_runs_through_its_reference(op: str) -> None:
    for sample in arguments(op, CPU):
        there = moved(sample, DEVICE)
        with torch.no_grad():
            result = getattr(torch.ops.amct_ext, op)(*there)
            expected = backends.reference(op)(*with_defaults(op, sample))
        agree((result, there), (expected, sample))  # the arguments too: some are written to
        assert all(t.device.type == DEVICE.type for t in tree_flatten(result)[0] if isinstance(t, Tensor))


@differentiable
def test_gradients(op: str) -> None:
    for sample in arguments(op, CPU):
        with references_on_the_cpu():
            expected = gradients(op, moved(sample, CPU))
        agree(gradients(op, moved(sample, DEVICE)), expected)


def gradients(op: str, sample: tuple[Any, ...]) -> list[Tensor]:
    results = [r for r in tree_flatten(getattr(torch.ops.amct_ext, op)(*sample))[0] if r.requires_grad]
    sum((r * r.detach().sin()).sum() for r in results).backward()
    return [t.grad for t in tree_flatten(sample)[0] if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("op", ["ulq_fake_quantize", "arq_fake_quantize", "sparsify_2to4"])
def test_a_kernel_of_the_device_wins_and_keeps_the_autograd_rule(op: str) -> None:
    calls: list[str] = []

    def kernel(*sample: Any) -> Any:
        calls.append(op)
        y, *rest = backends.reference(op)(*with_defaults(op, sample))
        return (y + 1, *rest)

    sample = arguments(op, CPU)[0]
    there = moved(sample, DEVICE)
    plain, before = getattr(ops, op)(*there)[0], backends.kernels(NAME)
    library = torch.library.Library("amct_ext", "IMPL")
    try:
        library.impl(op, kernel, "PrivateUse1", allow_override=True)
        assert op in backends.kernels(NAME)
        y = getattr(ops, op)(*there)[0]
        assert calls == [op]
        assert torch.equal(y, plain + 1)
        y.sum().backward()
        getattr(ops, op)(*sample)[0].sum().backward()
        agree(there[0].grad, sample[0].grad)
        assert calls == [op]  # neither by the backward nor by the CPU
    finally:
        library._destroy()
    assert backends.kernels(NAME) == before


@pytest.mark.parametrize("config", JOBS)
def test_a_job_gives_what_it_gives_on_the_cpu(config: str, tmp_path: Path) -> None:
    here, there = Job(tmp_path / "cpu", config, CPU), Job(tmp_path / "device", config, DEVICE)
    with references_on_the_cpu():
        expected, losses, output = run(here)
    model, *actual = run(there)
    assert all(t.device.type == DEVICE.type for t in model.state_dict().values())
    agree(actual, [losses, output])
    agree(list(model.state_dict().values()), list(expected.state_dict().values()))
    if EXACT:
        assert there.record.read_bytes() == here.record.read_bytes()
    kernels = run(Job(tmp_path / "kernels", config, CPU))[1]
    torch.testing.assert_close([loss.cpu() for loss in actual[0]], kernels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["filter_quant", "sparse_quant"])
def test_a_checkpoint_restores_on_the_device_and_on_the_cpu(config: str, tmp_path: Path) -> None:
    there = Job(tmp_path / "device", config, DEVICE)
    model = there.create()
    optimizer = optimizer_of(model)
    there.train(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pth")
    whole = there.train(model, optimizer, range(3, 6))
    for device in (DEVICE, CPU):
        job = Job(tmp_path / "device", config, device)
        restored = job.restore(tmp_path / "half.pth")
        saved = torch.load(tmp_path / "half.pth", map_location="cpu", weights_only=True)
        assert all(t.device.type == device.type for t in restored.state_dict().values())
        agree(list(restored.state_dict().values()), list(saved["model"].values()))
        again = optimizer_of(restored)
        again.load_state_dict(saved["optimizer"])
        if device == CPU:
            with references_on_the_cpu():
                losses = job.train(restored, again, range(3, 6))
        else:
            losses = job.train(restored, again, range(3, 6))
        agree(losses, [loss.cpu() for loss in whole])


def test_a_checkpoint_of_the_cpu_restores_on_the_device(tmp_path: Path) -> None:
    here = Job(tmp_path / "files", "sparse_quant", CPU)
    model = here.create()
    here.train(model, optimizer_of(model), range(3))
    torch.save({"model": model.state_dict()}, tmp_path / "cpu.pth")
    restored = Job(tmp_path / "files", "sparse_quant", DEVICE).restore(tmp_path / "cpu.pth")
    agree(list(restored.state_dict().values()), list(model.state_dict().values()))


def test_a_compressed_model_moves_and_is_copied(tmp_path: Path) -> None:
    here, there = Job(tmp_path / "files", "sparse_quant", CPU), Job(tmp_path / "files", "sparse_quant", DEVICE)
    model = here.create()
    here.train(model, optimizer_of(model), range(2))
    with references_on_the_cpu():
        expected = here.evaluate(model)
    agree(there.evaluate(copy.deepcopy(model).to(DEVICE)), expected)
    agree(there.evaluate(copy.deepcopy(model.to(DEVICE))), expected)
    agree(model.to(CPU).state_dict()["fc.sparsity.mask"].cpu(), model.state_dict()["fc.sparsity.mask"])


@pytest.mark.skipif(not EXACT, reason="only the stand-in device records host syncs")
@pytest.mark.parametrize("config", [*JOBS, "filter", "sparse", "sparse_refreshed"])
def test_a_training_step_has_no_host_sync(config: str, tmp_path: Path) -> None:
    assert host_syncs_in_training(Job(tmp_path / "files", config, DEVICE)) == []
    float(torch.ones(2, device=DEVICE).sum())
    assert standin.host_syncs() == ["item"]  # it does record


@pytest.mark.parametrize("setting", ["quant", "learned"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers(kind: str, setting: str, tmp_path: Path) -> None:
    losses = {}
    for device in (CPU, DEVICE):
        folder = tmp_path / device.type
        folder.mkdir()
        model = rnn_job.Job(folder, kind, setting).create().to(device)  # traced on the CPU: torch's own cell runs there
        optimizer = rnn_job.optimizer_of(model)
        losses[device] = []
        for i in range(4):
            x, y = (t.to(device) for t in rnn_job.batch(i))
            standin.host_syncs() if EXACT else None
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            assert not EXACT or i == 0 or standin.host_syncs() == []
            losses[device].append(loss.detach().cpu())
    torch.testing.assert_close(losses[DEVICE], losses[CPU], rtol=1e-4, atol=1e-5)


def test_the_onnx_files_are_those_of_the_cpu(tmp_path: Path) -> None:
    there = Job(tmp_path / "files", "filter_quant", DEVICE)
    model, *_ = run(there)
    for name, device in (("device", DEVICE), ("cpu", CPU)):
        sample = small.SAMPLE.to(device)
        amct_ext.save_compressed_retrain_model(model.to(device), str(there.record), str(tmp_path / name), sample)
    for file in ("fake_quant_model.onnx", "deploy_model.onnx"):
        one, two = (tmp_path / f"{name}_{file}" for name in ("device", "cpu"))
        assert one.read_bytes() == two.read_bytes(), file
