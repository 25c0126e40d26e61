"""The NPU adapter on the stand-in device, with vendor operators written after the vendor's documentation.

Whether the vendor's own kernels match that documentation only an NPU can show: `docs/npu.md` says how.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs.device_job import CPU, DEVICE, EXACT, Job, host_syncs_in_training, run
from support.ops.samples import DTYPES, inputs, layout, same_bits
from support.processes import standin

from amct_ext import backends, ops

HERE = Path(__file__).resolve().parent
CLIPS = ((1.7, -0.9), (0.0, -1.0), (2.0, 0.0), (30.0, -20.0), (1e-9, 0.0))

if not EXACT:
    pytest.skip("runs on the stand-in device only", allow_module_level=True)


@pytest.fixture(scope="session", autouse=True)
def adapter() -> None:
    """csrc/npu compiled with a stand-in for the vendor's header."""
    csrc = HERE.parents[1] / "csrc"
    # The vendor's own header includes all of ATen, the stand-in for it single headers.
    options = ("-DAT_PER_OPERATOR_HEADERS", f"-I{csrc}", f"-I{HERE.parent / 'native' / 'vendor'}")
    library = standin.library(csrc / "npu" / "activation_ulq.cpp", *options)
    torch.ops.load_library(str(library))


@pytest.fixture
def vendor_calls() -> Callable[[], int]:
    """How often the vendor's operator ran since the test began."""
    before = torch.ops.standin_vendor.calls()
    return lambda: torch.ops.standin_vendor.calls() - before


def test_it_registers_its_family() -> None:
    assert backends.kernels(standin.NAME) == ("ulq_fake_quantize", "ulq_fake_quantize_backward")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_bits", [4, 8, 16])
def test_forward_has_the_bits_of_the_reference(
    dtype: torch.dtype, num_bits: int, vendor_calls: Callable[[], int]
) -> None:
    for i, x in enumerate(inputs(dtype, CPU)):
        clips = [torch.tensor(v) for v in (*CLIPS[i % len(CLIPS)], math.nan, math.nan)]
        expected = backends.reference("ulq_fake_quantize")(x, *clips, num_bits, i % 2 == 1)
        actual = ops.ulq_fake_quantize(x.to(DEVICE), *[c.to(DEVICE) for c in clips], num_bits, i % 2 == 1)
        for a, b in zip(actual, expected, strict=True):
            assert same_bits(a.cpu(), b), (x.shape, x.stride())
        assert layout(actual[0]) == layout(expected[0])
    assert (vendor_calls() > 0) == (num_bits == 8 and dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_is_that_of_the_reference(dtype: torch.dtype) -> None:
    for i, x in enumerate(inputs(dtype, CPU)):
        grad, clips = torch.randn_like(x), [torch.tensor(v) for v in CLIPS[i % len(CLIPS)]]
        expected = backends.reference("ulq_fake_quantize_backward")(grad, x, *clips, 8)
        actual = [r.cpu() for r in ops.ulq_fake_quantize_backward(*(t.to(DEVICE) for t in (grad, x, *clips)))]
        assert same_bits(actual[0], expected[0])
        # Sums in float32 of terms of this size; the reference sums in float64.
        slack = 1e-6 * (1 + float(grad.double().abs().sum()))
        for a, b in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=slack)


def test_a_model_trains_with_it_without_host_syncs(tmp_path: Path, vendor_calls: Callable[[], int]) -> None:
    expected = run(Job(tmp_path / "cpu", "sparse_quant", CPU))[1]
    losses = run(Job(tmp_path / "device", "sparse_quant", DEVICE))[1]
    assert vendor_calls() > 0
    assert host_syncs_in_training(Job(tmp_path / "syncs", "sparse_quant", DEVICE)) == []
    torch.testing.assert_close([loss.cpu() for loss in losses], expected, rtol=1e-4, atol=1e-5)
