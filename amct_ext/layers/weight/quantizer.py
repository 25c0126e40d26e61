"""The quantiser of a weight: the range of the current weight (adaptive), or a learned scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.config.plan import WeightQuant
from amct_ext.layers.cached_item import CachedItem, VersionGuard
from amct_ext.layers.forward_context import state_updates_disabled
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.precision import KeepsPrecision
from amct_ext.layers.weight.sparsity import masked
from amct_ext.ops.weight_lsq import default_grad_factor

_NAN = float("nan")


class WeightQuantizer(KeepsPrecision):
    """Fake quantisation of a weight: a scale that follows the current weight (ARQ) or a learned one (weight ULQ).

    ARQ: ``scale`` (length 1, or one per output channel) is a buffer that every forward renews; NaN before the first. It
    is that of the range or, with ``least_squares``, the one of least squared error.

    Learned: ``scale`` is a Parameter.

    * The first training forward sets it from the weight, and the flag ``initialised`` to one. An evaluation before that
      uses the scale of the current weight.
    * The flag is a float and counts as set above zero, so an average of models over all entries carries it. An average
      over parameters alone leaves it at zero; there a scale that differs from the one at construction (``start``, in no
      state dict) counts as set.
    * A scale that a step of the optimizer has moved so far that its channel would be lost is set back to that of the
      range, by the next forward.

    Sources: AMCT's ARQ and weight ULQ; Esser et al. 2020 (learned step size).
    """

    scale: Tensor
    initialised: Tensor  # learned scales only, as is `start`
    start: Tensor

    def __init__(self, plan: WeightQuant, weight: Tensor, channel_axis: int, grad_factor: float) -> None:
        super().__init__()
        self.num_bits = plan.num_bits
        self.channel_axis = channel_axis if plan.channel_wise else None
        self.learned = plan.algo == "ulq_retrain"
        self.least_squares = plan.least_squares
        self.grad_factor = None if plan.lsq_gradient else grad_factor  # None: counts all weights that share a scale
        start = self._scale_of(weight)
        self.tracker = ForwardTracker()
        self._initialised = CachedItem(0, stable_from=1)
        self._loaded = VersionGuard()  # knows a learned scale that was loaded and not trained since
        if self.learned:
            self.scale = nn.Parameter(start.clone())
            self.register_buffer("initialised", torch.zeros((), dtype=torch.float32, device=weight.device))
            self.register_buffer("start", start.clone(), persistent=False)
        else:
            self.register_buffer("scale", torch.full_like(start, _NAN))

    def forward(self, weight: Tensor, mask: Tensor | None = None, decay: float | None = None) -> Tensor:
        """Return the fake-quantised weight (same shape, dtype and layout), masked first where a mask is given.

        ``decay``: that of SR-STE, None where masked weights take no gradient.
        """
        if not self.learned:
            y, scale = self._adaptive(weight, mask, decay)
            if not state_updates_disabled():
                with torch.no_grad():
                    self.scale.copy_(scale)
            return y
        weight = masked(weight, mask, decay)
        used = self.scale
        if not self._flag_is_set and (self.training or self.tracker.training) and not state_updates_disabled():
            self.initialize(weight)
            self.repair(weight)
        elif not self._flag_is_set:
            used = torch.where(self._scale_is_set(), self.scale, self._scale_of(weight))
            self._repair(used.detach(), weight)
        elif not state_updates_disabled():
            self.repair(weight)
        return ops.lsq_fake_quantize(weight, used, self.num_bits, self.channel_axis, self.grad_factor)

    def _adaptive(self, weight: Tensor, mask: Tensor | None, decay: float | None) -> tuple[Tensor, Tensor]:
        """The fake-quantised weight and the scale that follows it."""
        bits, axis = self.num_bits, self.channel_axis
        if self.least_squares:
            scale = ops.search_weight_scale(weight.detach(), bits, axis, mask)
            return ops.lsq_fake_quantize(masked(weight, mask, decay), scale, bits, axis), scale
        if mask is None:
            return ops.arq_fake_quantize(weight, bits, axis)
        if decay is None:
            return ops.sparse_arq_fake_quantize(weight, mask, bits, axis)
        return ops.sparse_arq_fake_quantize_sr_ste(weight, mask, bits, axis, decay)

    @property
    def ready(self) -> bool:
        """Whether the next forward uses ``scale`` as it is: always so for ARQ, once it is set for a learned one."""
        return not self.learned or self._flag_is_set or bool(self._scale_is_set())

    @property
    def _flag_is_set(self) -> bool:
        """Whether the flag of a learned scale is set, as far as the host knows."""
        return self._initialised.read(self.initialised) > 0

    @torch.no_grad()
    def _scale_is_set(self) -> Tensor:
        """Whether a learned scale is set (0-dim bool, on the device)."""
        return (self.initialised > 0) | (self.scale != self.start).any()

    def repair(self, weight: Tensor) -> None:
        """Set learned scales that would cost their channel of ``weight``, already masked, to those of the range."""
        if self.learned and self._flag_is_set:
            self._repair(self.scale, weight)

    def repair_for_state(self, weight: Tensor) -> None:
        """`repair`, before the state is taken; what was loaded leaves as it came."""
        if self._loaded.unchanged(self.scale):
            return
        if self.learned and (self._flag_is_set or bool(self._scale_is_set())):
            self._repair(self.scale, weight)

    @torch.no_grad()
    def _repair(self, scale: Tensor, weight: Tensor) -> None:
        ops.repair_weight_scale_(weight.detach(), scale, self.num_bits, self.channel_axis)

    @torch.no_grad()
    def last_scale(self) -> Tensor:
        """The scale that the last forward used, at least FLT_EPSILON where it is learned."""
        return self.scale.detach().clamp_min(torch.finfo(torch.float32).eps) if self.learned else self.scale

    @torch.no_grad()
    def current_scale(self, weight: Tensor) -> Tensor:
        """The scale that a forward on ``weight`` would use now; changes no state."""
        if self.learned and self.ready:
            scale = self.scale.detach().clone()
            self._repair(scale, weight)
            return scale.clamp_min(torch.finfo(torch.float32).eps)
        return self._scale_of(weight)

    def _scale_of(self, weight: Tensor) -> Tensor:
        """The scale that a weight, already masked, gives by itself."""
        if self.least_squares:
            return ops.search_weight_scale(weight.detach(), self.num_bits, self.channel_axis)
        return ops.arq_fake_quantize(weight.detach(), self.num_bits, self.channel_axis)[1]

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set a learned scale from ``weight``, already masked; does nothing once it is set."""
        if self.learned and not self._flag_is_set:
            self.scale.copy_(torch.where(self._scale_is_set(), self.scale, self._scale_of(weight)))
            self.initialised.fill_(1.0)
            self._initialised.update(self.initialised, 1.0)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._loaded.remember(self.scale)
        if self.learned and self._initialised.read(self.initialised) <= 0:
            self.start = self.scale.detach().clone()

    def extra_repr(self) -> str:
        algo = ("learned scale" if self.learned else "ARQ") + (", least squares" if self.least_squares else "")
        return f"{algo}, num_bits={self.num_bits}, channel_axis={self.channel_axis}"


def gradient_factor(rows: Tensor, plan: WeightQuant) -> float:
    """AMCT's factor on the gradient of a learned scale; ``rows``: the weight with its output channels on axis 0."""
    # One filter is counted for 2-D and 4-D weights also per tensor, but only the input channels for other ranks.
    count = rows[0].numel() if plan.channel_wise or rows.dim() in (2, 4) else rows.shape[1]
    return default_grad_factor(count, plan.num_bits)
