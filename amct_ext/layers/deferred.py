"""Deferred results of integer convolutions, so that the ops behind a convolution run in its pass.

In an evaluation BatchNorm, an activation function, a residual addition and the quantisation for the next layer each
read and write a whole activation, which takes about as long as the integer convolution itself. A `DeferredTensor` has
no memory; it holds the arguments that compute its values. An op that can be fused gives another `DeferredTensor`, a
quantising layer takes codes, and every other reader gets floats that are computed on the spot. So any use is right;
only a second use computes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_any, tree_map_only

from amct_ext import ops
from amct_ext.layers.bn_fold import fold_batch_norm

_aten = torch.ops.aten
_CPU = torch.device("cpu")


@dataclass
class DeferPolicy:
    """Of one layer: whether its results may wait. They may not once one had to be computed twice."""

    allowed: bool = True


@dataclass(frozen=True)
class DeferredConv2d:
    """All that the values depend on; nothing that a step of the model could modify."""

    codes: tuple[Tensor, Tensor, Tensor]  # with scale and offset
    packed: tuple[Tensor, Tensor]  # with sums
    scale: Tensor  # of the weight, or of weight and normalisation
    bias: Tensor | None
    geometry: tuple[Any, Any, Any, Any]  # kernel_size, stride, padding, dilation
    channels_last: bool
    clamp_min: float | None = None
    clamp_max: float | None = None
    policy: DeferPolicy = field(default_factory=DeferPolicy)
    evaluations: list[None] = field(
        default_factory=list
    )  # one entry for each time; shared with what was derived from it

    def compute(self, addend: Tensor | None = None) -> Tensor:
        self._count()
        return ops.integer_conv2d(
            *self.codes,
            *self.packed,
            self.scale,
            self.bias,
            *self.geometry,
            self.channels_last,
            addend,
            self.clamp_min,
            self.clamp_max,
        )

    def compute_codes(self, *quantizer: Any) -> tuple[Tensor, ...]:
        self._count()
        return ops.integer_conv2d_codes(
            *self.codes, *self.packed, self.scale, self.bias, *self.geometry, self.clamp_min, self.clamp_max, *quantizer
        )

    def with_batch_norm(
        self, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> DeferredConv2d:
        """With a normalisation by these statistics behind it, in float64."""
        factor, term = fold_batch_norm(self.bias, weight, bias, mean, variance, eps)
        return replace(self, scale=factor * self.scale, bias=term)

    def clamp(self, clamp_min: float, clamp_max: float | None) -> DeferredConv2d:
        """Limited to these bounds; there is no upper one yet."""
        return replace(
            self, clamp_min=clamp_min if self.clamp_min is None else max(clamp_min, self.clamp_min), clamp_max=clamp_max
        )

    @property
    def unclamped(self) -> bool:
        """Whether values are not bounded yet."""
        return self.clamp_min is None and self.clamp_max is None

    def _count(self) -> None:
        self.evaluations.append(None)
        if len(self.evaluations) > 1:
            self.policy.allowed = False


class DeferredTensor(Tensor):
    """A tensor whose values are those of ``source``, computed when they are needed (module docstring)."""

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

    # Autograd does not know of what waits; nothing waits where it records.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = None if torch.is_grad_enabled() else _HANDLERS.get(func)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **(kwargs or {}))  # what the wrapper says of its shape
        return func(*materialize(args), **materialize(kwargs or {}))

    def materialize(self) -> Tensor:
        """The plain tensor of the values."""
        if self.source is not None:
            self.value, self.source = self.source.compute(), None
        return self.value

    # What reaches memory without a dispatch.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.materialize().tolist()

    def data_ptr(self) -> int:
        return self.materialize().data_ptr()

    def untyped_storage(self) -> Any:
        return self.materialize().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialize().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = self.materialize().__deepcopy__(memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return self.materialize().__repr__(*args, **kwargs)


def materialize(value: Any) -> Any:
    """``value`` with every tensor that waits computed, in whatever containers torch looks into."""
    if type(value) is Tensor or not tree_any(lambda leaf: type(leaf) is DeferredTensor, value):
        return value
    return tree_map_only(DeferredTensor, DeferredTensor.materialize, value)


def _source_of(x: Any) -> DeferredConv2d | None:
    return x.source if type(x) is DeferredTensor else None


def _batch_norm(
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    source = _source_of(x)
    if source is None or not source.unclamped or training or mean is None or variance is None:
        return NotImplemented
    if any(type(t) is DeferredTensor for t in (weight, bias, mean, variance)):
        return NotImplemented
    none = torch.empty(0)
    return DeferredTensor(source.with_batch_norm(weight, bias, mean, variance, eps), x.shape), none, none.clone()


def _clamp(in_place: bool, clamp_min: float = 0.0, clamp_max: float | None = None) -> Callable[..., Any]:
    def handler(x: Any, low: Any = clamp_min, high: Any = clamp_max) -> Any:
        source = _source_of(x)
        # Bounds on top of an upper one would have to be applied in turn; a wrong pair is an error of the op.
        if source is None or source.clamp_max is not None or (high is not None and low > high):
            return NotImplemented
        if in_place:
            x.source = source.clamp(low, high)
            return x
        return DeferredTensor(source.clamp(low, high), x.shape)

    return handler


def _add(in_place: bool) -> Callable[..., Any]:
    def handler(x: Any, other: Any, *, alpha: Any = 1) -> Any:
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
        # Now, for the addend may be modified next.
        y = source.compute(addend)
        if not in_place:
            return y
        x.value, x.source = y, None
        return x

    return handler


def _max_pool(x: Any, *window: Any) -> Any:
    source = _source_of(x)
    if source is None or source.channels_last:
        return NotImplemented
    # Torch takes many times as long for planes, much longer than writing the smaller result once more.
    results = _aten.max_pool2d_with_indices.default(replace(source, channels_last=True).compute(), *window)
    return tuple(t.contiguous() for t in results)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.relu.default: _clamp(False),
    _aten.relu_.default: _clamp(True),
    _aten.hardtanh.default: _clamp(False, -1.0, 1.0),
    _aten.hardtanh_.default: _clamp(True, -1.0, 1.0),
    _aten.add.Tensor: _add(False),
    _aten.add_.Tensor: _add(True),
    _aten.max_pool2d_with_indices.default: _max_pool,
}
