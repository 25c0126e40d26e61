"""What every op owes to the rest of torch: schema, fake tensors, torch.compile, documentation that runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import amct_ext
from amct_ext import backends, ops
from amct_ext.ops import calibration_histogram as histogram

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FAMILIES = ("activation", "calibration", "integer", "sparsity", "weight")
MODULES = sorted(name for _, name, _ in pkgutil.iter_modules(ops.__path__) if name.startswith(FAMILIES))


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


def filled(op: str, sample: tuple[object, ...]) -> list[object]:
    """A call with every argument, defaults included."""
    schema = getattr(torch.ops.amct_ext, op).default._schema
    return [*sample, *(argument.default_value for argument in schema.arguments[len(sample) :])]


def rearranged(sample: Any, layout: str) -> Any:
    """The same call with tensors in another memory layout."""

    def change(x: Tensor) -> Tensor:
        if layout == "channels last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "transposed" and x.dim() > 1 and x.is_floating_point():
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "with holes" and x.dim() > 1 and x.is_floating_point():
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        if layout == "expanded" and x.dim() == 4 and x.is_floating_point():
            return x[:1].expand_as(x)
        return x

    return tree_map_only(Tensor, change, sample)


@pytest.mark.parametrize("layout", ["as they are", "channels last", "transposed", "with holes", "expanded"])
@pytest.mark.parametrize("op", ops.__all__)
def test_shape_rules_have_the_strides_of_kernels(op: str, layout: str, device: torch.device) -> None:
    """Shapes, strides, types, of the kernels, for tensors without values; the references are not asked."""
    for given in arguments(op, device):
        sample = tree_map_only(Tensor, Tensor.detach, rearranged(given, layout))
        call = getattr(torch.ops.amct_ext, op).default
        assert torch._library.simple_registry.singleton.find(f"amct_ext::{op}").fake_impl.kernel is not None
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = call(*tree_map_only(Tensor, mode.from_tensor, sample))
        real = call(*sample)
        facts = [
            [(x.shape, x.stride(), x.dtype, x.device) for x in tree_leaves(result) if isinstance(x, Tensor)]
            for result in (fake, real)
        ]
        assert facts[0] == facts[1]


@pytest.mark.parametrize("op", ops.__all__)
def test_references_read_nothing_on_the_host(op: str) -> None:
    """Tensors without values go through: any read would raise."""
    for sample in arguments(op, torch.device("cpu")):
        backends.reference(op)(*filled(op, tree_map_only(Tensor, lambda x: x.detach().to("meta"), sample)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, one: ops.ulq_fake_quantize(w.int(), one, one, one, one), TypeError, "x must be float32"),
        (lambda w, one: ops.ulq_fake_quantize(w, one, one, one, one, 1), ValueError, "num_bits"),
        (lambda w, one: ops.ulq_fake_quantize_backward(w[0], w, one, one), ValueError, "shape of x"),
        (lambda w, one: ops.arq_fake_quantize(w, 8, 4), IndexError, "channel_axis"),
        (lambda w, one: ops.lsq_fake_quantize(w, w, 8, 0), ValueError, "scale must hold 6"),
        (lambda w, one: ops.lsq_fake_quantize_backward(w[0], w, one), ValueError, "shape of w"),
        (lambda w, one: ops.apply_mask(w, w), TypeError, "mask must be [bB]ool"),
        (lambda w, one: ops.apply_mask(w, w[0] > 0), ValueError, "shape of w"),
        (lambda w, one: ops.arq_fake_quantize_many([w], 8, [0, 0]), ValueError, "one axis"),
        (lambda w, one: ops.mask_2to4(w, 7), IndexError, "axis"),
        (lambda w, one: ops.search_clip_range(w[:0]), ValueError, "at least one value"),
        (lambda w, one: ops.unpack_mask(w.long().view(-1), (3,)), ValueError, "takes 1 words"),
        (lambda w, one: ops.shift_error_(w, one, w), TypeError, "errors must be (float64|Double)"),
        (lambda w, one: ops.pack_weight(w[0, 0, 0], one), ValueError, "two dimensions"),
    ],
)
def test_shape_rules_raise_what_kernels_raise(call: Any, error: type[Exception], words: str) -> None:
    w, one = torch.randn(6, 8, 3, 3), torch.ones(())
    for each in ((w, one), (w.to("meta"), one.to("meta"))):
        with pytest.raises(error, match=words):
            call(*each)


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
