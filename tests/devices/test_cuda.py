"""The CUDA ops beyond their results: no host sync, capture into a CUDA graph, streams, reproducible bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.models import small
from support.ops.arguments import WITH_CUDA_KERNEL, arguments
from support.ops.samples import same_bits
from torch import Tensor, nn

import amct_ext
from amct_ext import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def detached(sample: tuple[object, ...]) -> list[object]:
    return [a.detach() if isinstance(a, Tensor) else [w.detach() for w in a] if _tensors(a) else a for a in sample]


def _tensors(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


def test_the_kernels_are_there() -> None:
    assert amct_ext.build_info()["cuda"]
    for name in WITH_CUDA_KERNEL:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"amct_ext::{name}", "CUDA"), name


@pytest.mark.parametrize("op", WITH_CUDA_KERNEL)
def test_no_op_syncs_with_the_host(op: str) -> None:
    for sample in arguments(op, torch.device("cuda")):
        with no_host_sync():
            getattr(torch.ops.amct_ext, op).default(*detached(sample))


@pytest.mark.parametrize("op", WITH_CUDA_KERNEL)
def test_every_op_can_be_captured(op: str) -> None:
    """A captured op gives, when replayed, what it gives at once."""
    call = getattr(torch.ops.amct_ext, op).default
    for sample in arguments(op, torch.device("cuda")):
        given = detached(sample)
        # Ops that update in place count again on every run: each run starts from the same state.
        state = [(a, a.clone()) for a in given if isinstance(a, Tensor)]

        def restore(state: list[tuple[Tensor, Tensor]] = state) -> None:
            for tensor, value in state:
                tensor.copy_(value)

        expected = _flat(call(*given)) + [t.clone() for t, _ in state]
        restore()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(*given)
        restore()
        graph.replay()
        actual = _flat(captured) + [t for t, _ in state]
        assert all(same_bits(a, b) for a, b in zip(expected, actual, strict=True)), op


def _flat(results: object) -> list[Tensor]:
    if results is None:
        return []
    if isinstance(results, Tensor):
        return [results]
    return [t for r in results for t in _flat(r)]


def test_another_stream_is_followed() -> None:
    x = torch.randn(1 << 22, device="cuda")
    clips = [torch.tensor(v, device="cuda") for v in (1.5, -1.2, math.nan, math.nan)]
    expected = ops.ulq_fake_quantize(x * 2, *clips)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y = ops.ulq_fake_quantize(x * 2, *clips)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


def test_the_same_bits_every_time() -> None:
    x, g = torch.randn(3_000_001, device="cuda"), torch.randn(3_000_001, device="cuda")
    clips = [torch.tensor(v, device="cuda") for v in (1.5, -1.2)]
    first = ops.ulq_fake_quantize_backward(g, x, *clips)
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(first, ops.ulq_fake_quantize_backward(g, x, *clips), strict=True))


def test_a_value_on_the_cpu_is_refused() -> None:
    x = torch.zeros(3, device="cuda")
    with pytest.raises(ValueError, match="clip_max must be on the device of x, cuda:0, not on cpu"):
        ops.ulq_fake_quantize(x, *(torch.tensor(v) for v in (1.0, -1.0, math.nan, math.nan)))


def compressed(tmp_path: Path, name: str) -> tuple[nn.Module, Tensor]:
    config = tmp_path / "compress.cfg"
    config.write_text(small.CONFIGS[name])
    x = small.SAMPLE.to("cuda")
    model = amct_ext.create_compressed_retrain_model(
        small.build().to("cuda"), (x,), str(config), str(tmp_path / "record.txt")
    )
    return model.to("cuda").train(), x


def train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    return step


STEPS = ("quant", "learned", "sparse_refreshed", "sparse_quant")


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_has_no_host_sync(name: str, tmp_path: Path) -> None:
    model, x = compressed(tmp_path, name)
    step = train_step(model, x, torch.optim.SGD(model.parameters(), lr=0.01))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with no_host_sync():
        step()


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_can_be_captured(name: str, tmp_path: Path) -> None:
    model, x = compressed(tmp_path, name)
    step = train_step(model, x, torch.optim.SGD(model.parameters(), lr=0.01))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = [p.detach().clone() for p in model.parameters()]
    graph.replay()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
