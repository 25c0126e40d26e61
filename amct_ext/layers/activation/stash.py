"""The quantised input of a layer is not saved for backward; it is computed again, bit for bit, from the float input.

The gradient of a weight needs the quantised input of its layer. The gradient of the clips needs the float input, for
the rounding error is part of it. Both are as large as the activation, and the op of the forward computes the first from
the second, so only the second is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from amct_ext import ops

Hook = Callable[[Any], Any]  # of saved tensors: packs or unpacks anything


class _Recipe(NamedTuple):
    """How to compute a quantised tensor again."""

    clip_max: Tensor
    clip_min: Tensor
    num_bits: int
    layout: tuple[int, ...]  # strides of the quantised tensor
    version: int  # of the float input


class _SavedView(NamedTuple):
    """What the graph saves in place of the quantised tensor or a view of it."""

    x: Any  # the float input, or what an outer hook packed it into
    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    storage_offset: int | torch.SymInt


def stashed(
    num_bits: int, quantized: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor
) -> AbstractContextManager[Any]:
    """A context in which the graph saves neither ``quantized`` nor views of it; backward gets the same bits.

    ``quantized`` is the result of `ulq_fake_quantize` for ``x``; the clips are the effective ones that it returned.
    Saved-tensor hooks around the context see ``x`` in its place, and everything else as it is.

    Does nothing

    * where there is nothing to gain: no gradients are recorded, or neither input nor clips need one, so that the graph
      does not hold ``x``;
    * where ``quantized`` was modified in place;
    * where hooks cannot work: torch.compile plans memory by itself, torch.func forbids them, and subclasses of Tensor
      need not have memory of their own.

    Errors: RuntimeError in backward where ``x`` was modified in place since.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and quantized.requires_grad):
        return nullcontext()
    allowed = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    if type(quantized) is not Tensor or quantized.numel() == 0 or quantized._version or not allowed:
        return nullcontext()
    recipe = _Recipe(clip_max, clip_min, num_bits, quantized.stride(), x._version)
    return _Stash(quantized, x, recipe)


def recompute_fake_quantized(x: Tensor, clip_max: Tensor, clip_min: Tensor, num_bits: int) -> Tensor:
    """The result of a forward for ``x``, bit for bit, from the effective clips that it used."""
    # Effective clips pass the op's checks unchanged, so they can be given as the previous ones too.
    return ops.ulq_fake_quantize(x, clip_max, clip_min, clip_max, clip_min, num_bits)[0]


class _Stash(saved_tensors_hooks):
    def __init__(self, quantized: Tensor, x: Tensor, recipe: _Recipe) -> None:
        super().__init__(self._pack, self._unpack)
        # Without its autograd history; it shares the version counter.
        self._x: Tensor | None = x.detach()
        # The address, not the tensor, which must not be kept alive; it is unique while the context lasts.
        self._address, self._dtype = quantized.untyped_storage().data_ptr(), quantized.dtype
        self._recipe = recipe
        self._outer: tuple[Hook, Hook] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        # The graph keeps the hooks alive, and with them whatever they refer to.
        self._x = None

    def _pack(self, saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != self._address or saved.dtype != self._dtype:
            return saved if self._outer is None else self._outer[0](saved)
        kept = self._x if self._outer is None else self._outer[0](self._x)
        return _SavedView(kept, self._recipe, saved.size(), saved.stride(), saved.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _SavedView):
            other: Tensor = packed if self._outer is None else self._outer[1](packed)
            return other
        if self._outer is not None:
            return _recomputed(self._outer[1](packed.x), packed)
        if packed.x._version != packed.recipe.version:
            raise RuntimeError(
                f"the input of a quantised layer, shape {tuple(packed.x.shape)}, was modified by an in-place operation "
                "after the layer's forward; its gradients need it as it was"
            )
        return _recomputed(packed.x, packed)


@torch.no_grad()
def _recomputed(x: Tensor, saved: _SavedView) -> Tensor:
    clip_max, clip_min, num_bits, layout, _ = saved.recipe
    y = recompute_fake_quantized(x, clip_max, clip_min, num_bits)
    if y.stride() != layout:  # a surrounding hook gave the input back in another layout
        y = torch.empty_strided(y.size(), layout, dtype=y.dtype, device=y.device).copy_(y)
    return y.as_strided(saved.size, saved.stride, saved.storage_offset)
