"""Deferred results of convolutions, so that the ops behind a convolution run in its pass.

In an evaluation BatchNorm, an activation function, a residual addition and the quantisation for the next layer each
read and write a whole activation, which takes about as long as an integer convolution itself. A `DeferredTensor` has
no memory; it holds the arguments that compute its values, a `DeferredSource`. An op that can be fused gives another
`DeferredTensor`, a quantising layer takes codes, and every other reader gets floats that are computed on the spot. So
any use is right; only a second use computes twice.

Sources are integer convolutions (`DeferredConv2d`), convolutions on packed floats (`PreparedConv2d`), and values that
are computed and lie channels last while the model expects planes (`ComputedValues`). For the latter two the ops of
`LAYOUT_FREE` run channels last as well, so that no copy to planes and back stands between two layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from amct_ext import ops
from amct_ext.layers.lazy_tensor import LazyTensor, map_lazy
from amct_ext.layers.products.deferred_conv import DeferredConv2d
from amct_ext.layers.products.deferred_source import (
    LAYOUT_FREE,
    ClipArguments,
    Codes,
    ComputedValues,
    DeferredSource,
    PaddedValues,
    Padding,
)
from amct_ext.layers.products.prepared_conv import PreparedConv2d
from amct_ext.layers.products.prepared_ops import HARDSWISH, SILU, OneDnnActivation

_aten = torch.ops.aten
_T = TypeVar("_T")


class DeferredTensor(LazyTensor):
    """A tensor whose values are those of ``source``, computed on the first read (module docstring)."""

    # Autograd has no part in this: nothing is deferred where gradients are recorded.
    source: DeferredSource | None  # None once the values are there
    value: Tensor

    @staticmethod
    def __new__(cls, source: DeferredSource, shape: torch.Size) -> Self:
        _, channels, height, width = shape
        strides = (channels * height * width, height * width, width, 1)
        if source.channels_last:
            strides = (channels * height * width, 1, width * channels, channels)
        new = cls.without_memory(shape, strides, torch.float32)
        new.source = source
        return new

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: torch._ops.OpOverload[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not torch.is_grad_enabled():
            rule = _RULES.get(func)
            result = NotImplemented if rule is None else rule(*args, **(kwargs or {}))
            if result is NotImplemented and func in LAYOUT_FREE:
                result = _run_channels_last(func, args, kwargs or {})
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

    def replace(self, value: Tensor) -> None:
        self.value, self.source = value, None

    def channels_last_values(self) -> Tensor:
        """The values channels last, not to be modified; computed once for all who ask so."""
        if self.source is None:
            return self.value.contiguous(memory_format=torch.channels_last)
        if type(self.source) is not ComputedValues:
            self.source = ComputedValues(self.source.compute_channels_last(), self.source.channels_last)
        return self.source.values

    def unpadded_values(self) -> tuple[Tensor, Padding | None]:
        """The values channels last, and zeros to put around them; those zeros are zeros for any quantiser, too."""
        if isinstance(self.source, PaddedValues):
            return self.source.values, self.source.padding
        return self.channels_last_values(), None

    def compute_codes(self, clips: ClipArguments, num_bits: int, fixed_min: bool) -> Codes:
        """The values as codes of a quantiser: the results of `ops.ulq_quantize`."""
        if isinstance(self.source, DeferredConv2d):
            return self.source.compute_codes(clips, num_bits, fixed_min)
        return ops.ulq_quantize(self.channels_last_values(), *clips, num_bits, fixed_min)


def materialize(value: _T) -> _T:
    """``value`` with every deferred tensor computed, in all containers that torch's pytrees know."""
    return map_lazy(value, DeferredTensor, DeferredTensor.materialize)


# -- ops that run in the pass of a deferred convolution; NotImplemented where one cannot


def _source_of(x: object) -> DeferredSource | None:
    return x.source if type(x) is DeferredTensor else None


def _result_of(x: Tensor, source: DeferredSource | None, in_place: bool = False) -> Any:
    """The result whose values are those of ``source``: ``x`` itself, or a new tensor of its shape."""
    if source is None:
        return NotImplemented
    if in_place and isinstance(x, DeferredTensor):
        x.source = source
        return x
    return DeferredTensor(source, x.shape)


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
    if source is None or training or mean is None or variance is None:
        return NotImplemented
    if any(type(t) is DeferredTensor for t in (gamma, beta, mean, variance)):
        return NotImplemented
    result = _result_of(x, source.with_batch_norm(gamma, beta, mean, variance, eps))
    none = torch.empty(0)
    return result if result is NotImplemented else (result, none, none.clone())


def _clamp(in_place: bool, clamp_min: float = 0.0, clamp_max: float | None = None) -> Callable[..., Any]:
    def rule(x: Tensor, low: float = clamp_min, high: float | None = clamp_max) -> Any:
        source = _source_of(x)
        if source is None or (high is not None and low > high):  # an error that the op raises
            return NotImplemented
        return _result_of(x, source.clamped(low, high), in_place)

    return rule


def _activation(in_place: bool, activation: OneDnnActivation) -> Callable[..., Any]:
    def rule(x: Tensor) -> Any:
        source = _source_of(x)
        return NotImplemented if source is None else _result_of(x, source.activated(activation), in_place)

    return rule


def _add(in_place: bool) -> Callable[..., Any]:
    def rule(x: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
        if not in_place and _source_of(x) is None:
            x, other = other, x
        source = _source_of(x)
        if isinstance(source, (PreparedConv2d, ComputedValues)):
            return _add_prepared(in_place, x, other, alpha)
        if not isinstance(source, DeferredConv2d) or not source.unclamped or alpha != 1 or other is x:
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

    return rule


def _add_prepared(in_place: bool, x: Tensor, other: Tensor, alpha: float) -> Any:
    if alpha != 1 or other is x or not isinstance(other, Tensor) or other.shape != x.shape:
        return NotImplemented
    if not isinstance(_source_of(x), PreparedConv2d) and not in_place:
        x, other = other, x
    source = _source_of(x)
    if not isinstance(source, PreparedConv2d) or not source.takes_addend or other.dtype != torch.float32:
        return NotImplemented
    if other.stride() != x.stride():
        return NotImplemented
    if type(other) is DeferredTensor and other.source is not None:
        return _result_of(x, source.plus(other.channels_last_values()), in_place)
    addend = materialize(other)
    if type(addend) is not Tensor:
        return NotImplemented
    # The model may modify this addend next: the sum takes a copy of it, or is computed at once.
    summed: DeferredSource = source.plus(addend)
    if addend.is_contiguous(memory_format=torch.channels_last):
        summed = ComputedValues(summed.compute_channels_last(), source.channels_last)
    return _result_of(x, summed, in_place)


def _pad(x: Tensor, padding: Sequence[int], value: float = 0.0) -> Any:
    source = _source_of(x)
    if not isinstance(x, DeferredTensor) or source is None or isinstance(source, PaddedValues):
        return NotImplemented
    if value != 0 or len(padding) not in (2, 4) or min(padding) < 0:
        return NotImplemented
    left, right, top, bottom = (*padding, 0, 0)[:4]
    values = x.channels_last_values()
    if not any(padding):
        return DeferredTensor(ComputedValues(values, source.channels_last), x.shape)
    shape = torch.Size((*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right))
    return DeferredTensor(PaddedValues(values, source.channels_last, (left, right, top, bottom)), shape)


def _max_pool(x: Tensor, *window: Any) -> Any:
    source = _source_of(x)
    if not isinstance(source, DeferredConv2d) or source.channels_last:
        return NotImplemented
    # Torch's max pooling is many times slower on contiguous planes. Pooling channels last and copying the smaller
    # result costs less.
    results = _aten.max_pool2d_with_indices.default(replace(source, channels_last=True).compute(), *window)
    return tuple(t.contiguous() for t in results)


def _run_channels_last(func: torch._ops.OpOverload[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``func`` on values that lie channels last; its results report the layout that planes would have given."""
    sources = [s for s in map(_source_of, tree_leaves((args, kwargs))) if s is not None]
    if not sources or any(isinstance(s, DeferredConv2d) for s in sources):  # an integer product writes either layout
        return NotImplemented
    channels_last = any(s.channels_last for s in sources)
    args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.channels_last_values, (args, dict(kwargs)))
    results = func(*args, **kwargs)
    if channels_last:
        return results
    return tree_map_only(Tensor, _reporting_planes, results)


def _reporting_planes(y: Tensor) -> Tensor:
    if y.is_contiguous() and y.stride() == torch.empty(y.shape, device="meta").stride():
        return y
    if y.dtype == torch.float32 and y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return DeferredTensor(ComputedValues(y, False), y.shape)
    return y.clone(memory_format=torch.contiguous_format)


_RULES: dict[torch._ops.OpOverload[..., Any], Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.relu.default: _clamp(False),
    _aten.relu_.default: _clamp(True),
    _aten.hardtanh.default: _clamp(False, -1.0, 1.0),
    _aten.hardtanh_.default: _clamp(True, -1.0, 1.0),
    _aten.hardswish.default: _activation(False, HARDSWISH),
    _aten.hardswish_.default: _activation(True, HARDSWISH),
    _aten.silu.default: _activation(False, SILU),
    _aten.silu_.default: _activation(True, SILU),
    _aten.add.Tensor: _add(False),
    _aten.add_.Tensor: _add(True),
    _aten.constant_pad_nd.default: _pad,
    _aten.max_pool2d_with_indices.default: _max_pool,
}
