"""What every op owes to the rest of torch: schema, fake tensors, torch.compile, documentation that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math

import pytest
import torch
from torch import Tensor

import amct_ext
from amct_ext import ops
from amct_ext.ops import histogram

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
MODULES = (
    "accumulators",
    "codes",
    "histogram",
    "integer",
    "masks",
    "norms",
    "search",
    "shift",
    "sparse",
    "ulq",
    "weights",
)


def arguments(op: str, device: torch.device) -> list[tuple[object, ...]]:
    """Sample calls of an op, with gradients asked for where it has them."""
    w = torch.randn(6, 8, 3, 3, device=device)
    grad = torch.randn_like(w)
    scales = torch.full((6,), 0.01, device=device)
    high, low, none = (torch.tensor(v, device=device) for v in (1.5, -1.2, math.nan))
    mask = w > 0
    errors = torch.zeros(8, 16, dtype=torch.float64, device=device)
    gathered = torch.zeros(histogram.BINS, 2, dtype=torch.int64, device=device), torch.zeros(2, 5, device=device)
    ops.range_histogram_(w, *gathered)

    codes, pixels = (torch.randint(0, 256, n, device=device, dtype=torch.uint8) for n in ((5, 8), (2, 8, 6, 5)))
    scale, offset = (torch.tensor(v, device=device) for v in (0.02, -7.0))
    plain, addend = ((1, 1), (1, 1), (1, 1)), torch.ones(2, 6, 6, 5, device=device)
    matrix, filters = ops.pack_weight(w[:, :, 0, 0], scales), ops.pack_weight(w, scales)

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    def state() -> tuple[Tensor, ...]:
        return none.clone(), none.clone(), torch.tensor(False, device=device)

    return {
        "ulq_fake_quantize": [
            (leaf(w), leaf(high), leaf(low), none, none),
            (leaf(w), leaf(high), leaf(low), none, none, 4, True),
            (leaf(w[:, ::2]), high, low, none, none),
            (leaf(w.bfloat16()), leaf(high), leaf(low), none, none),
        ],
        "ulq_fake_quantize_": [
            (leaf(w), leaf(high), leaf(low), none.clone(), none.clone(), *state()),
            (leaf(w.half()), high.clone(), low.clone(), none.clone(), none.clone(), *state(), 4, True),
        ],
        "ulq_fake_quantize_backward": [
            (grad, w, high, low),
            (grad, w, high, low, 4),
            (grad, w.bfloat16(), high, low),
            (grad.half(), w, high, low),
            (grad.double(), w, high, low),
        ],
        "ulq_quantize": [(w, high, low, none, none), (w[0, 0], high, low, none, none, 4, True)],
        "pack_weight": [(w, scales), (w[:, :, 0, 0], scales[:1], 4)],
        "integer_conv2d": [
            (pixels, scale, offset, *filters, scales, None, (3, 3)),
            (pixels, scale, offset, *filters, scales, scales, (3, 3), (2, 1), (1, 1), (1, 2), True),
            (pixels, scale, offset, *filters, scales, None, (3, 3), *plain, True, addend, 0.0, 6.0),
        ],
        "integer_conv2d_codes": [
            (pixels, scale, offset, *filters, scales, None, (3, 3), *plain, 0.0, None, high, low, none, none),
        ],
        "integer_linear": [(codes, scale, offset, *matrix, scales), (codes, scale, offset, *matrix, scales, scales)],
        "integer_conv2d_accumulators": [
            (pixels, offset, *filters, (3, 3)),
            (pixels, offset, *filters, (3, 3), (2, 1), (1, 1), (1, 2)),
        ],
        "integer_linear_accumulators": [(codes, offset, *matrix)],
        "search_clip_range": [(w,), (w, 4, True)],
        "range_histogram_": [(w, *gathered), (w.half(), *gathered)],
        "search_clip_range_histogram": [gathered, (*gathered, 4)],
        "arq_fake_quantize": [(leaf(w),), (leaf(w), 8, 0), (leaf(w), 4, 1)],
        "lsq_fake_quantize": [(leaf(w), leaf(scales), 8, 0), (leaf(w), leaf(scales[:1]), 8, None, 0.5)],
        "lsq_fake_quantize_backward": [(grad, w, scales, 8, 0), (grad, w.half(), scales[:1], 8, None, 0.5)],
        "quantize_weight": [(w, scales, 8, 0), (w, scales[:1], 4)],
        "arq_fake_quantize_many": [([leaf(w), leaf(w[0])], 8, [0, -1])],
        "apply_mask": [(leaf(w), mask)],
        "sparsify_2to4": [(leaf(w),)],
        "sparse_arq_fake_quantize": [(leaf(w), mask, 8, 0), (leaf(w), mask)],
        "sparse_arq_fake_quantize_2to4": [(leaf(w), 1, 8, 0), (leaf(w), 0, 4)],
        "mask_2to4": [(w,), (w, 0)],
        "refresh_mask_": [(w, mask.clone(), torch.tensor(s, device=device), 2) for s in (0, 1)],
        "pack_mask": [(mask,)],
        "unpack_mask": [(ops.pack_mask(mask), list(mask.shape))],
        "filter_norms": [(w,), (w, 1)],
        "shift_error_": [(w, scales[:1], errors.clone()), (w, scales, errors[:6].clone(), 0)],
        "best_shift": [(errors,)],
    }[op]


@pytest.mark.parametrize("op", ops.__all__)
def test_opcheck(op: str, device: torch.device) -> None:
    overload = getattr(torch.ops.amct_ext, op).default
    checks = [  # torch checks the autograd registration of the devices that it knows by name only
        check for check in UTILS if check != "test_autograd_registration" or device.type in ("cpu", "cuda", "xpu")
    ]
    for sample in arguments(op, device):
        torch.library.opcheck(overload, sample, test_utils=checks)


def test_every_registered_op_has_a_function() -> None:
    registered = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("amct_ext::")}
    assert registered == set(ops.__all__)


def _has_inductor(device: torch.device) -> bool:
    from torch._inductor.codegen import common

    common.init_backend_registration()
    return common.get_scheduling_for_device(device.type) is not None


def step(x: Tensor, w: Tensor, scale: Tensor, high: Tensor, low: Tensor) -> Tensor:
    none = torch.full((), math.nan, device=x.device)
    y = ops.ulq_fake_quantize(x, high, low, none, none)[0]
    weight = ops.arq_fake_quantize(w, 8, 0)[0] + ops.lsq_fake_quantize(w, scale, 8, 0)
    return torch.nn.functional.conv2d(y, weight * ops.mask_2to4(w.detach())).square().mean()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    torch.compiler.reset()
    if backend == "inductor" and not _has_inductor(device):
        pytest.skip(f"Inductor generates no code for {device.type}")
    values = [torch.randn(s, device=device) for s in ((2, 8, 6, 6), (6, 8, 3, 3))]
    values += [torch.full(s, v, device=device) for s, v in (((6,), 0.01), ((), 1.5), ((), -1.2))]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        leaves = [v.clone().requires_grad_() for v in values]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_the_snippets_of_the_documentation_run(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"amct_ext.ops.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", ops.__all__)
def test_every_function_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(ops, name)) or ""
    assert all(part in text for part in ("Source:", "Errors:", ">>>")), name


def test_build_info() -> None:
    info = amct_ext.build_info()
    assert info["simd"] in info["simd_levels"]
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cuda"] in (True, False)
