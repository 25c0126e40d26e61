"""Deferred results of integer convolutions, so that the ops behind a convolution run in its pass.

In an evaluation BatchNorm, an activation function, a residual addition and the quantisation for the next layer each
read and write a whole activation, which takes about as long as the integer convolution itself. A `DeferredTensor` has
no memory; it holds the arguments that compute its values. An op that can be fused gives another `DeferredTensor`, a
quantising layer takes codes, and every other reader gets floats that are computed on the spot. So any use is right;
only a second use computes twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_any, tree_map_only

from amct_ext.layers.deferred_conv import DeferredConv2d

_aten = torch.ops.aten
_CPU = torch.device("cpu")
_T = TypeVar("_T")


class DeferredTensor(Tensor):
    """A tensor whose values are those of ``source``, computed on the first read (module docstring)."""

    source: DeferredConv2d | None  # None once the values are there
    value: Tensor

    @staticmethod
    def __new__(cls, source: DeferredConv2d, shape: torch.Size) -> Self:
        _, channels, height, width = shape
        strides = (channels * height * width, height * width, width, 1)
        if source.channels_last:
            strides = (channels * height * width, 1, width * channels, channels)
        new: Self = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=torch.float32, device=_CPU)
        new.source = source
        return new

    # Autograd has no part in this: nothing is deferred where gradients are recorded.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        fold = None if torch.is_grad_enabled() else _FOLDS.get(func)
        result = NotImplemented if fold is None else fold(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **(kwargs or {}))  # changes the sizes and strides that the wrapper reports
        return func(*materialize(args), **materialize(kwargs or {}))

    def materialize(self) -> Tensor:
        """The plain tensor of the values."""
        if self.source is not None:
            self.value, self.source = self.source.compute(), None
        return self.value

    # Reads of memory that do not go through the dispatcher.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.materialize().tolist()

    def data_ptr(self) -> int:
        return self.materialize().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.materialize().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.materialize(), memo)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduce: Callable[[SupportsIndex], Any] = self.materialize().__reduce_ex__
        return reduce(protocol)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        represent: Callable[..., str] = self.materialize().__repr__
        return represent(*args, **kwargs)


def materialize(value: _T) -> _T:
    """``value`` with every deferred tensor computed, in all containers that torch's pytrees know."""
    if type(value) is Tensor or not tree_any(lambda leaf: type(leaf) is DeferredTensor, value):
        return value
    computed: _T = tree_map_only(DeferredTensor, DeferredTensor.materialize, value)
    return computed


# -- ops that are folded into a deferred convolution; NotImplemented where one cannot be


def _source_of(x: object) -> DeferredConv2d | None:
    return x.source if type(x) is DeferredTensor else None


def _batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    source = _source_of(x)
    if source is None or not source.unclamped or training or mean is None or variance is None:
        return NotImplemented
    if any(type(t) is DeferredTensor for t in (gamma, beta, mean, variance)):
        return NotImplemented
    none = torch.empty(0)
    return DeferredTensor(source.with_batch_norm(gamma, beta, mean, variance, eps), x.shape), none, none.clone()


def _clamp(in_place: bool, clamp_min: float = 0.0, clamp_max: float | None = None) -> Callable[..., Any]:
    def fold(x: Tensor, low: float = clamp_min, high: float | None = clamp_max) -> Any:
        source = _source_of(x)
        # A second upper bound would have to be applied after the first one; low > high is an error that the op raises.
        if source is None or source.clamp_max is not None or (high is not None and low > high):
            return NotImplemented
        clamped = source.clamped(low, high)
        if in_place and isinstance(x, DeferredTensor):
            x.source = clamped
            return x
        return DeferredTensor(clamped, x.shape)

    return fold


def _add(in_place: bool) -> Callable[..., Any]:
    def fold(x: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
        if not in_place and _source_of(x) is None:
            x, other = other, x
        source = _source_of(x)
        if source is None or not source.unclamped or alpha != 1 or other is x:
            return NotImplemented
        if type(other) not in (Tensor, DeferredTensor):
            return NotImplemented
        addend = materialize(other)
        if addend.shape != x.shape or addend.dtype != torch.float32 or addend.stride() != x.stride():
            return NotImplemented
        # Computed at once, for the model may modify the addend next.
        y = source.compute(addend)
        if in_place and isinstance(x, DeferredTensor):
            x.value, x.source = y, None
            return x
        return y

    return fold


def _max_pool(x: Tensor, *window: Any) -> Any:
    source = _source_of(x)
    if source is None or source.channels_last:
        return NotImplemented
    # Torch's max pooling is many times slower on contiguous planes. Pooling channels last and copying the smaller
    # result costs less.
    results = _aten.max_pool2d_with_indices.default(replace(source, channels_last=True).compute(), *window)
    return tuple(t.contiguous() for t in results)


_FOLDS: dict[torch._ops.OpOverload[..., Any], Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.relu.default: _clamp(False),
    _aten.relu_.default: _clamp(True),
    _aten.hardtanh.default: _clamp(False, -1.0, 1.0),
    _aten.hardtanh_.default: _clamp(True, -1.0, 1.0),
    _aten.add.Tensor: _add(False),
    _aten.add_.Tensor: _add(True),
    _aten.max_pool2d_with_indices.default: _max_pool,
}
