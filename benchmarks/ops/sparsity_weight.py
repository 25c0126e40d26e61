"""Rows of 2:4 sparsity: masks made and applied, alone and with the range of what is kept."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from amct_ext import ops
from benchmarks.ops import weight_arq
from benchmarks.ops.row import WEIGHTS, Calls, Row, Shape, compiled, copy


def eager_mask(w: Tensor) -> Tensor:
    groups = w.abs().movedim(1, -1).unflatten(-1, (-1, 4))
    drop = groups.topk(2, largest=False).indices
    return torch.ones_like(groups).scatter_(-1, drop, 0).flatten(-2).movedim(-1, 1)


def written_out_mask(w: Tensor) -> Tensor:
    """The selection by comparisons: what a compiler can fuse (topk is not)."""
    a, b, c, d = w.abs().movedim(1, -1).unflatten(-1, (-1, 4)).unbind(-1)
    keep = torch.stack(
        [
            (b > a).int() + (c > a) + (d > a) < 2,
            (a >= b).int() + (c > b) + (d > b) < 2,
            (a >= c).int() + (b >= c) + (d > c) < 2,
            (a >= d).int() + (b >= d) + (c >= d) < 2,
        ],
        -1,
    )
    return keep.flatten(-2).movedim(-1, 1).to(w.dtype)


def eager_sparsify(w: Tensor) -> Tensor:
    return w * eager_mask(w)


def written_out_sparsify(w: Tensor) -> Tensor:
    return w * written_out_mask(w)


def eager_sparse_arq(w: Tensor) -> tuple[Tensor, Tensor]:
    return weight_arq.eager(eager_sparsify(w))


def written_out_sparse_arq(w: Tensor) -> tuple[Tensor, Tensor]:
    return weight_arq.eager(written_out_sparsify(w))


def eager_masked_arq(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return weight_arq.eager(w * mask)


def _sparsify(shape: Shape, dtype: torch.dtype) -> Calls:
    w = torch.randn(shape).to(dtype)
    return Calls(
        ours=partial(ops.sparsify_2to4, w),
        floor=copy(w),
        limit=1.3,
        eager=partial(eager_sparsify, w),
        inductor=compiled(written_out_sparsify, w),
        fresh=partial(torch.clone, w),
    )


def _sparse_arq(shape: Shape, dtype: torch.dtype) -> Calls:
    w = torch.randn(shape).to(dtype)
    return Calls(
        ours=partial(ops.sparse_arq_fake_quantize_2to4, w, 1, 8, 0),
        floor=copy(w),
        limit=1.5,
        eager=partial(eager_sparse_arq, w),
        inductor=compiled(written_out_sparse_arq, w),
        fresh=partial(torch.clone, w),
    )


def _masked_arq(shape: Shape, dtype: torch.dtype) -> Calls:
    w = torch.randn(shape).to(dtype)
    mask = ops.mask_2to4(w)
    return Calls(
        ours=partial(ops.sparse_arq_fake_quantize, w, mask, 8, 0),
        floor=copy(w),
        limit=1.5,
        eager=partial(eager_masked_arq, w, mask),
        inductor=compiled(eager_masked_arq, w, mask),
        fresh=partial(torch.clone, w),
    )


_BUILDERS = {"2:4 mask and apply": _sparsify, "2:4 and arq": _sparse_arq, "masked arq": _masked_arq}
ROWS = [Row(op, shape, torch.float32, build) for op, build in _BUILDERS.items() for shape in WEIGHTS]
