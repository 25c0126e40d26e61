"""The arguments of a deferred integer convolution, and the ops that were folded into it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from amct_ext import ops
from amct_ext.layers.bn_fold import fold_batch_norm
from amct_ext.layers.integer_ops import ConvGeometry


@dataclass
class DeferPolicy:
    """Whether one layer's results may be deferred; False once one of them had to be computed twice."""

    allowed: bool = True


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
    policy: DeferPolicy = field(default_factory=DeferPolicy)
    evaluations: list[None] = field(default_factory=list)  # one entry for each; shared by all that derive from one conv

    def compute(self, addend: Tensor | None = None) -> Tensor:
        """The output as floats, plus ``addend`` where one is given."""
        self._count_evaluation()
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

    def compute_codes(
        self, clips: tuple[Tensor, Tensor, Tensor, Tensor], num_bits: int, fixed_min: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The output as the codes of the next layer's quantiser; the results of `ulq_quantize`."""
        self._count_evaluation()
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
    ) -> DeferredConv2d:
        """With a BatchNorm of these statistics behind it; factor and shift are computed in float64."""
        factor, shift = fold_batch_norm(self.bias, gamma, beta, mean, variance, eps)
        return replace(self, scale=factor * self.scale, bias=shift)

    def clamped(self, low: float, high: float | None) -> DeferredConv2d:
        """Clamped to these bounds; only called where there is no upper bound yet."""
        low = low if self.clamp_min is None else max(low, self.clamp_min)
        return replace(self, clamp_min=low, clamp_max=high)

    @property
    def unclamped(self) -> bool:
        """Whether BatchNorm or an addition can still be folded in: neither can behind a clamp."""
        return self.clamp_min is None and self.clamp_max is None

    def _count_evaluation(self) -> None:
        self.evaluations.append(None)
        if len(self.evaluations) > 1:
            self.policy.allowed = False
