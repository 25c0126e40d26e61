"""What a deferred tensor gets its values from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from amct_ext.layers.products.prepared_ops import OneDnnActivation

_aten = torch.ops.aten
ClipArguments = tuple[Tensor, Tensor, Tensor, Tensor]  # clips and previous clips, as `ops.ulq_quantize` takes them
Padding = tuple[int, int, int, int]
Codes = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the results of `ops.ulq_quantize`


@dataclass
class DeferPolicy:
    """Whether one layer's results may be deferred; False once one of them had to be computed twice."""

    allowed: bool = True


@dataclass
class EvaluationCount:
    """How often the results that derive from one convolution were computed."""

    policy: DeferPolicy = field(default_factory=DeferPolicy)
    count: int = 0

    def add(self) -> None:
        """Note one more; after the second the layer stops deferring."""
        self.count += 1
        if self.count > 1:
            self.policy.allowed = False


class DeferredSource(Protocol):
    """All that the values depend on; the model cannot modify any of it in place.

    The methods ``with_batch_norm``, ``clamped`` and ``activated`` return the source of what follows, or None where that
    cannot be computed in the same pass.
    """

    @property
    def channels_last(self) -> bool:
        """The memory layout that the deferred tensor reports."""

    def compute(self) -> Tensor:
        """The values in that layout, in memory that nothing else holds."""

    def compute_channels_last(self) -> Tensor:
        """The values in channels-last layout, not to be modified."""

    def with_batch_norm(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> DeferredSource | None:
        """With a BatchNorm of these statistics behind it."""

    def clamped(self, low: float, high: float | None) -> DeferredSource | None:
        """Clamped to these bounds."""

    def activated(self, activation: OneDnnActivation) -> DeferredSource | None:
        """With an activation function behind it."""


@dataclass(frozen=True)
class ComputedValues:
    """Values that are computed and lie channels last, whatever layout the tensor reports."""

    values: Tensor
    channels_last: bool

    def compute(self) -> Tensor:
        return self.values.clone(memory_format=_layout(self.channels_last))

    def compute_channels_last(self) -> Tensor:
        return self.values

    def with_batch_norm(self, *arguments: object) -> None:
        return None

    def clamped(self, low: float, high: float | None) -> None:
        return None

    def activated(self, activation: OneDnnActivation) -> None:
        return None


@dataclass(frozen=True)
class PaddedValues(ComputedValues):
    """The same with zeros around each plane, which a convolution pads itself."""

    padding: Padding  # left, right, top, bottom; not negative

    def compute(self) -> Tensor:
        return pad_with_zeros(self.values, self.padding, _layout(self.channels_last))

    def compute_channels_last(self) -> Tensor:
        return pad_with_zeros(self.values, self.padding, torch.channels_last)


def pad_with_zeros(x: Tensor, padding: Padding, layout: torch.memory_format) -> Tensor:
    """As `torch.nn.functional.pad`, which writes the whole result twice."""
    left, right, top, bottom = padding
    images, channels, height, width = x.shape
    size = (images, channels, top + height + bottom, left + width + right)
    y = torch.empty(size, dtype=x.dtype, memory_format=layout)
    y[:, :, :top].zero_()
    y[:, :, top + height :].zero_()
    rows = y[:, :, top : top + height]
    rows[..., :left].zero_()
    rows[..., left + width :].zero_()
    rows[..., left : left + width].copy_(x)
    return y


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# Ops whose result does not depend on the layout, apart from the order of the sums of a mean; none works in place.
LAYOUT_FREE = {
    _aten.relu.default,
    _aten.hardtanh.default,
    _aten.clamp.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten.silu.default,
    _aten.sigmoid.default,
    _aten.gelu.default,
    _aten.leaky_relu.default,
    _aten.add.Tensor,
    _aten.mul.Tensor,
    _aten.cat.default,
    _aten.max_pool2d_with_indices.default,
    _aten.avg_pool2d.default,
    _aten._adaptive_avg_pool2d.default,
    _aten.mean.dim,
    _aten.native_batch_norm.default,
}
