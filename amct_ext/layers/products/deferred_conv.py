"""The arguments of a deferred integer convolution, and the ops that were folded into it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from amct_ext import ops
from amct_ext.layers.bn_fold import fold_batch_norm
from amct_ext.layers.products.deferred_source import ClipArguments, Codes, EvaluationCount
from amct_ext.layers.products.integer_ops import ConvGeometry
from amct_ext.layers.products.prepared_ops import OneDnnActivation


@dataclass(frozen=True)
class DeferredConv2d:
    """All arguments that the values depend on. The model cannot modify any of them in place."""

    codes: tuple[Tensor, Tensor, Tensor]  # codes, scale and offset of the input
    packed: tuple[Tensor, Tensor]  # packed weight and its sums
    scale: Tensor  # of the weight, times the factor of a folded BatchNorm
    bias: Tensor | None
    geometry: ConvGeometry
    channels_last: bool
    clamp_min: float | None = None
    clamp_max: float | None = None
    evaluations: EvaluationCount = field(default_factory=EvaluationCount)  # shared by all that derive from one conv

    def compute(self, addend: Tensor | None = None) -> Tensor:
        """The output as floats, plus ``addend`` where one is given."""
        self.evaluations.add()
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

    def compute_channels_last(self) -> Tensor:
        """The output as floats in channels-last layout."""
        return replace(self, channels_last=True).compute()

    def compute_codes(self, clips: ClipArguments, num_bits: int, fixed_min: bool) -> Codes:
        """The output as the codes of the next layer's quantiser; the results of `ulq_quantize`."""
        self.evaluations.add()
        return ops.integer_conv2d_codes(
            *self.codes,
            *self.packed,
            self.scale,
            self.bias,
            *self.geometry,
            self.clamp_min,
            self.clamp_max,
            *clips,
            num_bits,
            fixed_min,
        )

    def with_batch_norm(
        self, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor, eps: float
    ) -> DeferredConv2d | None:
        """With a BatchNorm of these statistics behind it; factor and shift are computed in float64."""
        if not self.unclamped:
            return None
        factor, shift = fold_batch_norm(self.bias, gamma, beta, mean, variance, eps)
        return replace(self, scale=factor * self.scale, bias=shift)

    def clamped(self, low: float, high: float | None) -> DeferredConv2d | None:
        """Clamped to these bounds; a second upper bound would have to be applied after the first one."""
        if self.clamp_max is not None:
            return None
        low = low if self.clamp_min is None else max(low, self.clamp_min)
        return replace(self, clamp_min=low, clamp_max=high)

    def activated(self, activation: OneDnnActivation) -> None:
        """None: the integer product has bounds only."""

    @property
    def unclamped(self) -> bool:
        """Whether BatchNorm or an addition can still be folded in: neither can behind a clamp."""
        return self.clamp_min is None and self.clamp_max is None
