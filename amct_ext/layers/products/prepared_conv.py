"""The arguments of a deferred convolution on packed floats, and the ops that were folded into it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amct_ext.layers.products.deferred_source import EvaluationCount
from amct_ext.layers.products.integer_ops import ConvGeometry
from amct_ext.layers.products.prepared_ops import IDENTITY, RELU, OneDnnActivation, bounds, conv2d
from amct_ext.layers.products.prepared_weight import PackedConv, PreparedConvWeight, is_plain


@dataclass(frozen=True)
class PreparedConv2d:
    """A `DeferredSource`: activation(convolution + addend). The model cannot modify the tensors in place."""

    x: Tensor  # fake-quantised, channels last
    weight: PreparedConvWeight
    geometry: ConvGeometry
    channels_last: bool  # the layout that the deferred tensor reports
    folded: PackedConv | None = None  # with the BatchNorm behind it
    addend: Tensor | None = None  # channels last
    activation: OneDnnActivation = IDENTITY
    evaluations: EvaluationCount = field(default_factory=EvaluationCount)  # shared by all that derive from one conv

    def compute(self) -> Tensor:
        """The output in the reported layout."""
        y = self._run()
        return y if self.channels_last else y.contiguous()

    def compute_channels_last(self) -> Tensor:
        """The output in oneDNN's layout."""
        return self._run()

    def with_batch_norm(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> PreparedConv2d | None:
        """With a BatchNorm of these statistics in its weight and bias, rounded once from float64."""
        if self.folded is not None or not self.takes_addend or not all(map(is_plain, (gamma, beta, mean, variance))):
            return None
        folded = self.weight.folded(gamma, beta, mean, variance, eps)
        return None if folded is None else replace(self, folded=folded)

    def clamped(self, low: float, high: float | None) -> PreparedConv2d | None:
        """Clamped to these bounds; also behind a ReLU."""
        if self.activation == RELU:
            low = max(low, 0.0)
        elif self.activation != IDENTITY:
            return None
        activation = bounds(low, high)
        return None if activation is None else self._with(activation)

    def activated(self, activation: OneDnnActivation) -> PreparedConv2d | None:
        """With an activation function behind it, where there is none yet."""
        return self._with(activation) if self.activation == IDENTITY else None

    def plus(self, addend: Tensor) -> PreparedConv2d:
        """Plus ``addend``, which nobody may modify any more; only called where `takes_addend`."""
        return replace(self, addend=addend.contiguous(memory_format=torch.channels_last))

    @property
    def takes_addend(self) -> bool:
        """Whether an addition can still be folded in."""
        return self.addend is None and self.activation == IDENTITY

    def _with(self, activation: OneDnnActivation) -> PreparedConv2d | None:
        finite = self.folded is not None or self.weight.is_finite
        return replace(self, activation=activation) if finite else None

    def _run(self) -> Tensor:
        self.evaluations.add()
        packed = self.weight.plain() if self.folded is None else self.folded
        y = conv2d(self.x, *packed, self.geometry, self.weight.groups, self.addend, self.activation)
        return y.contiguous(memory_format=torch.channels_last)
