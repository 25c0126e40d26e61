"""The quantiser of a weight: the range of the present weight (adaptive), or a learned scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amct_ext import ops
from amct_ext.config.plan import WeightQuant
from amct_ext.layers.cached_item import CachedItem
from amct_ext.layers.forward_context import state_updates_disabled
from amct_ext.layers.forward_tracker import ForwardTracker
from amct_ext.layers.precision import KeepsPrecision

_NAN = float("nan")


class WeightQuantizer(KeepsPrecision):
    """Fake quantisation of a weight: range of the present weight (ARQ) or a learned scale (weight ULQ).

    ``scale`` (length 1, or one per output channel) is a buffer for ARQ, renewed by every forward (NaN before the
    first), and a Parameter for learned scales, set from the weight's range by the first training forward, which also
    sets ``initialised`` to one. That flag is a float, so that an average of the model carries it too; above zero it is
    set. An average over parameters alone does not: a scale other than the one made at construction (``start``, in no
    state dict) has begun as well. An evaluation before that uses the range of the present weight. Sources: AMCT's ARQ
    and weight ULQ; Esser et al. 2020 (learned step size).
    """

    scale: Tensor
    initialised: Tensor  # learned scales only, as is `start`
    start: Tensor

    def __init__(self, plan: WeightQuant, weight: Tensor, channel_axis: int, grad_factor: float) -> None:
        super().__init__()
        self.num_bits = plan.num_bits
        self.channel_axis = channel_axis if plan.channel_wise else None
        self.learned = plan.algo == "ulq_retrain"
        self.grad_factor = grad_factor
        start = ops.arq_fake_quantize(weight.detach(), self.num_bits, self.channel_axis)[1]
        self.tracker = ForwardTracker()
        self._initialised = CachedItem(0, settled=1)
        if self.learned:
            self.scale = nn.Parameter(start.clone())
            self.register_buffer("initialised", torch.zeros((), dtype=torch.float32, device=weight.device))
            self.register_buffer("start", start.clone(), persistent=False)
        else:
            self.register_buffer("scale", torch.full_like(start, _NAN))

    def forward(self, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the fake-quantised weight (same shape, dtype and layout), masked first where a mask is given."""
        if not self.learned:
            if mask is None:
                y, scale = ops.arq_fake_quantize(weight, self.num_bits, self.channel_axis)
            else:
                y, scale = ops.sparse_arq_fake_quantize(weight, mask, self.num_bits, self.channel_axis)
            if not state_updates_disabled():
                with torch.no_grad():
                    self.scale.copy_(scale)
            return y
        if mask is not None:
            weight = ops.apply_mask(weight, mask)
        used = self.scale
        if not self._marked:
            if (self.training or self.tracker.training) and not state_updates_disabled():
                self.initialise(weight)
            else:
                used = torch.where(self._begun(), self.scale, self._range_scale(weight))
        return ops.lsq_fake_quantize(weight, used, self.num_bits, self.channel_axis, self.grad_factor)

    @property
    def ready(self) -> bool:
        """Whether the scale is that of a forward to come: always so for ARQ, from its start on for a learned one."""
        return not self.learned or self._marked or bool(self._begun())

    @property
    def _marked(self) -> bool:
        """Whether the flag of a learned scale is set, as far as the host can look."""
        return self._initialised.read(self.initialised) > 0

    @torch.no_grad()
    def _begun(self) -> Tensor:
        """Whether a learned scale has begun, on the device."""
        return (self.initialised > 0) | (self.scale != self.start).any()

    @torch.no_grad()
    def last_scale(self) -> Tensor:
        """The scale that the last forward used; nothing is computed from a weight."""
        return self.scale.detach().clamp_min(torch.finfo(torch.float32).eps) if self.learned else self.scale

    @torch.no_grad()
    def current_scale(self, weight: Tensor) -> Tensor:
        """The scale that a forward on ``weight`` would use now; nothing is changed."""
        if self.learned and self.ready:
            return self.last_scale()
        return self._range_scale(weight)

    def _range_scale(self, weight: Tensor) -> Tensor:
        return ops.arq_fake_quantize(weight.detach(), self.num_bits, self.channel_axis)[1]

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        """Start a learned scale from the range of ``weight``, masked already; does nothing once it has begun."""
        if self.learned and not self._marked:
            self.scale.copy_(torch.where(self._begun(), self.scale, self._range_scale(weight)))
            self.initialised.fill_(1.0)
            self._initialised.wrote(self.initialised, 1.0)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.learned and self._initialised.read(self.initialised) <= 0:
            self.start = self.scale.detach().clone()

    def extra_repr(self) -> str:
        algo = "learned scale" if self.learned else "ARQ"
        return f"{algo}, num_bits={self.num_bits}, channel_axis={self.channel_axis}"
