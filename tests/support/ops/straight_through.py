"""The straight-through rules in plain torch, differentiable any number of times: what our autograd rules must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.ops.weight_lsq import default_grad_factor

EPS = torch.finfo(torch.float32).eps


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the derivatives of `value`."""
    return rounded.detach() - (value.detach() - value)


def ulq(x: Tensor, y: Tensor, clip_max: Tensor, clip_min: Tensor, used: tuple[Tensor, Tensor], num_bits: int) -> Tensor:
    """`y` as the op made it of x; the clips that were used have the derivatives of those given."""
    high, low = (
        straight(given.reshape(()), u.reshape(())) for given, u in zip((clip_max, clip_min), used, strict=True)
    )
    half = 2 ** (num_bits - 1)
    scale = (high - low) / (2 * half - 1)
    offset = torch.round(-half - low / scale).detach()
    above, below = (x > scale * (half - 1 - offset)).detach(), (x < scale * (-half - offset)).detach()
    z = torch.where(above, high, torch.where(below, low, x)) / scale
    return straight(straight(z, torch.round(z)) * scale, y)


def lsq(w: Tensor, y: Tensor, scale: Tensor, num_bits: int, axis: int | None, factor: float | None) -> Tensor:
    if factor is None:
        factor = default_grad_factor(w.numel() // scale.numel(), num_bits)
    scale = scale.clamp_min(EPS)
    if axis is not None:
        scale = scale.reshape([-1 if i == axis % w.dim() else 1 for i in range(w.dim())])
    scale = straight(scale * factor, scale)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    outside = ((w < low * scale) | (w > high * scale)).detach()  # a scale's own extreme lies on the edge
    z = w / scale
    cut = z.detach().clamp(low, high) * scale + (w - w.detach())
    return straight(torch.where(outside, cut, straight(z, torch.round(z)) * scale), y)


def masked(w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return straight(torch.where(mask, w, torch.zeros_like(w)), y)


class PlainOps:
    """Stands for `amct_ext.ops`: values of the ops, derivatives of the rules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def ulq_fake_quantize(self, x: Tensor, high: Tensor, low: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            y, *others = ops.ulq_fake_quantize(x, high, low, *rest)
        return ulq(x, y, high, low, (others[2], others[3]), rest[2] if len(rest) > 2 else 8), *others

    def ulq_fake_quantize_(self, x: Tensor, high: Tensor, low: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            y, *used = ops.ulq_fake_quantize_(x, high, low, *rest)
        return ulq(x, y, high, low, (used[0], used[1]), rest[5] if len(rest) > 5 else 8), *used

    def arq_fake_quantize(self, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, scale = ops.arq_fake_quantize(w.detach(), *rest)
        return straight(w, y), scale

    def lsq_fake_quantize(
        self, w: Tensor, scale: Tensor, num_bits: int = 8, axis: int | None = None, factor: float | None = None
    ) -> Tensor:
        y = ops.lsq_fake_quantize(w.detach(), scale.detach(), num_bits, axis, factor)
        return lsq(w, y, scale, num_bits, axis, factor)

    def apply_mask(self, w: Tensor, mask: Tensor) -> Tensor:
        return masked(w, ops.apply_mask(w.detach(), mask), mask)

    def sparsify_2to4(self, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, mask = ops.sparsify_2to4(w.detach(), *rest)
        return masked(w, y, mask), mask

    def sparse_arq_fake_quantize(self, w: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        y, scale = ops.sparse_arq_fake_quantize(w.detach(), mask, *rest)
        return masked(w, y, mask), scale

    def apply_mask_sr_ste(self, w: Tensor, mask: Tensor, decay: float) -> Tensor:
        assert decay == 0
        return straight(w, ops.apply_mask(w.detach(), mask))

    def sparse_arq_fake_quantize_sr_ste(self, w: Tensor, mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        assert rest[-1] == 0
        y, scale = ops.sparse_arq_fake_quantize(w.detach(), mask, *rest[:-1])
        return straight(w, y), scale

    def sparse_arq_fake_quantize_2to4(self, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, scale, mask = ops.sparse_arq_fake_quantize_2to4(w.detach(), *rest)
        return masked(w, y, mask), scale, mask

    def arq_fake_quantize_many(self, weights: list[Tensor], *rest: Any) -> tuple[list[Tensor], list[Tensor]]:
        ys, scales = ops.arq_fake_quantize_many([w.detach() for w in weights], *rest)
        return [straight(w, y) for w, y in zip(weights, ys, strict=True)], scales
