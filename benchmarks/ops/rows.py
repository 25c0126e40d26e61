"""The rows of the op table: what to time for each op, its rivals and its floor (one torch call moving the bytes)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import config as compiler

from amct_ext import ops
from benchmarks.timing import (
    ACTIVATIONS,
    DTYPES,
    WEIGHTS,
    Call,
    clips,
    eager_arq,
    eager_lsq,
    eager_lsq_backward,
    eager_mask,
    eager_search,
    eager_ulq,
    eager_ulq_backward,
    written_out_mask,
    written_out_ulq,
)

# A function is compiled anew for every dtype, shape and number of threads; past the limit it would run eagerly.
compiler.recompile_limit = 64


@dataclass
class Row:
    """One op on one input. `limit` is the ratio to the floor that we mean to keep; `fresh` is the floor with a result
    that is allocated, as that of an op is."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Call
    floor: Call
    floor_name: str
    limit: float | None = None
    eager: Call | None = None
    torch_op: Call | None = None
    inductor: Call | None = None
    fresh: Call | None = None
    keep: list[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


def cache_bytes() -> int:
    """What the last level of the cache holds; 32 MiB where the system does not say."""
    said = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(said.read_text().strip().removesuffix("K")) << 10 if said.exists() else 32 << 20


def _compiled(function: object, *arguments: object) -> Call:
    compiled = torch.compile(function, dynamic=False)  # type: ignore[call-overload]
    return lambda: compiled(*arguments)


def activation_rows(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = ACTIVATIONS) -> Iterator[Row]:
    for index, shape in enumerate(shapes):
        x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        out = torch.empty_like(x)
        high, low, none = clips()
        first = index == 0
        single = dtype == torch.float32
        near = (high.to(dtype), low.to(dtype))
        scale, zero = torch.tensor([3.5 / 255]), torch.tensor([0.0])
        leaf = x.clone().requires_grad_()
        yield Row(
            "ulq forward",
            shape,
            dtype,
            partial(ops.ulq_fake_quantize, x, high, low, none, none),
            partial(out.copy_, x),
            "copy_",
            1.10 if single else None,
            partial(eager_ulq, x, *near),
            (partial(torch._fake_quantize_learnable_per_tensor_affine, x, scale, zero, -128, 127, 1.0))
            if single
            else None,
            _compiled(written_out_ulq, x, *near) if first else None,
            partial(torch.clone, x),
        )
        yield Row(
            "ulq backward",
            shape,
            dtype,
            partial(ops.ulq_fake_quantize_backward, g, x, high, low),
            partial(torch.add, x, g, out=out),
            "add(out=)",
            1.30 if single else None,
            partial(eager_ulq_backward, g, x, *near),
            _learnable_backward(leaf, g) if single else None,
            _compiled(eager_ulq_backward, g, x, *near) if first else None,
        )


def eager_sparsify(w: Tensor) -> Tensor:
    return w * eager_mask(w)


def written_out_sparsify(w: Tensor) -> Tensor:
    return w * written_out_mask(w)


def eager_sparse_arq(w: Tensor) -> tuple[Tensor, Tensor]:
    return eager_arq(w * eager_mask(w))


def written_out_sparse_arq(w: Tensor) -> tuple[Tensor, Tensor]:
    return eager_arq(w * written_out_mask(w))


def eager_masked_arq(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return eager_arq(w * mask)


def _learnable_backward(leaf: Tensor, g: Tensor) -> Call:
    scale = torch.tensor([3.5 / 255], requires_grad=True)
    zero = torch.tensor([0.0], requires_grad=True)
    y = torch._fake_quantize_learnable_per_tensor_affine(leaf, scale, zero, -128, 127, 1.0)
    return lambda: torch.autograd.grad(y, (leaf, scale, zero), g, retain_graph=True)


def weight_rows(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = WEIGHTS) -> Iterator[Row]:
    for shape in shapes:
        w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        out = torch.empty_like(w)
        scale = torch.full(shape[:1], 0.03)
        near = scale.to(dtype)
        zero = torch.zeros(shape[0], dtype=torch.int32)
        single = dtype == torch.float32

        def copy(w: Tensor = w, out: Tensor = out) -> object:
            return out.copy_(w)

        def row(op: str, ours: Call, limit: float | None, eager: Call, inductor: Call | None, *rest: Call) -> Row:
            return Row(
                op,
                shape,  # noqa: B023 - called at once
                dtype,
                ours,
                copy if not op.endswith("backward") else partial(torch.add, w, g, out=out),  # noqa: B023
                "add(out=)" if op.endswith("backward") else "copy_",
                limit if single else None,  # noqa: B023
                eager,
                rest[0] if rest and single else None,  # noqa: B023
                inductor,
                partial(torch.clone, w) if not op.endswith("backward") else None,  # noqa: B023
            )

        yield row(
            "arq",
            partial(ops.arq_fake_quantize, w, 8, 0),
            1.0 if w.nbytes + out.nbytes < cache_bytes() else 1.15,
            partial(eager_arq, w),
            _compiled(eager_arq, w),
            partial(torch.fake_quantize_per_channel_affine, w, scale, zero, 0, -128, 127),
        )
        yield row(
            "lsq forward",
            partial(ops.lsq_fake_quantize, w, scale, 8, 0),
            1.10,
            partial(eager_lsq, w, near),
            _compiled(eager_lsq, w, near),
        )
        yield row(
            "lsq backward",
            partial(ops.lsq_fake_quantize_backward, g, w, scale, 8, 0),
            1.30,
            partial(eager_lsq_backward, g, w, near),
            _compiled(eager_lsq_backward, g, w, near),
        )
        if not single:
            continue
        yield row(
            "2:4 mask and apply",
            partial(ops.sparsify_2to4, w),
            1.3,
            partial(eager_sparsify, w),
            _compiled(written_out_sparsify, w),
        )
        yield row(
            "2:4 and arq",
            partial(ops.sparse_arq_fake_quantize_2to4, w, 1, 8, 0),
            1.5,
            partial(eager_sparse_arq, w),
            _compiled(written_out_sparse_arq, w),
        )
        mask = ops.mask_2to4(w)
        yield row(
            "masked arq",
            partial(ops.sparse_arq_fake_quantize, w, mask, 8, 0),
            1.5,
            partial(eager_masked_arq, w, mask),
            _compiled(eager_masked_arq, w, mask),
        )


def search_rows(shapes: tuple[tuple[int, ...], ...] = ACTIVATIONS[:1]) -> Iterator[Row]:
    for shape in shapes:
        normal = torch.randn(shape)
        for name, x in {"normal": normal, "relu": normal.relu()}.items():
            out = torch.empty_like(x)
            yield Row(
                f"range search ({name})",
                shape,
                torch.float32,
                partial(ops.search_clip_range, x),
                partial(out.copy_, x),
                "copy_",
                20.0,
                partial(eager_search, x),
            )
        errors, scale = torch.zeros(shape[1], 16, dtype=torch.float64), torch.full((shape[1],), 1e-4)
        yield Row(
            "shift search",
            shape,
            torch.float32,
            partial(ops.shift_error_, normal, scale, errors),
            partial(out.copy_, normal),
            "copy_",
        )


def _shorter(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0] // 2, *shape[1:])


def all_rows(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Row]:
    for dtype in dtypes:
        activations: list[tuple[int, ...]] = list(ACTIVATIONS if dtype == torch.float32 else ACTIVATIONS[:1])
        weights: list[tuple[int, ...]] = list(WEIGHTS if dtype == torch.float32 else WEIGHTS[1:])
        if dtype == torch.float64:
            # As many bytes as float32 has. glibc maps results of more than 32 MiB anew in every call; clearing their
            # pages takes several times the op, while the floor writes to memory that is there.
            activations, weights = [_shorter(s) for s in activations], [_shorter(s) for s in weights]
        yield from activation_rows(dtype, tuple(activations))
        yield from weight_rows(dtype, tuple(weights))
    yield from search_rows()
