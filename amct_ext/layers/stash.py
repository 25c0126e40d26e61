"""No quantised input kept for backward: it is made again, bit for bit, from the input that the clips need anyway.

The gradient of a weight needs the quantised input of its layer. The gradient of the clips needs the input as it was:
the rounding error is part of it. Both are the size of the activation, and the first follows from the second by the
very op of the forward, so only the second is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from amct_ext import ops

Hook = Callable[[Any], Any]


class _Recipe(NamedTuple):
    """How a quantised tensor is made again."""

    clip_max: Tensor
    clip_min: Tensor
    num_bits: int
    layout: tuple[int, ...]  # strides of the quantised tensor
    version: int  # of the float input


class _Part(NamedTuple):
    """What stands in the graph for the quantised tensor or a view of it."""

    x: Any  # the float input, or what the surrounding hook made of it
    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    start: int | torch.SymInt


def stashed(
    num_bits: int, quantised: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor
) -> AbstractContextManager[Any]:
    """A context in which the graph keeps neither ``quantised`` nor views of it; backward gets the same bits.

    ``quantised`` is what `ulq_fake_quantize` itself made of ``x``, and the clips are the effective ones it returned.
    Hooks for saved tensors around the context see ``x`` in its place, and everything else as it is. Does nothing where
    it would save nothing (no gradient, or neither input nor clips with one, so that the graph does not hold ``x``),
    where ``quantised`` was modified in place, and where hooks cannot work: torch.compile plans memory by itself,
    torch.func forbids them, and subclasses of Tensor need not have memory of their own. Errors: RuntimeError in
    backward where ``x`` was modified in place since.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and quantised.requires_grad):
        return nullcontext()
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if type(quantised) is not Tensor or quantised.numel() == 0 or quantised._version or not allowed:
        return nullcontext()
    recipe = _Recipe(clip_max, clip_min, num_bits, quantised.stride(), x._version)
    return _Stash(quantised, x, recipe)


def recompute_fake_quantized(x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int) -> Tensor:
    """What a forward made of ``x``, bit for bit, from the effective clips that it used."""
    # They pass the guards of the op unchanged, and stand for the previous ones too.
    return ops.ulq_fake_quantize(x, clip_max, clip_min, clip_max, clip_min, num_bits)[0]


class _Stash(saved_tensors_hooks):
    def __init__(self, quantised: Tensor, x: Tensor, recipe: _Recipe) -> None:
        super().__init__(self._pack, self._unpack)
        # Data without the history; it shares the version counter.
        self._x: Tensor | None = x.detach()
        # The address, not the tensor; it is unique while the context lasts.
        self._address, self._dtype = quantised.untyped_storage().data_ptr(), quantised.dtype
        self._recipe = recipe
        self._outer: tuple[Hook, Hook] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        # Hooks live as long as the graph, which must not hold more than was packed.
        self._x = None

    def _pack(self, saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != self._address or saved.dtype != self._dtype:
            return saved if self._outer is None else self._outer[0](saved)
        kept = self._x if self._outer is None else self._outer[0](self._x)
        return _Part(kept, self._recipe, saved.size(), saved.stride(), saved.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Part):
            other: Tensor = packed if self._outer is None else self._outer[1](packed)
            return other
        if self._outer is not None:
            return _rebuilt(self._outer[1](packed.x), packed)
        if packed.x._version != packed.recipe.version:
            raise RuntimeError(
                f"the input of a quantised layer, shape {tuple(packed.x.shape)}, was modified by an in-place operation "
                "after the layer's forward; its gradients need it as it was"
            )
        return _rebuilt(packed.x, packed)


@torch.no_grad()
def _rebuilt(x: Tensor, part: _Part) -> Tensor:
    clip_max, clip_min, num_bits, layout, _ = part.recipe
    y = recompute_fake_quantized(x, clip_max, clip_min, num_bits)
    if y.stride() != layout:  # a surrounding hook gave the input back in another layout
        y = torch.empty_strided(y.size(), layout, dtype=y.dtype, device=y.device).copy_(y)
    return y.as_strided(part.size, part.stride, part.start)
