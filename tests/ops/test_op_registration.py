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
from support.ops.arguments import arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import amct_ext
from amct_ext import backends, ops

UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FAMILIES = ("activation", "calibration", "integer", "sparsity", "weight")
MODULES = sorted(name for _, name, _ in pkgutil.iter_modules(ops.__path__) if name.startswith(FAMILIES))


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
    assert info["integer_product"] in info["integer_product_levels"]
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["cuda"] in (True, False)
