"""What a device beside the CPU and CUDA must show: every op and whole jobs give what the CPU gives, nothing waits.

    AMCT_TEST_DEVICE=npu python -m pytest tests/devices/device_cases.py

`test_plugin_device.py` runs it on the stand-in device, in a process of its own. There all arithmetic comes to the CPU's
kernels in the end, so results are compared bit for bit; other devices have their own rounding.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rnn_job, standin
from support import small_models as small
from support.op_arguments import arguments
from support.op_samples import same_bits
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import amct_ext
from amct_ext import backends, ops

NAME = os.environ.get("AMCT_TEST_DEVICE", "")
EXACT = NAME == standin.NAME
DEVICE = torch.device(NAME or "cpu")
CPU = torch.device("cpu")
JOBS = ("quant", "learned", "two_batches", "filter_quant", "sparse_quant", "sparse_learned", "mixed_quant")
differentiable = pytest.mark.parametrize("op", [
    "ulq_fake_quantize", "arq_fake_quantize", "lsq_fake_quantize", "arq_fake_quantize_many", "apply_mask",
    "sparsify_2to4", "sparse_arq_fake_quantize", "sparse_arq_fake_quantize_2to4",
])  # fmt: skip

if not NAME:
    pytest.skip("AMCT_TEST_DEVICE names no device", allow_module_level=True)


def agree(actual: Any, expected: Any) -> None:
    for a, b in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        if not isinstance(b, Tensor):
            assert a == b
        elif EXACT:
            assert same_bits(a.detach().cpu(), b.detach())
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


def moved(values: Any, device: torch.device) -> Any:
    """A copy on a device; what requires a gradient is a leaf again."""
    return tree_map(
        lambda v: v.detach().to(device, copy=True).requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v,
        values,
    )


def filled(op: str, sample: tuple[Any, ...]) -> list[Any]:
    """The sample with the defaults of the schema."""
    schema = getattr(torch.ops.amct_ext, op).default._schema
    return [*sample, *(argument.default_value for argument in schema.arguments[len(sample) :])]


@contextmanager
def references_on_the_cpu() -> Iterator[None]:
    """The CPU's kernels set aside: they sum in another order than the references."""
    library = torch.library.Library("amct_ext", "IMPL")
    for op in ops.__all__:
        library.impl(op, backends.reference(op), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def test_the_device_has_no_kernels() -> None:
    assert not EXACT or backends.kernels(NAME) == ()


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_runs_through_its_reference(op: str) -> None:
    for sample in arguments(op, CPU):
        there = moved(sample, DEVICE)
        with torch.no_grad():
            result = getattr(torch.ops.amct_ext, op)(*there)
            expected = backends.reference(op)(*filled(op, sample))
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
        y, *rest = backends.reference(op)(*filled(op, sample))
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


class Net(nn.Module):
    """Convolutions, BatchNorm, a shared input, a Linear; no dropout, whose random numbers belong to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 1)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.norm(self.left(x)) + self.right(x))
        return self.fc(x.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


class Job:
    """A retraining job on a device, with files of its own."""

    def __init__(self, folder: Path, config: str, device: torch.device) -> None:
        folder.mkdir(exist_ok=True)
        self.device, self.folder, self.record = device, folder, folder / "record.txt"
        self.config = folder / "compress.cfg"
        self.config.write_text(small.CONFIGS[config])
        self.sample = small.SAMPLE.to(device)

    def create(self) -> nn.Module:
        model = net().to(self.device)
        return amct_ext.create_compressed_retrain_model(model, self.sample, str(self.config), str(self.record))

    def restore(self, checkpoint: Path) -> nn.Module:
        return amct_ext.restore_compressed_retrain_model(
            net().to(self.device), self.sample, str(self.config), str(self.record), str(checkpoint), "model"
        )

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        losses = []
        model.train()
        for i in steps:
            x, y = (t.to(self.device) for t in small.batch(i))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def evaluate(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(small.batch(50)[0].to(self.device))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def run(job: Job) -> tuple[nn.Module, list[Tensor], Tensor]:
    model = job.create()
    losses = job.train(model, optimizer_of(model), range(5))
    return model, losses, job.evaluate(model)


def waits_in_training(job: Job) -> list[str]:
    """What makes the host wait for the device in three training steps, once calibration is over."""
    model = job.create()
    optimizer = optimizer_of(model)
    job.train(model, optimizer, range(2))
    batches = [tuple(t.to(DEVICE) for t in small.batch(i)) for i in range(3)]
    standin.waits()
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return standin.waits()


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


@pytest.mark.skipif(not EXACT, reason="only the stand-in device counts what makes the host wait")
@pytest.mark.parametrize("config", [*JOBS, "filter", "sparse", "sparse_refreshed"])
def test_a_training_step_makes_nothing_wait(config: str, tmp_path: Path) -> None:
    assert waits_in_training(Job(tmp_path / "files", config, DEVICE)) == []
    float(torch.ones(2, device=DEVICE).sum())
    assert standin.waits() == ["item"]  # it does count


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
            standin.waits() if EXACT else None
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            assert not EXACT or i == 0 or standin.waits() == []
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
