"""searchN: the per-channel right shift of devices that narrow INT32 accumulators to INT16."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amct_ext import ops
from amct_ext.errors import StaleStateError
from amct_ext.layers.cached_item import CachedItem, VersionGuard
from amct_ext.layers.precision import KeepsPrecision

NUM_SHIFTS = 16


class ShiftSearch(KeepsPrecision):
    """Accumulates the error of the shifts 1..16 over evaluation forwards; does not change the data it reads.

    A training forward makes the result stale; the next ``batch_num`` evaluation forwards compute it again. State:
    ``errors`` (float64, channels x 16), ``deq_scale`` (the scales that they hold for), ``batches`` (0: stale).
    Source: the search of AMCT 9.0.0 and of the published dequantisation emulators.
    """

    errors: Tensor
    deq_scale: Tensor
    batches: Tensor

    def __init__(self, num_scales: int, batch_num: int, device: torch.device) -> None:
        super().__init__()
        self.batch_num = batch_num
        self.register_buffer("errors", torch.zeros(num_scales, NUM_SHIFTS, dtype=torch.float64, device=device))
        self.register_buffer("deq_scale", torch.zeros(num_scales, dtype=torch.float32, device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))
        self._batches = CachedItem(0, stable_from=batch_num)
        self._guard = VersionGuard()

    @torch.no_grad()
    def reset(self) -> None:
        """Make the result stale, for scales are about to change: the next evaluation starts over."""
        if self.has_result:
            self.batches.zero_()
            self._batches.update(self.batches, 0)

    @property
    def errors_are_own(self) -> bool:
        """Whether the errors come from forwards of this model, not from a load or a copy of another model's state."""
        return self._guard.unchanged(self.errors)

    def matches_scale(self, deq_scale: Tensor) -> bool:
        """Whether the errors hold for these scales; reads the device."""
        return torch.equal(self.deq_scale, deq_scale.to(self.deq_scale))

    @property
    def needs_data(self) -> bool:
        """Whether the search takes further evaluation batches."""
        return self._batches.read(self.batches) < self.batch_num

    @property
    def has_result(self) -> bool:
        """Whether a batch was seen since the last training forward."""
        return self._batches.read(self.batches) > 0

    @torch.no_grad()
    def observe(self, output: Tensor, deq_scale: Tensor, channel_axis: int, in_steps: bool = False) -> None:
        """Add one batch: ``output`` of the layer (after a folded BatchNorm), ``deq_scale`` = scale_d * scale_w.

        ``in_steps``: ``output`` is in units of deq_scale: the accumulators themselves.
        """
        seen = self._batches.read(self.batches) + 1
        self.batches.add_(1)
        self._batches.update(self.batches, seen)
        deq_scale = deq_scale.to(self.deq_scale.dtype)
        # Scales that changed without a training forward (a clip set by hand) make earlier errors void. Decided on the
        # device.
        same = (self.deq_scale == deq_scale).all() & (self.batches > 1)
        self.errors.masked_fill_(~same, 0)  # a product would keep NaN
        self.deq_scale.copy_(deq_scale)
        valid = torch.isfinite(deq_scale) & (deq_scale > 0)
        step = torch.where(valid, torch.ones_like(deq_scale), math.nan) if in_steps else deq_scale
        per_channel = deq_scale.numel() > 1
        spatial = output.numel() // max(1, output.shape[0] * output.shape[channel_axis])
        if per_channel and spatial == 1:
            # With one value per channel and sample the device has one shift for the whole layer.
            batch = torch.zeros_like(self.errors)
            ops.shift_error_(output, step, batch, channel_axis)
            self.errors.add_(batch.sum(0, keepdim=True))
        else:
            ops.shift_error_(output, step, self.errors, channel_axis)
        self._guard.remember(self.errors)

    def result(self, layer: str, deq_scale: Tensor) -> list[int]:
        """The shifts N (1..16), one per scale. Errors: StaleStateError where no evaluation saw the present scales."""
        if not self.has_result:
            raise StaleStateError(
                f"layer '{layer}': no shift yet; run an evaluation forward (model.eval()) first, not compiled"
            )
        if not bool(torch.isfinite(deq_scale).all() and (deq_scale > 0).all()):
            raise StaleStateError(f"layer '{layer}': dequantisation scales must be positive and finite")
        if not self.matches_scale(deq_scale):
            raise StaleStateError(
                f"layer '{layer}': scales changed since the shift search; run an evaluation forward again"
            )
        return ops.best_shift(self.errors).tolist()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._batches.read(self.batches)

    def extra_repr(self) -> str:
        return f"scales={self.errors.shape[0]}, batch_num={self.batch_num}"
